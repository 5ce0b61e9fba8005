"""What a report says of runs that were not done alike."""

import json
import shutil

import numpy as np
import pytest

from experiments.reporting import comparable, context, page, sections, source
from pretraining import config as config_lib
from pretraining.data import tokenizer
from tests.experiments.synthetic import (
    LOSS,
    PLANNED,
    SETTINGS,
    SWEEP,
    faults_of,
    metric_table,
    text_of,
    write_families,
    write_run,
    write_sweep,
    write_table,
)


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


@pytest.fixture
def families(tmp_path):
    return write_families(tmp_path)


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"starts": [{"data": "b" * 64}]},
            "token store: bbbbbbbbbbbb in b-seed0; aaaaaaaaaaaa in the other 2 runs.",
        ),
        ({"starts": [{"commit": "d" * 40}]}, "code (commit): dddddddddd in b-seed0; cccccccccc in"),
        ({"starts": [{}, {"commit": "d" * 40}]}, "cccccccccc, then dddddddddd in b-seed0"),
        ({"starts": [{"commit": "c" * 40 + "+"}]}, "with uncommitted changes: b-seed0"),
        ({"starts": [{"commit": None}]}, "Code of an unknown commit: b-seed0"),
        ({"starts": []}, "token store: unknown in b-seed0"),
        ({"starts": [{"versions": {"jax": "0.11"}}]}, "version of jax: 0.11 in b-seed0; 0.10.2 in"),
        ({"starts": [{"python": "3.12"}]}, "Other Python: 3.12 in b-seed0"),
        ({"starts": [{"devices": [4, "TPU v4"]}]}, "devices: 4 x TPU v4 in b-seed0; 1 x cpu in"),
        ({"starts": [{"cores": 8}]}, "number of cores: 8 in b-seed0; 2 in"),
        ({"starts": [{"processes": 2}]}, "number of processes: 2 in b-seed0"),
        ({"starts": [{"xla_flags": "--x"}]}, "XLA_FLAGS: --x in b-seed0; none in"),
        ({"config": {"train.batch_size": 20}}, "tokens seen: 800,000 in b-seed0; 400,000 in"),
        ({"config": {"data.copies": 2}}, "distinct tokens seen: 200,000 in b-seed0; 400,000 in"),
        ({"config": {"evaluate.rows": 64}}, "Other evaluate.rows: 64 in b-seed0; 512 in"),
        ({"config": {"data.validation": 0.1}}, "Other data.validation: 0.1 in b-seed0"),
        ({"config": {"seed.evaluation": 1}}, "Other seed.evaluation: 1 in b-seed0"),
        (
            {"config": {"objective.evaluation_mask_rate": 0.3}},
            "Other objective.evaluation_mask_rate: 0.3 in b-seed0",
        ),
        (
            {"config": {"objective.unit": "span"}},
            'Other objective.unit: "span" in b-seed0; "absent" in',
        ),
        (
            {"config": {"seed.data": 3}},
            "rows in repetition 0 (seed.data): 0 in a-seed0; 3 in b-seed0",
        ),
        (
            {"config": {"optimizer.learning_rate": 5e-3, "model.layers": 24}},
            'Other model.layers: 24 in b-seed0; "absent" in the other 2 runs.\n'
            'Other optimizer.learning_rate: 0.005 in b-seed0; "absent" in the other 2 runs.',
        ),
        (
            {"ended": {"train/rewinds": 2.0}},
            "batches, times (train/rewinds): 2 in b-seed0.",
        ),
        ({"ended": {"train/skipped": 1.0}}, "not finite (train/skipped): 1 in b-seed0."),
        ({"config": {"guard.rewinds": 3}}, 'Other guard.rewinds: 3 in b-seed0; "absent" in'),
        ({"settings": SETTINGS | {"rows": 1}}, "yardstick (rows): 1 in b-seed0; 64 in"),
        ({"figures": None}, "Yardstick: none in b-seed0; yes in"),
        ({"config": {"train.steps": 500}}, "at their end yet: b-seed0 at step 400 of 500"),
    ],
)
def test_what_is_not_comparable_is_named(changes, told, tmp_path):
    runs = {"a-seed0": {}, "a-seed1": {"config": {"seed.init": 1}}, "b-seed0": changes}
    for name, own in runs.items():
        write_run(tmp_path / name, {400: 5.0}, **{"figures": {"probe/average": 0.5}} | own)
    assert told in faults_of(tmp_path)


def test_what_changes_no_figure_is_no_difference(tmp_path):
    own = {"log.every": 3, "mesh.fsdp": 2, "checkpoint.keep": 1, "evaluate.every": 5}
    own |= {"data.cache": "x", "seed.init": 9, "guard.silence": 9.0}
    for name, config in (("a-seed0", {}), ("b-seed0", own)):
        ended = {"train/rewinds": 0.0, "train/skipped": 0.0}
        write_run(tmp_path / name, {400: 5.0}, config, ended=ended)
    assert faults_of(tmp_path) == ""


def test_runs_of_one_variant_differ_in_seeds_alone(sweep):
    """The question varies the mask rate, but not within p40."""
    change(sweep / "runs" / "p40-seed1" / "config.json", "objective", "mask_rate", 0.3)
    assert "Not one objective.mask_rate in p40: 0.3 in p40-seed1; 0.4 in the" in faults_of(sweep)


def test_a_difference_is_the_questions_own_only_as_a_whole(sweep):
    """Of tokens that differ by steps, which are asked, and by rows of a batch, which are not."""
    planned = {f"{v}-seed{s}": ("done", {"train.steps": 400}) for v in LOSS for s in range(3)}
    planned |= {f"p40-seed{s}": ("done", {"train.steps": 200}) for s in range(3)}
    write_table(sweep, planned)
    for seed in range(3):
        path = sweep / "runs" / f"p40-seed{seed}" / "config.json"
        change(path, "train", "steps", 200)
    told = "Other tokens seen: 200,000 in p40; 400,000 in the other 6 runs."
    assert told in comparable.differences(source.read(sweep))[1]
    for seed in range(3):
        path = sweep / "runs" / f"p40-seed{seed}" / "config.json"
        change(path, "train", "batch_size", 5)
    faults, own = comparable.differences(source.read(sweep))
    assert any(sentence.startswith("Other tokens seen: 100,000 in p40") for sentence in faults)
    assert not any("tokens seen" in sentence for sentence in own)


def test_what_a_recipe_has_of_its_own_is_asked_for(tmp_path):
    """Rotary positions in all runs of one recipe, another learning rate in one run of it."""
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"a-seed{seed}", {400: 5.0}, {"model.position": "learned"})
        own = {"model.position": "rotary"} | ({"optimizer.learning_rate": 1.0} if seed else {})
        write_run(tmp_path / "runs" / f"b-seed{seed}", {400: 5.0}, own)
    write_table(tmp_path, {f"{v}-seed{s}": ("done", {}) for v in "ab" for s in (0, 1)})
    path = tmp_path / "runs.csv"
    path.write_text(
        "\n".join(
            line.replace("x.py", "y.py") if line.startswith("b-") else line
            for line in path.read_text().splitlines()
        )
    )
    faults, own = comparable.differences(source.read(tmp_path))
    assert own == ['Other model.position: "learned" in a; "rotary" in the other 2 runs.']
    assert len([sentence for sentence in faults if "learning_rate" in sentence]) == 2


def test_a_question_that_was_changed_is_named(sweep):
    told = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(
        json.dumps(told | {"planned": PLANNED | {"contrasts": {"p40": "p15"}}})
    )
    asked = sweep.parent / "more" / "sweep.py"
    contrasts = 'CONTRASTS = {"p40": "p15"}'
    asked.write_text(SWEEP + contrasts)
    assert faults_of(sweep) == ""
    first = 'Figure(\n        "yardstick/family/masked_loss", "Loss at 15 %", "lower"'
    assert first in SWEEP
    changed = 'Figure(\n        "yardstick/blimp/accuracy", "BLiMP", "higher"'
    began = "The question was changed after its runs began: "
    for text, what in (
        (SWEEP.replace('"p15"', '"p40"') + contrasts, "BASELINE p15 -> p40."),
        (
            SWEEP + 'CONTRASTS = {"p80": "p40"}',
            "contrast of p40 p15 -> none; contrast of p80 none -> p40.",
        ),
        (
            SWEEP.replace(first, changed) + contrasts,
            "the first metric of FIGURES yardstick/family/masked_loss -> yardstick/blimp/accuracy; "
            "its better lower -> higher.",
        ),
    ):
        asked.write_text(text)
        assert began + what in faults_of(sweep)


def test_runs_that_diverged_are_named(sweep):
    path = sweep / "runs" / "p40-seed1" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"eval/loss": 4.9', '"eval/loss": null'))
    assert "Not finite: eval/loss of p40-seed1 at step 400." in faults_of(sweep)


def change(path, section, key, value):
    config = json.loads(path.read_text())
    config[section][key] = value
    path.write_text(json.dumps(config))


def test_alike_runs_have_nothing_to_name(sweep):
    told = "Other objective.mask_rate: 0.15 in p15; 0.4 in p40; 0.8 in the other 3 runs."
    assert comparable.differences(source.read(sweep)) == ([], [told])


def test_what_the_question_varies_is_not_a_fault(sweep):
    """Two copies of each row: fewer distinct tokens, and the question says so."""
    rated = {v: {"objective.mask_rate": int(v[1:]) / 100} for v in LOSS}
    rows = {f"{v}-seed{s}": ("done", rated[v]) for v in LOSS for s in range(3)}
    for seed in range(3):
        path = sweep / "runs" / f"p40-seed{seed}" / "config.json"
        config = json.loads(path.read_text())
        config["data"]["copies"] = 2
        path.write_text(json.dumps(config))
    told = "Other distinct tokens seen: 200,000 in p40; 400,000 in the other 6 runs."
    assert comparable.differences(source.read(sweep))[0] == [told]
    rows |= {f"p40-seed{s}": ("done", rated["p40"] | {"data.copies": 2}) for s in range(3)}
    write_table(sweep, rows)
    faults, own = comparable.differences(source.read(sweep))
    assert (faults, own[0]) == ([], told)
    assert f"> **Differences that the question itself asks for**\n>\n> - {told}" in text_of(sweep)


def test_objectives_of_their_own_masks_are_not_held_against_each_other(families):
    path = families / "both-seed0" / "config.json"
    config = json.loads(path.read_text())
    config["objective"]["evaluation_mask_rate"] = 0.15
    path.write_text(json.dumps(config))
    told = 'Other objective.evaluation_mask_rate: 0.15 in both-seed0; "absent" in both-seed1.'
    assert told in faults_of(families)
    path = families / "both-seed1" / "config.json"
    path.write_text(json.dumps(config))
    assert "evaluation_mask_rate" not in faults_of(families)


def test_partial_sweep(sweep):
    """One run failed in the middle, one has not begun."""
    shutil.rmtree(sweep / "runs" / "p80-seed2")
    lines = sweep / "runs" / "p80-seed1" / "metrics.jsonl"
    lines.write_text(lines.read_text().splitlines()[0] + "\n")
    shutil.rmtree(sweep / "runs" / "p80-seed1" / "evaluations")
    rows = {f"{v}-seed{s}": ("done", {}) for v in LOSS for s in range(3)}
    write_table(sweep, rows | {"p80-seed1": ("failed", {}), "p80-seed2": ("waiting", {})})
    faults = faults_of(sweep)
    assert "p80-seed2" not in faults
    assert "Failed: p80-seed1." in faults
    assert "p80-seed1 at step 200 of 400" in faults
    assert "Yardstick: none in p80-seed1; yes in the other 7 runs." in faults
    text = text_of(sweep)
    assert "8 runs of 9 planned" in text
    assert "\n\n8 of 9 planned runs so far; missing: p80-seed2.\n\n" in text
    assert metric_table(text, "yardstick/family/masked_loss", "masked")["p80"][:2] == ["1", "5.300"]
    rows = metric_table(text, "yardstick/family/masked_loss", "masked")
    assert "no test" in rows["p80"]
    assert rows["p40"][7] == "0.148"  # .074 x 2: the other contrast is still to come
    assert "verdict" not in rows["variant"]
    assert "No verdicts yet: 2 planned runs lack yardstick/family/masked_loss" in text


@pytest.fixture
def write_trained(tmp_path, small_corpus, small_overrides):
    """(name, recipe, its losses at the end) -> a run folder with config and vocabulary."""
    shared = config_lib.load("configs/masked_lm.py:tiny", small_overrides)
    vocabulary = tokenizer.train(small_corpus.read_text().split("\n\n"), shared.tokenizer)
    vocabulary = vocabulary.with_counts(np.arange(vocabulary.size))

    def write(name, recipe, ended):
        folder = tmp_path / "runs" / name
        config = config_lib.load(f"configs/{recipe}.py:tiny", small_overrides)
        config = config_lib.resolve_durations(config, rows_per_epoch=100)
        ended = {f"train/{name}": value for name, value in ended.items()}
        write_run(folder, {400: 5.0}, ended=ended | {"train/unigram_loss": 5.8})
        (folder / "config.json").write_text(config_lib.to_json(config))
        vocabulary.save(folder / "vocabulary")

    return write


def test_variants_on_the_plateau_are_named(tmp_path, write_trained):
    """By the loss of tokens: that of spans has another term, and its sum lies above."""
    for seed, loss in enumerate((5.76, 5.74, 5.9)):
        write_trained(f"near-seed{seed}", "masked_lm", {"masked_lm": loss})
    write_trained("below-seed0", "masked_lm", {"masked_lm": 5.5})
    write_trained("spans-seed0", "span_boundary", {"masked_lm": 5.5, "loss": 5.8})
    write_trained("stuck-seed0", "span_boundary", {"masked_lm": 5.8, "loss": 11.6})
    write_run(tmp_path / "runs" / "unlike-seed0", {400: 5.0}, ended={"train/unigram_loss": 5.8})
    warnings = {
        block.title: block.items
        for block in sections.blocks(context.make(source.read(tmp_path), None))
        if isinstance(block, page.Warnings)
    }
    end = "stands on the plateau at the unigram loss: its figures say little."
    assert warnings["Variants that have learned little"] == [
        f"near (2 of 3 runs) {end}",
        f"stuck (1 of 1 run) {end}",
        "Not known, as the objective cannot be built: unlike-seed0.",
    ]
    assert "plateau" not in faults_of(tmp_path)
