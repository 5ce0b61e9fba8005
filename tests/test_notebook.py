"""What a notebook does with a run, on real (small) runs."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

import pretraining
from pretraining import display, metrics, notebook, observe
from pretraining.config import objective_names
from pretraining.errors import UserError


@pytest.fixture(scope="module")
def causal(trained):
    return pretraining.load(trained["causal_lm"])


@pytest.fixture(scope="module")
def masked(trained):
    return pretraining.load(trained["masked_lm"])


def test_a_run_opens_at_its_newest_step_on_one_cpu(masked, trained):
    assert masked.step == 40
    assert "step 40" in repr(masked)
    devices = {device for leaf in jax.tree.leaves(masked.params) for device in leaf.devices()}
    assert devices == {jax.local_devices(backend="cpu")[0]}
    assert masked.config.objective.name == "masked_lm"
    assert masked.vocabulary.size == 300


def test_other_steps_and_the_moving_average(masked, trained):
    older = pretraining.load(trained["masked_lm"], step=28)
    average = pretraining.load(trained["masked_lm"], ema=True)
    assert older.step == 28
    for other in (older, average):
        same = jax.tree.map(lambda a, b: bool((a == b).all()), masked.params, other.params)
        assert not all(jax.tree.leaves(same))


def test_what_is_not_there_is_named(trained, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        pretraining.load(tmp_path)
    with pytest.raises(UserError, match=r"\b3\b"):
        pretraining.load(trained["masked_lm"], step=3)


def test_metrics_frame(masked):
    frame = masked.metrics
    assert list(frame.index) == list(range(1, 41))
    assert frame["train/loss"].notna().all()
    assert list(frame["eval/loss"].dropna().index) == [10, 20, 30, 40]


def test_scores_are_log_likelihoods_of_the_same_forward_pass(causal):
    """Against the loss itself: the objective's own sum over one row of evaluation."""
    text = "Document 3. the value of the object"
    ids, _ = causal.vocabulary.encode_document(text)
    row = notebook.predict.text_row(causal.vocabulary, text, causal.payload)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], row)
    example = jax.vmap(causal.objective.corrupt, (0, 0, None))(
        jax.random.split(jax.random.key(0), 1), batch, causal.objective.evaluation_knobs
    )
    terms = causal.objective.loss(
        causal.objective.model.apply, causal.params, example, {}, jax.random.key(0), False
    )
    (score,) = causal.score([text])
    np.testing.assert_allclose(score, -terms["causal_lm"].sum, rtol=1e-5)
    (tokens,) = causal.score([text], per_token=True)
    assert len(tokens) == len(ids)
    np.testing.assert_allclose(tokens.sum(), score, rtol=1e-6)


def test_pseudo_scores_mask_one_token_at_a_time(masked):
    text = "the value of the object"
    row = notebook.predict.text_row(masked.vocabulary, text, masked.payload)
    (tokens,) = masked.score([text], per_token=True)
    for position in (0, int(row.length) - 1):
        example = masked.objective.query(row, np.array([position]))
        seen = np.asarray(example.tokens)
        assert seen[position + 1] == masked.vocabulary.mask
        assert (seen == masked.vocabulary.mask).sum() == 1
        batch = jax.tree.map(lambda x: np.asarray(x)[None], example)
        values = masked.objective.log_probs(masked.objective.model.apply, masked.params, batch)
        np.testing.assert_allclose(
            tokens[position], values[0, 0, row.tokens[position]], rtol=1e-4, atol=1e-5
        )


def test_fill_mask_gives_probabilities_of_each_mask(masked):
    found = masked.fill_mask("the [MASK] of the [MASK].", k=300)
    assert [len(candidates) for candidates in found] == [300, 300]
    for candidates in found:
        probabilities = [probability for _, probability in candidates]
        assert math.isclose(sum(probabilities), 1, rel_tol=1e-4)
        assert probabilities == sorted(probabilities, reverse=True)
    with pytest.raises(UserError, match=r"no \[MASK\]"):
        masked.fill_mask("nothing to fill")


@pytest.mark.parametrize(
    "text", ["the [MASK] of the object.", "[MASK] value", "the value of the [MASK].", "a [MASK]"]
)
def test_what_surrounds_a_mask_has_the_pieces_of_running_text(masked, text):
    """Against the same text with a word that is one piece in the place of the mask."""
    tokens, _, (position,) = masked._mask_text(text)
    (word,) = masked.vocabulary.encode("the")
    whole = masked.vocabulary.encode(text.replace("[MASK]", "the"))
    assert whole[position] == word
    assert [*tokens[:position], word, *tokens[position + 1 :]] == whole


def test_encode_gives_a_vector_for_each_token_of_each_layer(masked, causal):
    texts = ["the value of the object", "a list"]
    for run in (masked, causal):
        lengths = [len(run.vocabulary.encode_document(text)[0]) for text in texts]
        for layer in (0, 1, 2, -1):
            vectors = run.encode(texts, layer)
            assert [v.shape for v in vectors] == [(n, run.config.model.width) for n in lengths]
        np.testing.assert_array_equal(run.encode(texts, 2)[0], run.encode(texts)[0])
        alone = run.encode(texts[1:])[0]
        np.testing.assert_allclose(alone, run.encode(texts)[1], rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match="layer=3"):
            run.encode(texts, 3)


def test_causal_vectors_depend_on_the_left_only(causal, masked):
    first, second = "the value of the object", "the value of the list"
    shared = 3
    for run, same in ((causal, True), (masked, False)):
        a, b = run.encode([first, second])
        assert np.allclose(a[:shared], b[:shared], atol=1e-5) is same


def test_generate_is_repeatable_and_greedy_at_temperature_zero(causal):
    assert causal.generate("the value", 8, seed=1) == causal.generate("the value", 8, seed=1)
    greedy = causal.generate("the value", 8, temperature=0)
    assert greedy == causal.generate("the value", 8, temperature=0, seed=5)
    assert greedy == causal.generate("the value", 8, top_k=1)
    assert greedy == causal.generate("the value", 8, top_p=1e-6)
    assert greedy.startswith("the value")


def test_sampling_keeps_what_top_k_and_top_p_say():
    log_probs = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    generator = np.random.default_rng(0)

    def counts(**settings):
        settings = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
        draws = [notebook._sample(log_probs, generator=generator, **settings) for _ in range(4000)]
        return np.bincount(draws, minlength=4) / 4000

    tolerance = 5 * 0.5 / math.sqrt(4000)  # five standard deviations at most
    np.testing.assert_allclose(counts(), [0.1, 0.5, 0.15, 0.25], atol=tolerance)
    np.testing.assert_allclose(counts(top_k=2), [0, 2 / 3, 0, 1 / 3], atol=tolerance)
    np.testing.assert_allclose(counts(top_p=0.6), [0, 2 / 3, 0, 1 / 3], atol=tolerance)
    np.testing.assert_allclose(counts(top_p=0.5), [0, 1, 0, 0])
    squared = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(counts(temperature=0.5), squared / squared.sum(), atol=tolerance)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}])
def test_settings_out_of_range(causal, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        causal.generate("the", **settings)


def test_what_an_objective_cannot_do_is_said(causal, masked):
    with pytest.raises(UserError, match="fill_mask needs an objective whose positions see both"):
        causal.fill_mask("a [MASK]")
    with pytest.raises(UserError, match="generate needs an objective whose positions see what"):
        masked.generate("a")


def test_long_and_empty_texts_are_refused(causal):
    with pytest.raises(UserError, match="1 to 29"):
        causal.score(["the value of " * 30])
    with pytest.raises(UserError, match="0 tokens"):
        causal.encode([""])


def test_plot_draws_the_curves(masked, tmp_path):
    figure = masked.plot()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["training", "validation", "unigram baseline"]
    figure.savefig(tmp_path / "curves.png")
    assert metrics.read(masked.folder / metrics.FILE)


@pytest.mark.parametrize("objective", ["permutation_lm", "span_boundary"])
def test_hidden_tokens_are_guessed_and_scored(objective, trained):
    """The score of a token is what is given to it where it alone is hidden."""
    run = pretraining.load(trained[objective])
    (first, second) = run.fill_mask("the [MASK] of the [MASK].", k=300)
    for candidates in (first, second):
        assert math.isclose(sum(probability for _, probability in candidates), 1, rel_tol=1e-4)
    text = "the value of the object"
    (tokens,) = run.score([text], per_token=True)
    ids = run.vocabulary.encode(text)
    assert len(tokens) == len(ids)
    for position in (0, 2, len(ids) - 1):
        row = notebook.predict.text_row(run.vocabulary, text, run.payload)
        other = row._replace(tokens=np.where(np.arange(run.payload) == position, 9, row.tokens))
        values = [
            notebook.predict.log_probs(run.objective, run.params, [r], np.array([[position]]))[0, 0]
            for r in (row, other)
        ]
        np.testing.assert_allclose(tokens[position], values[0][ids[position]], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(*values)  # the token itself is not seen
    with pytest.raises(UserError, match="generate needs"):
        run.generate("a")


def test_a_discriminator_scores_by_what_it_was_trained_to_tell(trained):
    """The sum over tokens of log P(original): with its loss, minus [CLS] and [SEP], by the loss."""
    run = pretraining.load(trained["replaced_token_detection"])
    text = "the value of the object"
    (tokens,) = run.score([text], per_token=True)
    assert len(tokens) == len(run.vocabulary.encode(text))
    assert (tokens < 0).all()
    np.testing.assert_allclose(run.score([text]), [tokens.sum()], rtol=1e-6)
    row = notebook.predict.text_row(run.vocabulary, text, run.payload)
    example = run.objective.query(row, np.array([], np.int32))
    batch = jax.tree.map(lambda x: np.asarray(x)[None], example)
    terms = run.objective.loss(run.objective.model.apply, run.params, batch, {}, None, False)
    assert terms["replaced"].sum == 0
    assert terms["discriminator"].weight == len(tokens) + 2
    assert 0 < -tokens.sum() < terms["discriminator"].sum
    (candidates,) = run.fill_mask("the [MASK] of the object", k=300)  # the generator's
    assert math.isclose(sum(probability for _, probability in candidates), 1, rel_tol=1e-4)
    vectors = run.encode([text])[0]  # the discriminator's
    assert vectors.shape == (len(tokens), run.config.model.width)


# What a network looked at, and which pieces are alike.

TEXT = "the value of the object"


@pytest.mark.parametrize("objective", objective_names())
def test_attention_is_a_distribution_over_the_visible_tokens(objective, trained):
    run = pretraining.load(trained[objective])
    pieces, probabilities = run.attention(TEXT)
    text = run.vocabulary.pieces(run.vocabulary.encode(TEXT))
    special = run.vocabulary.pieces(run.vocabulary.special_ids)
    assert [piece for piece in pieces if piece not in special] == text
    n = len(pieces)
    assert n - len(text) in (1, 2)
    assert probabilities.shape == (2, 2, n, n)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    assert (probabilities >= 0).all()
    above = probabilities[..., ~np.tri(n, dtype=bool)]
    if run.objective.context == "left":
        assert (above == 0).all()
    else:
        assert (above > 0).all()


def test_attention_reads_a_text_that_fills_the_row(causal):
    (row,) = [notebook.predict.text_row(causal.vocabulary, "the the the " * 9, causal.payload)]
    assert causal.attention("the the the " * 9).probabilities.shape[-1] == row.length + 1
    with pytest.raises(UserError, match="takes 1 to 29"):
        causal.attention("the value of " * 30)


def test_without_a_network_that_keeps_attention_it_is_refused(masked):
    without = dataclasses.replace(masked, objective=masked.objective._replace(encode=None))
    with pytest.raises(UserError, match="attention is not available"):
        without.attention(TEXT)
    silent = lambda apply, params, example: (example.tokens,)  # never calls the network
    other = dataclasses.replace(masked, objective=masked.objective._replace(encode=silent))
    with pytest.raises(UserError, match="attention is not available"):
        other.attention(TEXT)


def test_neighbours_are_ordered_by_their_cosine(masked):
    """Against a table whose cosines to the first piece are known: 1 / sqrt(1 + j^2)."""
    count = masked.vocabulary.size
    the = masked.vocabulary.encode("the")[0]
    table = np.stack([np.ones(count), np.arange(count) - the], axis=1)
    params = {"encoder": {"embeddings": {"token": {"embedding": table}}}}
    run = dataclasses.replace(masked, params=params)
    found = run.neighbours("the", k=4)
    ids = [the + distance for distance in (-1, 1, -2, 2)]
    assert [piece for piece, _ in found] == masked.vocabulary.pieces(ids)
    np.testing.assert_allclose([c for _, c in found], [0.5**0.5] * 2 + [0.2**0.5] * 2)
    assert run.neighbours(masked.vocabulary.pieces([the])[0], k=4) == found
    every = {piece for piece, _ in run.neighbours("the", k=count)}
    assert len(every) == count - 1 - len(masked.vocabulary.special_ids)
    with pytest.raises(UserError, match="'value of' is no piece of the vocabulary"):
        run.neighbours("value of")
    with pytest.raises(UserError, match="keeps no table"):
        dataclasses.replace(masked, params={"encoder": {}}).neighbours("the")


def test_colours_run_from_the_likeliest_token_to_the_least_likely(masked, causal):
    for run in (masked, causal):
        found = run.colour(TEXT)
        (values,) = run.score([TEXT], per_token=True)
        assert [float(v) for v in re.findall(r'title="([^"]*)"', found)] == [
            float(f"{value:.3f}") for value in values
        ]
        assert found._repr_html_() == found


def test_html_of_coloured_tokens():
    html = display.coloured(["\u2581<b>", "c", "d", "e"], np.array([-1.0, -3.0, -2.0, np.nan]))
    spans = re.findall(
        r'<span(?: title="([^"]*)")? style="background:([^"]*)">([^<]*)</span>', html
    )
    assert spans == [
        ("-1.000", "rgb(255,255,255)", "&nbsp;&lt;b&gt;"),
        ("-3.000", "rgb(255,0,0)", "c"),
        ("-2.000", "rgb(255,128,128)", "d"),
        ("", "#ddd", "e"),
    ]
    assert "white -1.00 nats, red -3.00 nats; mean -2.00" in html
    assert "rgb(255,255,255)" in display.coloured(["a", "b"], np.array([-1.0, -1.0]))
    assert "rgb" not in display.coloured(["a"], np.array([np.nan]))


def test_maps_of_attention():
    probabilities = np.random.default_rng(0).random((3, 2, 2, 2))
    found = observe.AttentionMap(["\u2581a", "$b"], probabilities)
    grid = display.attention(found)
    assert len(grid.axes) == 6
    one = display.attention(found, layer=2, head=1)
    axes = one.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["·a", r"\$b"]
    assert axes.get_title() == "layer 2 head 1"
    np.testing.assert_array_equal(axes.images[0].get_array(), probabilities[2, 1])
    np.testing.assert_array_equal(grid.axes[3].images[0].get_array(), probabilities[1, 1])
    grid.canvas.draw()
    one.canvas.draw()
