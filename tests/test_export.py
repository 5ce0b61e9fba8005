"""Runs written in the layout of `transformers`: what opens there gives our logits and ids."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretraining
from pretraining import checkpoint, export, predict, program, run_folder
from pretraining import config as config_lib
from pretraining.data import tokenizer
from pretraining.errors import UserError
from pretraining.hugging_face import architectures, checks, folder, tokenizers

GPT2 = {
    "model.norm_order": "pre",
    "model.embedding_norm": False,
    "model.head_transform": False,
    "model.head_bias": False,
}
ERF = {"model.activation": "gelu_erf"}

# case: (recipe, overrides, {folder: (class, auto class)})
CASES = {
    "bert": (
        "masked_lm",
        {"model.segments": 2, "model.dtype": "bfloat16"},
        {"": ("BertForMaskedLM", "AutoModelForMaskedLM")},
    ),
    "roberta": (
        "masked_lm",
        {"model.position_offset": 1, "model.position_rows": 40} | ERF,
        {"": ("RobertaForMaskedLM", "AutoModelForMaskedLM")},
    ),
    "bert_causal": ("causal_lm", {}, {"": ("BertLMHeadModel", "AutoModelForCausalLM")}),
    "gpt2": ("causal_lm", GPT2, {"": ("GPT2LMHeadModel", "AutoModelForCausalLM")}),
    "spanbert": ("span_boundary", {}, {"": ("BertForMaskedLM", "AutoModelForMaskedLM")}),
    "xlnet": ("permutation_lm", {}, {"": ("XLNetLMHeadModel", "XLNetLMHeadModel")}),
    "electra": (
        "replaced_token_detection",
        ERF,
        {
            "discriminator": ("ElectraForPreTraining", "ElectraForPreTraining"),
            "generator": ("ElectraForMaskedLM", "ElectraForMaskedLM"),
        },
    ),
}
TEXTS = ["the value returns a list of each object.", "A string with\nthe Value, é"]


@pytest.fixture(scope="session")
def vocabulary(small_corpus, small_overrides):
    config = config_lib.load("configs/masked_lm.py:tiny", small_overrides)
    trained = tokenizer.train(small_corpus.read_text().split("\n\n"), config.tokenizer)
    return trained.with_counts(np.arange(trained.size))


@pytest.fixture(scope="session")
def make_run(vocabulary, small_overrides, tmp_path_factory):
    """(recipe, overrides) -> the folder of a run of one step, with large random parameters."""

    def make(recipe, overrides):
        config = config_lib.load(f"configs/{recipe}.py:tiny", small_overrides | overrides)
        config = config_lib.resolve_durations(config, rows_per_epoch=100)
        built = program.build(config, vocabulary)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), built.state)
        begun = zeros.replace(params=_draw(zeros.params))
        place = tmp_path_factory.mktemp(recipe) / "run"
        checkpoints = checkpoint.Checkpoints(place / run_folder.CHECKPOINTS, keep=1)
        with contextlib.closing(checkpoints):
            checkpoints.save(1, begun)
        run_folder.record(place, config, vocabulary, "data", 1)
        return place

    return make


def _draw(params):
    """No two leaves are alike, so that none can be mistaken for another."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(middle + 0.1 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


@pytest.fixture(scope="session")
def exported(make_run, tmp_path_factory):
    """{case: (run, folder, lines)}."""
    found = {}
    for case, (recipe, overrides, _) in CASES.items():
        run = pretraining.load(make_run(recipe, overrides))
        place = tmp_path_factory.mktemp("exported") / case
        found[case] = run, place, export.export(run, place)
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_recordedis_written_with_its_class_and_provenance(case, exported):
    run, place, lines = exported[case]
    for key, (name, _) in CASES[case][2].items():
        written = folder.read_config(place / key)
        assert written["architectures"] == [name]
        assert written["vocab_size"] == run.vocabulary.size
        record = json.loads((place / key / export.PROVENANCE).read_text())
        assert record["step"] == 1
        assert record["config"]["objective"]["name"] == CASES[case][0]
        assert any(line.startswith(name) for line in lines)
    assert lines[-1] == f"written to {place}"
    assert [path.name for path in place.parent.iterdir()] == [case]


def test_what_the_class_has_no_place_for_is_said(exported):
    _, place, lines = exported["spanbert"]
    assert any("left out" in line and "span boundary" in line for line in lines)
    assert not any("left out" in line for line in exported["bert"][2])
    assert json.loads((place / export.PROVENANCE).read_text())["left_out"]


# What users do, in a process that knows nothing of this project.
OPEN = """
import json, sys
import numpy as np, torch, transformers
transformers.utils.logging.disable_progress_bar()
out = {}
for case, folder, auto, texts in json.loads(sys.argv[1]):
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding="longest", return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    out[f"{case}/class"] = np.array(type(model).__name__)
    out[f"{case}/mask"] = batch["attention_mask"].numpy()
    out[f"{case}/ids"], out[f"{case}/logits"] = batch["input_ids"].numpy(), logits.numpy()
np.savez(sys.argv[2], **out)
"""


@pytest.fixture(scope="session")
def opened(exported, tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    work = [
        (f"{case}/{key}", str(exported[case][1] / key), auto, TEXTS)
        for case in CASES
        for key, (_, auto) in CASES[case][2].items()
    ]
    place = tmp_path_factory.mktemp("opened")
    command = [sys.executable, "-c", OPEN, json.dumps(work), "out.npz"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(place / "out.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case, key", [(case, key) for case in CASES for key in CASES[case][2]])
def test_transformers_gives_our_ids_and_logits(case, key, opened, exported):
    run, name = exported[case][0], f"{case}/{key}"
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.dtype = "float32"
    objective = config_lib.build_objective(config, run.vocabulary)
    rows = [predict.text_row(run.vocabulary, text, run.payload) for text in TEXTS]
    rows = jax.tree.map(lambda *x: np.stack(x), *rows)
    example = jax.vmap(objective.query)(rows, np.zeros((len(TEXTS), 0), np.int32))
    ours = objective.hugging_face[key].logits(objective.model.apply, run.params, example)
    assert str(opened[f"{name}/class"]) == CASES[case][2][key][0]
    mask, ids, theirs = (opened[f"{name}/{part}"] for part in ("mask", "ids", "logits"))
    for row, length in enumerate(np.asarray(example.length)):
        valid = mask[row].astype(bool)
        assert ids[row][valid].tolist() == example.tokens[row, :length].tolist()
        np.testing.assert_allclose(theirs[row][valid], ours[row, :length], atol=1e-4)
    assert mask.sum(axis=1).min() < mask.shape[1]  # one row was padded


# What is refused.


def test_a_recordedthat_no_class_holds_is_refused_with_the_reasons(make_run, tmp_path):
    overrides = {"model.norm": "rmsnorm", "model.gated": True, "model.position": "rotary"}
    run = pretraining.load(make_run("masked_lm", overrides))
    with pytest.raises(UserError) as caught:
        export.export(run, tmp_path / "out")
    message = str(caught.value)
    for part in (
        "BertForMaskedLM",
        "RobertaForMaskedLM",
        "norm='rmsnorm'",
        "gated=True",
        "'rotary'",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_networks_are_written_as_far_as_a_class_holds_them(make_run, tmp_path):
    """ELECTRA's generator has a head of a fixed activation, the discriminator has not."""
    run = pretraining.load(make_run("replaced_token_detection", {"model.activation": "gelu_tanh"}))
    lines = export.export(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["discriminator"]
    assert any(line.startswith("generator is not written") and "gelu_erf" in line for line in lines)


def test_a_folder_that_holds_something_stays_as_it_is(exported, tmp_path):
    run = exported["bert"][0]
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export.export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    empty = tmp_path / "empty"
    empty.mkdir()
    export.export(run, empty)
    assert (empty / folder.TENSORS).exists()


@pytest.mark.parametrize("name, message", [("file/out", "cannot be written"), ("link", "exists")])
def test_places_that_cannot_be_written_cost_one_line(name, message, exported, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"--output={tmp_path / name} {message}"):
        export.export(exported["bert"][0], tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_url_is_refused(exported):
    with pytest.raises(UserError, match="--output=gs://bucket/hf: a mounted folder is needed"):
        export.export(exported["bert"][0], "gs://bucket/hf")


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    def write_full(place, *_):
        place.mkdir(parents=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "write", write_full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export.export(exported["bert"][0], tmp_path / "new" / "newer" / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_filled_meanwhile_stays_as_it_is(exported, tmp_path, monkeypatch):
    check = checks.check

    def check_slowly(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "note").write_text("mine")
        return check(*arguments)

    monkeypatch.setattr(checks, "check", check_slowly)
    with pytest.raises(UserError, match="cannot be written: Directory not empty"):
        export.export(exported["bert"][0], tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note"]


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_run_without_provenance_is_refused(content, exported, tmp_path):
    shutil.copytree(exported["bert"][0].folder, tmp_path / "run")
    provenance = tmp_path / "run" / run_folder.PROVENANCE
    provenance.unlink()
    if content is not None:
        provenance.write_text(content)
    with pytest.raises(UserError, match=f"{provenance} is missing or damaged"):
        export.export(pretraining.load(tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_logits_of_one_row_at_a_time_are_compared(exported):
    """All positions of a row of a large vocabulary fill the memory as it is."""
    run, place, _ = exported["gpt2"]
    network, rows = run.objective.hugging_face[""], []

    def logits(apply, params, example):
        rows.append(example.tokens.shape[0])
        return network.logits(apply, params, example)

    objective = run.objective._replace(hugging_face={"": network._replace(logits=logits)})
    sample = checks.sample(objective, run.vocabulary, run.payload)
    recorded = objective.hugging_face[""]
    checks.check(place, "GPT2LMHeadModel", objective, recorded, run.params, sample)
    assert set(rows) == {1}


def test_what_is_read_back_differently_is_refused(exported, tmp_path, monkeypatch):
    write = folder.write

    def write_damaged(place, written, tensors):
        name = next(name for name in tensors if name.endswith("query.weight"))
        write(place, written, tensors | {name: tensors[name] + np.float32(1e-6)})

    monkeypatch.setattr(folder, "write", write_damaged)
    with pytest.raises(UserError, match=r"read back as others: encoder/layer_0/attention/query"):
        export.export(exported["bert"][0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "case, wrong",
    [
        ("bert", ("/query/", "/key/")),
        ("xlnet", ("/attention_norm/", "/mlp_norm/")),
        ("gpt2", {"layer_norm_epsilon": 0.1}),
    ],
)
def test_a_wrong_map_or_config_is_refused(case, wrong, exported, tmp_path, monkeypatch):
    """What agrees with itself, and not with the class, is found by opening the class."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    name = CASES[case][2][""][0]
    right = architectures.ARCHITECTURES[name]
    if isinstance(wrong, dict):
        changed = right._replace(extra=lambda config: wrong)
    else:
        changed = right._replace(weights=lambda config: swap(right.weights(config), *wrong))
    monkeypatch.setitem(architectures.ARCHITECTURES, name, changed)
    with pytest.raises(UserError, match=f"the logits of {name} differ by"):
        export.export(exported[case][0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def swap(entries, one, other):
    exchange = {one: other, other: one}
    turn = lambda path: re.sub(f"{one}|{other}", lambda match: exchange[match[0]], path)
    return [entry._replace(ours=tuple(map(turn, entry.ours))) for entry in entries]


def test_another_tokenizer_is_refused(exported, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write = tokenizers.write

    def write_reversed(place, vocabulary, before, after, **more):
        write(place, vocabulary, after, before, **more)

    monkeypatch.setattr(tokenizers, "write", write_reversed)
    with pytest.raises(UserError, match="AutoTokenizer reads"):
        export.export(exported["bert"][0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(exported, tmp_path, command):
    """--step and --ema choose what is written; mistakes are one line."""
    place = exported["bert_causal"][0].folder
    options = [f"--workdir={place}", f"--output={tmp_path / 'out'}"]
    out, err = command("pretraining.export", options=[*options, "--step=1"]).communicate()
    assert f"written to {tmp_path / 'out'}" in out, err
    _, err = command("pretraining.export", options=[*options, "--ema"]).communicate()
    assert err.startswith("error: ")
    assert "ema" in err
