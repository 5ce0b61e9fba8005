"""A new run that starts from a step of another one, or from a folder of transformers."""

import functools
import importlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

import pretraining
from pretraining import checkpoint, export, init_from, metrics, program, run_folder, state, train
from pretraining import config as config_lib
from pretraining.data import prepare, tokenizer
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError
from pretraining.hugging_face import architectures, folder, weights


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def start(command, workdir, overrides, objective="masked_lm"):
    recipe = f"configs/{objective}.py:tiny"
    return command("pretraining.train", recipe, overrides, [f"--workdir={workdir}"])


def test_longer_rows_keep_every_parameter_and_the_first_positions(
    trained, run_overrides, command, tmp_path
):
    """32 -> 48 positions, at a learning rate of zero: nothing but the new positions is new."""
    overrides = run_overrides | {
        "init_from": f"{trained['masked_lm']}@28",
        "tokenizer.model": trained["masked_lm"] / run_folder.VOCABULARY,
        "data.sequence_length": 48,
        "train.steps": 1,
        "optimizer.warmup": 1,  # so that the rate of the only update is 0
    }
    finish(start(command, tmp_path / "longer", overrides))
    old = pretraining.load(trained["masked_lm"], step=28).params
    new = pretraining.load(tmp_path / "longer").params
    table, longer = (p["encoder"]["embeddings"]["position"].pop("embedding") for p in (old, new))
    assert longer.shape == (48, table.shape[1])
    np.testing.assert_array_equal(longer[:32], table)
    assert np.abs(longer[32:]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_with_its_optimizer_a_branch_goes_on_as_the_run_did(
    trained, run_overrides, command, tmp_path
):
    """Parameters come along either way; moments and their counters only with the optimizer."""
    overrides = run_overrides | {
        "init_from": f"{trained['masked_lm']}@28",
        "optimizer.schedule": "constant",
        "optimizer.warmup": 0,
        "train.steps": 1,
    }
    folders = {}
    for name, optimizer in (("with", True), ("without", False)):
        folders[name] = tmp_path / name
        finish(start(command, folders[name], overrides | {"init_optimizer": optimizer}))
    lines = {name: metrics.read(folder / metrics.FILE)[0] for name, folder in folders.items()}
    assert lines["with"]["train/loss"] == lines["without"]["train/loss"]  # same parameters, rows
    assert lines["with"]["train/learning_rate"] == lines["without"]["train/learning_rate"] > 0
    # 28 updates have shaped the moments that came along; the schedule began anew.
    assert counts(folders["with"]) == {"adam": 29, "schedule": 1}
    assert counts(folders["without"]) == {"adam": 1, "schedule": 1}
    with_, without = (pretraining.load(folder).params for folder in folders.values())
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, with_, without)))


def counts(workdir):
    """{"adam", "schedule"}: the counters in the saved optimizer state."""
    config = run_folder.stored_config(workdir)
    built = program.build(config, Vocabulary.load(workdir / run_folder.VOCABULARY))
    saved = checkpoint.Checkpoints(workdir / run_folder.CHECKPOINTS, 1).restore(1, built.state)
    counted = lambda node: isinstance(getattr(node, "count", None), jax.Array)
    nodes = filter(counted, jax.tree.leaves(saved.optimizer, is_leaf=counted))
    return {"adam" if hasattr(node, "mu") else "schedule": int(node.count) for node in nodes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "nowhere"}, "is neither a run"),
        ({"init_from": "{run}@3"}, "3"),
        ({"init_from": "{run}", "model.width": 16}, "(32,) there, (16,) here"),
        ({"init_from": "{run}", "tokenizer.size": 298}, "another tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, trained, run_overrides, command, tmp_path):
    changes = {k: str(v).format(run=trained["masked_lm"]) for k, v in changes.items()}
    process = start(command, tmp_path / "new", run_overrides | changes)
    _, err = process.communicate()
    assert process.returncode == 2
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_leaves_are_matched_by_path_and_all_misfits_are_listed():
    old = {"a": np.zeros((2, 3)), "b": np.zeros(4), "gone": np.zeros(1)}
    new = {"a": jnp.zeros((3, 3)), "b": jnp.zeros(4), "more": jnp.zeros(1)}
    with pytest.raises(UserError) as caught:
        init_from.fit(old, new, "run")
    message = str(caught.value)
    for part in ("a: (2, 3) there, (3, 3) here", "gone: (1,) has no place", "more: missing there"):
        assert part in message
    assert "b:" not in message


def test_schedule_counters_restart_and_moments_counters_stay():
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: 1.0))
    params = {"w": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        carried = optimizer.init(params)
        for _ in range(3):
            _, carried = optimizer.update(params, carried, params)
    adam, schedule = init_from._restart_schedule(carried)
    assert (int(adam.count), int(schedule.count)) == (3, 0)


def test_a_run_keeps_the_step_it_began_from(trained, tmp_path):
    """The source may train on between two starts of the new run."""
    source = trained["masked_lm"]
    config = run_folder.stored_config(source).copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(source)
    assert init_from.adopt(config, tmp_path).init_from == f"{source}@40"
    with config.unlocked():
        config.init_from = f"{source}@28"
    (tmp_path / run_folder.CONFIG).write_text(config_lib.to_json(config))
    with config.unlocked():
        config.init_from = str(source)
    assert init_from.adopt(config, tmp_path).init_from == f"{source}@28"
    assert init_from.adopt(run_folder.stored_config(source), tmp_path).init_from == ""


def test_names_of_steps():
    here = pathlib.Path.cwd()
    assert init_from._parse("runs/a@12") == (here / "runs/a", 12)
    assert init_from._parse("runs/a") == (here / "runs/a", None)
    assert init_from._parse("me@host/a") == (here / "me@host/a", None)


def test_nothing_is_done_without_a_source():
    begun = object()
    assert init_from.start(ConfigDict(dict(init_from="")), begun, None) is begun


# From a folder in the layout of transformers.


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported") / "hf"
    export.export(pretraining.load(trained["masked_lm"]), place)
    return place


def test_a_folder_of_transformers_is_taken_with_its_tokenizer(
    exported, trained, run_overrides, command, tmp_path
):
    """At a learning rate of zero nothing but the new positions is new; then the folder may go."""
    shutil.copytree(exported, tmp_path / "hf")
    overrides = run_overrides | {
        "init_from": tmp_path / "hf",
        "data.sequence_length": 48,
        "train.steps": 1,
        "optimizer.warmup": 1,
    }
    del overrides["tokenizer.size"]
    out = finish(start(command, tmp_path / "new", overrides))
    assert "BertForMaskedLM" in out
    config = run_folder.stored_config(tmp_path / "new")
    assert config.init_from == config.tokenizer.model == str(tmp_path / "hf")
    old = pretraining.load(trained["masked_lm"])
    for ema, rounding in ((False, 0), (True, 1e-6)):
        new = pretraining.load(tmp_path / "new", ema=ema)
        before = jax.tree.map(np.copy, old.params)
        tables = [p["encoder"]["embeddings"]["position"] for p in (before, new.params)]
        tables[1]["embedding"] = tables[1]["embedding"][: len(tables[0]["embedding"])]
        equal = functools.partial(np.testing.assert_allclose, rtol=rounding)
        jax.tree.map(equal, new.params, before)
    text = "the value returns a list"
    assert new.vocabulary.encode(text) == old.vocabulary.encode(text)
    shutil.rmtree(tmp_path / "hf")
    finish(start(command, tmp_path / "new", overrides))
    assert run_folder.stored_config(tmp_path / "new") == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.width": 16}, "--config.model.width=32"),
        ({"model.layers": 1, "model.mlp_width": 32}, "--config.model.layers=2"),
        ({"init_optimizer": True}, "without an optimizer"),
        ({"tokenizer.model": "{other}"}, "is another tokenizer"),
    ],
)
def test_a_folder_of_another_network_is_refused(
    changes, message, exported, run_overrides, small_corpus, tmp_path
):
    text = small_corpus.read_text().split("\n\n")
    other = config_lib.load("configs/masked_lm.py:tiny", run_overrides | {"tokenizer.size": 299})
    tokenizer.train(text, other.tokenizer).save(tmp_path)
    changes = {
        k: str(v).format(other=tmp_path / "tokenizer.model") if k == "tokenizer.model" else v
        for k, v in changes.items()
    }
    overrides = run_overrides | {"init_from": str(exported)} | changes
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    with pytest.raises(UserError) as caught:
        init_from.adopt(config, tmp_path / "new")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_its_own_tokenizer_may_be_named(exported, trained, run_overrides, tmp_path):
    """The model that the folder's tokenizer was made from is the same vocabulary."""
    own = trained["masked_lm"] / run_folder.VOCABULARY / "tokenizer.model"
    overrides = run_overrides | {"init_from": str(exported), "tokenizer.model": str(own)}
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    assert init_from.adopt(config, tmp_path / "new").tokenizer.model == str(own)


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(
    exported, trained, run_overrides, tmp_path
):
    own = trained["masked_lm"] / run_folder.VOCABULARY / "tokenizer.model"
    (tmp_path / "hf").mkdir()
    for name in (folder.CONFIG, folder.TENSORS):
        shutil.copy(exported / name, tmp_path / "hf" / name)
    overrides = run_overrides | {"init_from": str(tmp_path / "hf")}
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    with pytest.raises(UserError, match="holds no tokenizer"):
        init_from.adopt(config, tmp_path / "new")
    config = config_lib.load("configs/masked_lm.py:tiny", overrides | {"tokenizer.model": str(own)})
    assert init_from.adopt(config, tmp_path / "new").tokenizer.model == str(own)


def rewrite(place, change):
    """Changes the tensors of a folder."""
    tensors = folder.read_tensors(place)
    change(tensors)
    written = folder.read_config(place)
    shutil.rmtree(place)
    folder.write(place, written, tensors)


def drop(tensors):
    del tensors["bert.embeddings.LayerNorm.bias"]


def add(tensors):
    tensors["bert.encoder.layer.0.more"] = np.ones(2, np.float32)


def shorten(tensors):
    tensors["cls.predictions.bias"] = tensors["cls.predictions.bias"][1:].copy()


def add_segments(tensors):
    tensors["bert.embeddings.token_type_embeddings.weight"] += 1


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, "lacks the tensors bert.embeddings.LayerNorm.bias"),
        (add, "tensors without a place here: bert.encoder.layer.0.more"),
        (shorten, "'cls.predictions.bias' is (299,) instead of (300,)"),
        (add_segments, "wants --config.model.segments=1"),
        (None, "only pytorch_model.bin"),
    ],
)
def test_wrong_tensors_are_refused_before_the_corpus_is_read(
    change, message, exported, trained, run_overrides, tmp_path, monkeypatch
):
    shutil.copytree(exported, tmp_path / "hf")
    if change:
        rewrite(tmp_path / "hf", change)
    else:
        (tmp_path / "hf" / folder.TENSORS).rename(tmp_path / "hf" / "pytorch_model.bin")
    own = trained["masked_lm"] / run_folder.VOCABULARY / "tokenizer.model"
    overrides = {"init_from": str(tmp_path / "hf"), "tokenizer.model": str(own)}
    assert message in refused(run_overrides | overrides, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "bert-base-uncased"}, "'bert-base-uncased' is neither a run (config.json"),
        ({"init_from": "bert-base-uncased@3"}, "is neither a run"),
        ({"init_from": "gs://bucket/run"}, "--config.init_from=gs://bucket/run: a mounted folder"),
        ({"init_from": "{exported}", "train.batch_size": 0}, "train.batch_size=0 is out of range"),
        ({"init_from": "{run}@3"}, "3"),
        ({"init_from": "{run}", "model.width": 16}, "(32,) there, (16,) here"),
    ],
)
def test_sources_are_refused_before_the_corpus_is_read(
    changes, message, exported, trained, run_overrides, tmp_path, monkeypatch
):
    places = {"exported": exported, "run": trained["masked_lm"]}
    changes = changes | {"init_from": changes["init_from"].format(**places)}
    assert message in refused(run_overrides | changes, tmp_path, monkeypatch)


def refused(overrides, place, monkeypatch) -> str:
    def prepared(*_, **__):
        raise AssertionError("it went on to prepare the corpus")

    monkeypatch.setattr(prepare, "prepare", prepared)
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    with pytest.raises(UserError) as caught:
        train.main(config, str(place / "new"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_tokenizer_is_refused_with_the_one_to_take(trained, run_overrides):
    config = config_lib.load("configs/masked_lm.py:tiny", run_overrides)
    with config.unlocked():
        config.init_from = f"{trained['masked_lm']}@28"
    own = trained["masked_lm"] / run_folder.VOCABULARY
    with pytest.raises(UserError) as caught:
        init_from.parameters(config, {}, tokenizer.stand_in(300))
    assert str(caught.value).endswith(f"--config.tokenizer.model={own}")
    assert tokenizer.load_model(own).fingerprint == Vocabulary.load(own).fingerprint


def test_a_network_that_sees_both_sides_starts_no_other_kind(exported, run_overrides, tmp_path):
    """Their tensors have the same names."""
    overrides = run_overrides | {"init_from": str(exported)}
    config = config_lib.load("configs/causal_lm.py:tiny", overrides)
    with pytest.raises(UserError, match="is_decoder=False: it sees both sides"):
        init_from.adopt(config, tmp_path / "new")
    shutil.copytree(exported, tmp_path / "hf")
    written = folder.read_config(exported) | {"is_decoder": True}
    (tmp_path / "hf" / folder.CONFIG).write_text(json.dumps(written))
    overrides = run_overrides | {"init_from": str(tmp_path / "hf")}
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    with pytest.raises(UserError, match="is_decoder=True: it sees the left alone"):
        init_from.adopt(config, tmp_path / "new")


def test_stores_are_prepared_with_the_tokenizer_of_the_folder(exported, run_overrides, capsys):
    overrides = run_overrides | {"init_from": str(exported), "tokenizer.size": 299}
    assert prepare.main(config_lib.load("configs/masked_lm.py:tiny", overrides), False) == 0
    place = pathlib.Path(capsys.readouterr().out.splitlines()[1].split()[-1])
    assert Vocabulary.load(place / "vocabulary").size == 300


def test_what_a_source_does_is_shown(
    exported, trained, run_overrides, small_corpus, tmp_path, monkeypatch
):
    """Before the first step, with the folder's vocabulary and parameters, or those of a run."""
    command = importlib.import_module("pretraining.show.__main__")
    documents = small_corpus.read_text().split("\n\n")
    monkeypatch.setattr(prepare.corpus.python_docs, "documents", lambda: documents)
    old = pretraining.load(trained["masked_lm"])
    own = {"tokenizer.model": str(trained["masked_lm"] / run_folder.VOCABULARY)}
    for source in ({"init_from": str(exported)}, {"init_from": str(old.folder)} | own):
        overrides = run_overrides | {"data.cache": str(tmp_path)} | source
        run = command.untrained(config_lib.load("configs/masked_lm.py:tiny", overrides))
        jax.tree.map(np.testing.assert_array_equal, run.params, old.params)
        assert run.vocabulary.pieces(range(300)) == old.vocabulary.pieces(range(300))


def begin(recipe, overrides):
    """(config, objective, state, vocabulary) before the first step."""
    config = config_lib.resolve_durations(config_lib.load(recipe, overrides), 100)
    vocabulary = tokenizer.stand_in(config.tokenizer.size)
    built = program.build(config, vocabulary)
    begun = state.init(built.objective, built.optimizer, config, built.mesh)
    return config, built.objective, begun, vocabulary


def write(place, objective, params, vocabulary, keep=lambda name: True):
    for key, network in objective.hugging_face.items():
        name = network.architectures[0]
        own = traverse_util.flatten_dict(jax.device_get(network.take(params)), sep="/")
        entries = architectures.ARCHITECTURES[name].weights(network.config)
        tensors = weights.to_tensors(entries, own, network.config)
        tensors = {name: tensor for name, tensor in tensors.items() if keep(name)}
        written = architectures.describe(name, network.config, vocabulary)
        folder.write(place / key, written, tensors)


def started_from(place, config, begun, vocabulary):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(place)
    return init_from.start(config, begun, vocabulary)


def other_numbers(params):
    return jax.tree.map(lambda leaf: leaf + 1, params)


def test_a_source_that_is_gone_before_the_first_save(small_overrides, tmp_path):
    config, _, begun, vocabulary = begin("configs/masked_lm.py:tiny", small_overrides)
    with pytest.raises(UserError, match="is neither a run"):
        started_from(tmp_path / "gone", config, begun, vocabulary)


def test_an_encoder_alone_starts_with_a_new_head(small_overrides, tmp_path, capsys):
    config, objective, begun, vocabulary = begin("configs/masked_lm.py:tiny", small_overrides)
    source = other_numbers(begun.params)
    write(tmp_path / "hf", objective, source, vocabulary, lambda name: name.startswith("bert."))
    params = started_from(tmp_path / "hf", config, begun, vocabulary).params
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], source["encoder"])
    jax.tree.map(np.testing.assert_array_equal, params["head"], begun.params["head"])
    printed = capsys.readouterr().out
    assert "no head: it starts anew" in printed
    assert printed.count("\n") == 1


ELECTRA = {"model.activation": "gelu_erf", "objective.sharing": "token"}


def test_both_networks_of_electra_or_one(small_overrides, tmp_path):
    recipe = "configs/replaced_token_detection.py:tiny"
    config, objective, begun, vocabulary = begin(recipe, small_overrides | ELECTRA)
    source = other_numbers(begun.params)
    write(tmp_path / "hf", objective, source, vocabulary)
    params = started_from(tmp_path / "hf", config, begun, vocabulary).params
    jax.tree.map(np.testing.assert_array_equal, params, source)
    one = started_from(tmp_path / "hf" / "discriminator", config, begun, vocabulary).params
    for part in ("encoder", "head"):
        jax.tree.map(np.testing.assert_array_equal, one[part], source[part])
    for part in ("generator", "generator_head"):
        jax.tree.map(np.testing.assert_array_equal, one[part], begun.params[part])
    # The generator reads the discriminator's tokens, which are not those that it came with.
    with pytest.raises(UserError, match=r"the generator shares.*token/embedding"):
        started_from(tmp_path / "hf" / "generator", config, begun, vocabulary)
