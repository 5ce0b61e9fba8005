"""Spans and boundaries, held against SpanBERT's own code, and the second head with its loss.

originals/spanbert.py says how spanbert.npz was made.
"""

import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from objectives import masking, span_boundary
from pretraining.data.row import SPECIAL_POSITIONS, WORD_START, Row
from pretraining.errors import UserError

MASK, SEP = 4, 3
V = 64


@pytest.fixture(scope="module")
def original():
    with np.load(pathlib.Path(__file__).parent / "originals" / "spanbert.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("span_boundary", **overrides)
        return config, span_boundary.build(config, vocabulary)

    return make


def rows_of(tokens, lengths, boundary=WORD_START):
    tokens, batch = jnp.asarray(tokens, jnp.int32), len(lengths)
    return Row(
        tokens=tokens,
        length=jnp.asarray(lengths, jnp.int32),
        document=jnp.zeros(tokens.shape, jnp.int32),
        boundary=jnp.asarray(np.broadcast_to(boundary, tokens.shape), jnp.uint8),
        index=jnp.arange(batch, dtype=jnp.int32),
        copy=jnp.zeros(batch, jnp.int32),
    )


@pytest.fixture
def corrupt_spans(make_config, vocabulary, monkeypatch):
    """(rows, spans of every row, first and last position of the payload) -> examples in which these
    spans were chosen; all else is the objective's own code."""

    def run(rows, spans, **overrides):
        size = rows.tokens.shape[1]
        within = lambda place, row: any(first <= place <= last for first, last in row)
        chosen = np.array([[within(place, row) for place in range(size)] for row in spans])
        traced = {}

        def unit(key, words, free, budget):
            turn = jnp.cumsum(traced["chosen"], dtype=jnp.int32) - 1
            return jnp.where(traced["chosen"], turn, size)

        monkeypatch.setattr(masking, "make_unit", lambda config: unit)
        sized = {"data.sequence_length": size + SPECIAL_POSITIONS, "objective.mask_rate": 1.0}
        config = make_config("span_boundary", **sized | overrides)
        objective = span_boundary.build(config, vocabulary)

        def corrupt(row, chosen):
            traced["chosen"] = chosen
            return objective.corrupt(jax.random.key(0), row, objective.schedule(jnp.int32(0)))

        return jax.tree.map(np.asarray, jax.jit(jax.vmap(corrupt))(rows, jnp.asarray(chosen)))

    return run


def pairs_of(examples, b):
    """{(left, right): [(place in the span, label)]} of one row, by place."""
    pairs = {}
    for k in np.flatnonzero(examples.boundary_weights[b]):
        pair = int(examples.left[b, k]), int(examples.right[b, k])
        token = int(examples.offset[b, k]), int(examples.labels[b, k])
        pairs[pair] = sorted([*pairs.get(pair, []), token])
    return pairs


# --------------------------------------------------------------------------- spans and boundaries


def test_boundaries_of_ten_tokens(corrupt_spans):
    """Overlapping and adjacent spans are one; positions of the model are those of the row + 1."""
    cases = [
        ([(2, 3), (4, 5), (7, 7)], {(2, 7): [2, 3, 4, 5], (7, 9): [7]}),
        ([(2, 4), (3, 5)], {(2, 7): [2, 3, 4, 5]}),
        ([(0, 1)], {}),
        ([(8, 9)], {}),
        ([(0, 1), (8, 9), (5, 5)], {(5, 7): [5]}),
        ([(8, 8)], {(8, 10): [8]}),
        ([(1, 1)], {(1, 3): [1]}),
        ([], {}),
        ([(2, 7)], {(2, 9): [2, 3, 4, 5]}),  # the first 4 of a longer span
    ]
    tokens = np.arange(10) + 20
    rows = rows_of([tokens] * len(cases), [10] * len(cases))
    spans = [spans for spans, _ in cases]
    examples = corrupt_spans(rows, spans, **{"objective.boundary_longest": 4})
    for b, (_, expected) in enumerate(cases):
        label = lambda places: [(offset, int(tokens[at])) for offset, at in enumerate(places)]
        assert pairs_of(examples, b) == {pair: label(at) for pair, at in expected.items()}
    unused = examples.boundary_weights == 0
    for field in (examples.left, examples.right, examples.offset):
        assert (field[unused] == 0).all()


def test_boundaries_are_the_originals(original, corrupt_spans):
    """400 rows of 1 to 59 tokens with up to 12 random spans: the same pairs, tokens and places."""
    size = original["size"].astype(int)
    spans = [[pair for pair in row.tolist() if pair[0] >= 0] for row in original["spans"]]
    rows = rows_of(np.tile(np.arange(59) + 5, (len(size), 1)), size)
    examples = corrupt_spans(rows, spans)
    cut = 0
    for b, pairs in enumerate(original["pairs"]):
        expected = {}
        for left, right, *tokens in pairs[pairs[:, 0] >= 0].tolist():
            expected[left + 1, right + 1] = list(enumerate(t for t in tokens if t >= 0))
            cut += right - left > 16
        assert pairs_of(examples, b) == expected
    assert cut >= 20  # some are longer than what is predicted


def test_separators_are_no_boundaries(corrupt_spans):
    """Documents [20, 21, 22] and [23, 24, 25, 26] with a separator behind each, and padding."""
    tokens = [20, 21, 22, SEP, 23, 24, 25, 26, SEP, 27]
    cases = [
        ([(1, 1)], {(1, 3): [(0, 21)]}),
        ([(2, 2)], {}),
        ([(4, 4)], {}),
        ([(5, 6)], {(5, 8): [(0, 24), (1, 25)]}),
        ([(7, 7)], {}),
    ]
    examples = corrupt_spans(rows_of([tokens] * 5, [9] * 5), [spans for spans, _ in cases])
    assert [pairs_of(examples, b) for b in range(5)] == [expected for _, expected in cases]


def test_statistics_are_the_originals(original, build, corrupt):
    """Rows of 510 tokens through the recipe as it is: the means of 3,000 rows against those of
    10,000 of the original, within 5 standard errors of their difference."""
    _, objective = build(**{"data.sequence_length": 513})
    for name, words in (("one", (1,)), ("mixed", (1, 1, 2, 3))):
        begins = np.resize([piece == 0 for size in words for piece in range(size)], 510)
        rows = rows_of(np.full((3000, 510), 7), [510] * 3000, begins * WORD_START)
        examples = jax.tree.map(np.asarray, corrupt(objective, rows))
        assert (examples.corrupted.sum(axis=1) == 77).all()
        ours = np.array([merged_statistics(examples, b) for b in range(3000)])
        error = np.sqrt(ours.var(axis=0) / 3000 + original[f"sd_{name}"] ** 2 / original["runs"])
        distance = (ours.mean(axis=0) - original[f"mean_{name}"]) / error
        assert np.abs(distance).max() < 5, dict(zip(original["names"], distance, strict=True))
        if name == "one":  # 19.6 spans of 4.00 tokens, 99.0 % of them with a pair
            assert original["mean_one"][0] == pytest.approx(19.6, abs=0.1)
            assert (77 / ours[:, 0]).mean() == pytest.approx(4.00, abs=0.06)
            assert ours[:, 1].sum() / ours[:, 0].sum() == pytest.approx(0.990, abs=0.003)


def merged_statistics(examples, b):
    """Spans, those with a pair, of length 1, over 15; tokens with a pair."""
    edges = np.diff(np.pad(examples.corrupted[b], 1).astype(int))
    lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    weights = examples.boundary_weights[b]
    with_pair = len(set(examples.left[b][weights > 0].tolist()))
    return len(lengths), with_pair, sum(lengths == 1), sum(lengths > 15), weights.sum()


def test_a_merged_span_has_one_fate(build, make_rows, corrupt, assert_binomial):
    """As the recipe sets it, and with random tokens in the place of all that is not masked."""
    config, objective = build(**{"objective.mask_rate": 0.3})
    rows = make_rows(config, [32] * 8000)
    knobs = objective.schedule(jnp.int32(0)) | {"random_fraction": jnp.float32(0.2)}
    for changes in (None, knobs):
        examples = jax.tree.map(np.asarray, corrupt(objective, rows, knobs=changes))
        chosen, masked = examples.corrupted, examples.tokens == MASK
        inside = chosen[:, 1:] & chosen[:, :-1]
        assert inside.sum() > 1e4
        assert (masked[:, 1:] == masked[:, :-1])[inside].all()
        first = chosen[:, 1:] & ~chosen[:, :-1]
        assert_binomial(masked[:, 1:][first].sum(), first.sum(), 0.8)
    drawn = chosen & ~masked
    law = np.where(np.arange(V) < 5, 0, np.arange(V) ** 2) / np.sum(np.arange(5, V) ** 2)
    for token, count in enumerate(np.bincount(examples.tokens[drawn], minlength=V)):
        assert_binomial(count, drawn.sum(), law[token], alarm=1e-10)
    # Neighbours are drawn one by one: they agree as often as two independent draws.
    both = drawn[:, 1:] & drawn[:, :-1]
    same = examples.tokens[:, 1:] == examples.tokens[:, :-1]
    assert_binomial(same[both].sum(), both.sum(), np.sum(law**2))


# -------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def untrained(build, make_rows, corrupt, init):
    config, objective = build(**{"model.activation": "gelu_erf", "objective.mask_rate": 0.3})
    examples = corrupt(objective, make_rows(config, [32] * 6 + [20, 3]))
    return objective, examples, jax.tree.map(lambda x: 5 * x, init(objective, examples))


def shapes(objective, examples):
    return jax.eval_shape(objective.model.init, jax.random.key(0), examples)["params"]


def zeros(objective, examples):
    """Parameters that are all 0."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(objective, examples))


def test_terms_by_hand(corrupt_spans, build, terms, total):
    """All parameters are 0 but the two biases: head 1 gives each token the probability 1/64, head 2
    gives token 21 one half and each other one 1/126. Of 10 tokens, 1..3 and 6 have pairs; in the
    other row, none has."""
    rows = rows_of([np.arange(10) + 20] * 2, [10] * 2)
    both = corrupt_spans(rows, [[(1, 3), (6, 6), (9, 9)], [(0, 2), (9, 9)]])
    row = lambda b: jax.tree.map(lambda x: jnp.asarray(x[b : b + 1]), both)
    examples, without = row(0), row(1)
    _, objective = build(**{"data.sequence_length": 13, "objective.boundary_weight": 0.5})
    params = zeros(objective, examples)
    params["boundary_head"]["bias"] = params["boundary_head"]["bias"].at[21].set(math.log(63))
    found = terms(objective, params, examples)
    by_hand = math.log(2) + 3 * math.log(126)
    assert float(found["span_boundary"].sum) == pytest.approx(by_hand, rel=1e-5)
    assert [float(x) for x in found["span_boundary"][1:]] == [4, 0.5, 1.0]
    assert [float(x) for x in found["boundary_accuracy"][:3]] == [1, 4, 0]
    assert float(found["masked_lm"].sum) == pytest.approx(5 * math.log(64), rel=1e-5)
    assert [float(x) for x in found["masked_lm"][1:]] == [5, 1, 0]
    expected = math.log(64) + 0.5 * by_hand / (4 + 1)
    assert float(total(found)) == pytest.approx(expected, rel=1e-5)
    nothing = terms(objective, params, without)["span_boundary"]
    assert (float(nothing.sum), float(nothing.weight)) == (0, 0)


def test_head_is_the_published_one(untrained, terms):
    """Two layers over [left; right; place], the token embeddings and a bias, in plain numpy."""
    objective, examples, params = untrained
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)
    params = params | {"boundary_head": jax.tree.map(draw, params["boundary_head"])}
    found = terms(objective, params, examples)["span_boundary"]
    apply = jax.jit(objective.model.apply, static_argnames="method")
    hidden = np.asarray(apply({"params": params}, examples, method="encode"), np.float64)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head, table = p["boundary_head"], p["encoder"]["embeddings"]["token"]["embedding"]

    def layer(x, dense, norm):
        x = x @ dense["kernel"] + dense["bias"]
        x = x * 0.5 * (1 + scipy.special.erf(x / math.sqrt(2)))
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-12)
        return x * norm["scale"] + norm["bias"]

    nll = 0.0
    for b, k in np.argwhere(np.asarray(examples.boundary_weights)):
        left, right = (hidden[b, int(at[b, k])] for at in (examples.left, examples.right))
        place = head["position"]["embedding"][int(examples.offset[b, k])]
        x = layer(np.concatenate([left, right, place]), head["combine_dense"], head["combine_norm"])
        x = layer(x, head["transform"], head["norm"])
        logits = x @ table.T + head["bias"]
        nll += scipy.special.logsumexp(logits) - logits[int(examples.labels[b, k])]
    assert float(found.weight) > 15
    assert float(found.sum) == pytest.approx(nll, rel=1e-5)


def test_a_prediction_sees_its_two_boundaries_alone(untrained):
    """By gradient to the encoder's output; the boundaries are found by walking out of the span."""
    objective, examples, params = untrained

    @jax.jit
    @jax.grad
    def gradient(hidden, weights):
        def apply(variables, *args, method):
            if method == "encode":
                return hidden
            return objective.model.apply(variables, *args, method=method)

        one = examples._replace(boundary_weights=weights)
        return objective.loss(apply, params, one, {}, None, False)["span_boundary"].sum

    hidden = objective.model.apply({"params": params}, examples, method="encode")
    slots = np.argwhere(np.asarray(examples.boundary_weights))
    assert len(slots) > 15
    for b, k in slots:
        one = jnp.zeros_like(examples.boundary_weights).at[b, k].set(1)
        found = np.argwhere(np.abs(np.asarray(gradient(hidden, one))).sum(axis=-1))
        left = right = int(examples.positions[b, k])
        while examples.corrupted[b, left]:
            left -= 1
        while examples.corrupted[b, right]:
            right += 1
        assert found.tolist() == [[b, left], [b, right]]


def test_both_heads_read_one_pass_with_dropout(build, make_rows, corrupt, init, terms):
    config, objective = build(**{"model.dropout": 0.5})
    examples = corrupt(objective, make_rows(config, [32] * 4))
    params = init(objective, examples)

    def values(seed):
        found = terms(objective, params, examples, None, jax.random.key(seed), True)
        return np.array([float(found[name].sum) for name in ("masked_lm", "span_boundary")])

    assert (values(0) != values(1)).all()


# --------------------------------------------------------------------------------------- notebooks


def test_queries_have_no_boundaries(build, make_rows):
    config, objective = build()
    row = jax.tree.map(lambda x: x[0], make_rows(config, [20], separators=False))
    example = objective.query(row, jnp.asarray([4, 5, 9]))
    assert example.positions.tolist() == [5, 6, 10]
    assert np.flatnonzero(example.tokens == MASK).tolist() == [5, 6, 10]
    for field in (example.left, example.right, example.offset, example.boundary_weights):
        assert field.tolist() == [0, 0, 0]


def test_describe_numbers_spans_and_shows_their_boundaries(corrupt_spans, build):
    rows = rows_of(np.arange(10)[None] + 20, [10])
    example = corrupt_spans(rows, [[(0, 0), (2, 3), (4, 4), (7, 7)]])
    first = lambda tree: jax.tree.map(lambda x: jnp.asarray(x[0]), tree)
    _, objective = build(**{"data.sequence_length": 13})
    shown = objective.describe(None, None, first(rows), first(example))
    assert list(shown.tokens) == ["original", "input", "predicted"]
    assert {name: line.tolist() for name, line in shown.numbers.items()} == {
        "span": [-1, 0, -1, 1, 1, 1, -1, -1, 2, -1, -1, -1, -1],
        "left boundary": [-1, -1, -1, 2, 2, 2, -1, -1, 7, -1, -1, -1, -1],
        "right boundary": [-1, -1, -1, 6, 6, 6, -1, -1, 9, -1, -1, -1, -1],
        "place in span": [-1, -1, -1, 0, 1, 2, -1, -1, 0, -1, -1, -1, -1],
    }


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "size,encoder,head",
    # BERT cased without pooler: 1,526 fewer pieces than the 108,891,648 and 334,092,288 of uncased.
    # The head: 15 x 200 + (2 D + 200) D + D + 2 D + D^2 + D + 2 D, published for D = 768.
    [("base", 107_719_680, 1_930_680), ("large", 332_529_664, 3_359_672)],
)
def test_sizes_are_the_papers(size, encoder, head, vocabulary):
    config = importlib.import_module("configs.span_boundary").get_config(size)
    pieces = config.tokenizer.size
    sized = {**vars(vocabulary), "size": pieces, "unigram_counts": np.ones(pieces)}
    objective = span_boundary.build(config, type(vocabulary)(**sized))
    corrupt = lambda row: objective.corrupt(jax.random.key(0), row, objective.evaluation_knobs)
    rows = rows_of(np.zeros((1, 509)), [509])
    params = shapes(objective, jax.eval_shape(jax.vmap(corrupt), rows))
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert count(params["encoder"]) == encoder
    assert count(params["boundary_head"]) - pieces == head
    assert params["boundary_head"]["bias"].shape == params["head"]["bias"].shape == (pieces,)


def test_the_second_head_keeps_its_layers(build, make_rows, corrupt):
    """Without the masked LM's transform, and with embeddings of another width."""

    def parameters(**overrides):
        config, objective = build(**overrides)
        return shapes(objective, corrupt(objective, make_rows(config, [32])))

    params = parameters(**{"model.head_transform": False})
    assert set(params["head"]) == {"bias"}
    names = {"position", "combine_dense", "combine_norm", "transform", "norm", "bias"}
    assert set(params["boundary_head"]) == names
    head = parameters(**{"model.embedding_width": 8})["boundary_head"]
    assert head["combine_dense"]["kernel"].shape == (232, 16)
    assert head["transform"]["kernel"].shape == (16, 8)


def test_small_differs_from_the_masked_lm_in_the_objective_alone():
    for size in ("tiny", "small"):
        ours, theirs = (
            importlib.import_module(f"configs.{name}").get_config(size).to_dict()
            for name in ("span_boundary", "masked_lm")
        )
        differ = {key for key in ours if ours[key] != theirs[key]}
        assert differ == {"objective"}


@pytest.mark.parametrize(
    "key,value", [("longest", 0), ("width", 0), ("weight", -1.0), ("smooth", -1.0)]
)
def test_mistakes_are_named(key, value, build):
    with pytest.raises(UserError, match=f"config.objective.boundary_{key}={value} is out of range"):
        build(**{f"objective.boundary_{key}": value})
