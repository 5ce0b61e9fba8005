"""Stored evaluation figures, against the run's own and against hand arithmetic."""

import json
import math
import re
import types

import numpy as np
import pytest

import pretraining
from pretraining import evaluate, metrics
from pretraining.config import objective_names
from pretraining.errors import UserError


def run_command(command, folder, *options, devices=1):
    options = [f"--workdir={folder}", *options]
    process = command("pretraining.evaluate", options=options, devices=devices)
    out, err = process.communicate()
    return process.returncode, out, err


def test_terms_of_batches_add_up_before_they_are_divided():
    def term(total, weight, scale=1.0, smooth=0.0):
        return types.SimpleNamespace(sum=total, weight=weight, scale=scale, smooth=smooth)

    parts = [
        {"a": term(6.0, 3.0), "b": term(1.0, 1.0, 0.5, 1.0), "hits": term(2.0, 3.0, 0.0)},
        {"a": term(2.0, 1.0), "b": term(5.0, 1.0, 0.5, 1.0), "hits": term(1.0, 1.0, 0.0)},
    ]
    assert evaluate.combine(parts) == {"a": 2.0, "b": 2.0, "hits": 0.75, "loss": 3.0, "tokens": 4.0}
    nothing = [{"a": term(0.0, 0.0)}]
    assert evaluate.combine(nothing) == {"a": 0.0, "loss": 0.0, "tokens": 0.0}


@pytest.mark.parametrize("objective", objective_names())
def test_the_command_repeats_the_runs_own_figures(objective, trained, command):
    folder = trained[objective]
    code, out, err = run_command(command, folder, "--rows=2")
    assert code == 0, err
    figures = json.loads(out)
    assert figures == json.loads((folder / "evaluations" / "40.json").read_text())
    last = metrics.read(folder / metrics.FILE)[-1]
    terms = [key.removeprefix("eval/") for key in last if re.fullmatch(r"eval/\w+", key)]
    assert {"loss", "accuracy", "unigram_loss"} < set(terms)
    for name in terms:
        np.testing.assert_allclose(figures[name], last[f"eval/{name}"], rtol=1e-6)
    assert figures["uniform_loss"] == math.log(300)
    assert figures["tokens"] > 0
    if objective == "causal_lm":
        assert figures["perplexity"] == math.exp(figures["causal_lm"])
        assert figures["bits_per_byte"] == last["eval/bits_per_byte"]
    else:
        run = pretraining.load(folder)
        assert 1 < figures["pseudo_perplexity"] < run.vocabulary.size * 2


def test_other_devices_than_those_that_trained(trained, command):
    folder = trained["causal_lm"]
    last = metrics.read(folder / metrics.FILE)[-1]
    for devices in (4, 3):  # batches of 8 rows become batches of 9
        code, out, err = run_command(command, folder, devices=devices)
        assert code == 0, err
        np.testing.assert_allclose(json.loads(out)["loss"], last["eval/loss"], rtol=1e-5)


def test_another_corpus_another_step_and_the_moving_average(trained, command, small_corpus):
    folder = trained["masked_lm"]
    code, out, err = run_command(
        command, folder, f"--corpus={small_corpus}", "--step=28", "--ema", "--rows=1"
    )
    assert code == 0, err
    figures = json.loads(out)
    assert (figures["step"], figures["ema"], figures["corpus"]) == (28, True, str(small_corpus))
    (stored,) = [p for p in (folder / "evaluations").iterdir() if p.name.startswith("28-ema-")]
    assert json.loads(stored.read_text()) == figures


@pytest.mark.parametrize(
    "options, message",
    [
        (["--step=3"], "3"),
        (["--step=x"], "--step='x'"),
        (["--corpus=nowhere/*.txt"], "nowhere"),
    ],
)
def test_mistakes(options, message, trained, command):
    code, _, err = run_command(command, trained["causal_lm"], *options)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_the_yardstick_is_stored_in_the_run_folder(trained, command, tmp_path):
    """Its parts are tested in tests/yardstick; here, that all of them arrive."""
    pair = {"UID": "a", "linguistics_term": "binding", "sentence_good": "the", "sentence_bad": "of"}
    for name, lines in (
        ("blimp/blimp.jsonl", [json.dumps(pair)]),
        ("glue/SST-2/train.tsv", ["sentence\tlabel", "the\t1", "of\t0", "is\t0"]),
        ("glue/SST-2/dev.tsv", ["sentence\tlabel", "the\t1", "value " * 99 + "\t0"]),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines))
    folder = trained["masked_lm"]
    options = ["--suite=yardstick", f"--tasks={tmp_path}", "--ema"]
    code, out, err = run_command(command, folder, *options)
    assert code == 0, err
    assert "left out, glue/CoLA, glue/MRPC, glue/RTE, conll2003" in err
    stored = json.loads((folder / "evaluations/40-ema-yardstick-quick.json").read_text())
    assert stored == json.loads(out)
    assert (stored["suite"], stored["step"], stored["ema"]) == ("yardstick", 40, True)
    assert stored["family"] == "masked"
    assert stored["settings"]["cut"] == {"blimp": 0, "sst2": 1}
    assert stored["settings"]["blimp_score"] == "pseudo-likelihood"
    assert set(stored["settings"]["tasks"]) == {
        "blimp/blimp.jsonl",
        "glue/SST-2/train.tsv",
        "glue/SST-2/dev.tsv",
    }
    figures = stored["figures"]
    assert set(figures) == {
        "family/masked_loss",
        "family/pseudo_perplexity",
        "blimp/accuracy",
        "blimp/binding",
        "probe/sst2/majority",
        "probe/sst2/mean",
        "probe/sst2/cls",
    }
    run = pretraining.load(folder, ema=True)
    good, bad = run.score(["the", "of"])
    assert figures["blimp/accuracy"] == figures["blimp/binding"] == float(good > bad)
    assert figures["probe/sst2/majority"] == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"suite": "glue"}, "--suite=glue: there is no such suite"),
        ({"suite": "yardstick", "sample": "half"}, "--sample='half' is not one of quick, full"),
        ({"suite": "yardstick", "tasks": "nowhere"}, "--tasks=nowhere: there is no such folder"),
        ({"suite": "yardstick", "corpus": "x"}, "--corpus=x means nothing with --suite=yardstick"),
        ({"suite": "yardstick", "rows": "3"}, "--rows=3 means nothing with --suite=yardstick"),
        ({"tasks": "nowhere"}, "--tasks=nowhere means nothing without --suite=yardstick"),
        ({"sample": "full"}, "--sample=full means nothing without --suite=yardstick"),
    ],
)
def test_mistakes_of_the_suite_are_told_before_the_run_is_read(options, message):
    given = dict.fromkeys(("corpus", "step", "rows", "suite", "tasks", "sample")) | options
    with pytest.raises(UserError) as error:
        evaluate.main("no run", ema=False, **given)
    assert message in str(error.value)
