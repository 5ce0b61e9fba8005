"""The report of sweeps that are written by hand, so that every number in it is known."""

import html.parser
import json
import re
import shutil
import sys

import pytest

from experiments import report
from experiments.reporting import comparable, context, figures, metrics, page, sections, source
from pretraining import files
from pretraining.errors import UserError
from tests import running
from tests.experiments.synthetic import SETTINGS, write_run, write_table

SWEEP = '''"""Is more better?

More text.
"""
from experiments.question import Figure, Protocol, Published, Run, repeat

PROTOCOLS = {"tiny": Protocol("seconds")}
BASELINE = "p15"
MNLI = Published("MNLI", "accuracy (%)", "A paper, table 1", {0.15: 84.2, 0.4: 84.5})
FIGURES = (
    Figure(
        "yardstick/family/masked_loss", "Loss at 15 %", "lower", "objective.mask_rate",
        published=(MNLI,),
    ),
    Figure("eval/loss", "Validation loss", "lower"),
)


def runs(protocol):
    for rate in (15, 40, 80):
        yield from repeat(f"p{rate}", "x.py", {"objective.mask_rate": rate / 100}, 3)
'''
# Loss at the end by variant and seed. Differences to p15: p40 -.1 -.2 -.3, p80 +.3 +.4 +.5.
LOSS = {"p15": (5.0, 5.1, 5.2), "p40": (4.9, 4.9, 4.9), "p80": (5.3, 5.5, 5.7)}


@pytest.fixture
def sweep(tmp_path):
    """A finished sweep with its question."""
    asked = tmp_path / "more"
    asked.mkdir()
    (asked / "sweep.py").write_text(SWEEP)
    folder = tmp_path / "R"
    rows = {}
    for variant, losses in LOSS.items():
        rate = int(variant[1:]) / 100
        for seed, loss in enumerate(losses):
            name = f"{variant}-seed{seed}"
            figures = {"family/masked_loss": loss, "blimp/accuracy": loss / 10}
            figures |= {"blimp/binding": 0.6, "blimp/ellipsis": 0.7}
            losses_by_step = {200: loss + 1, 400: loss}
            config = {"objective.mask_rate": rate, "seed.init": seed}
            write_run(folder / "runs" / name, losses_by_step, config, figures=figures)
            rows[name] = ("done", {"objective.mask_rate": rate, "seed.init": seed})
    write_table(folder, rows)
    told = {"question": str(asked), "protocol": "tiny", "overrides": {}, "tasks": ""}
    (folder / "sweep.json").write_text(json.dumps(told))
    return folder


def table(text, first):
    """{first cell: the other cells} of the Markdown table that follows `first`."""
    lines = text[text.index(first) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            return rows
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name.strip("-"):
            rows[name] = cells
    return rows


def text_of(folder, baseline=None):
    return page.markdown(sections.blocks(context.make(source.read(folder), baseline)))


def faults_of(folder):
    return "\n".join(comparable.differences(source.read(folder))[0])


# ----------------------------------------------------------------------------------------- numbers


def test_table_of_the_ablated_metric(sweep):
    """t = 2 / (1 / sqrt(3)) and 4 / (1 / sqrt(3)): p = 1 - t / sqrt(t^2 + 2), the smaller twice."""
    rows = table(text_of(sweep), "### yardstick/family/masked_loss: masked")
    assert rows["p15"] == ["3", "5.100", "0.1", "", "", "", "", "", "", ""]
    half = 0.1 * 4.302653 / 3**0.5
    for name, mean, sd, difference, p, holm, decided in (
        ("p40", "4.900", "0", -0.2, "0.074", "0.074", "not told apart"),
        ("p80", "5.500", "0.2", 0.4, "0.020", "0.040", "higher"),
    ):
        interval = f"{difference - half:+.3g} to {difference + half:+.3g}"
        against = ["p15", f"{difference:+.3g}"]
        cells = ["3", mean, sd, *against, interval, p, holm, "3 of 3", decided]
        assert rows[name][:2] == cells[:2]
        assert float(rows[name][2]) == pytest.approx(float(sd), abs=1e-9)
        assert rows[name][3:] == cells[3:]


def test_costs(sweep):
    rows = table(text_of(sweep), "## Variants and what they took")
    assert rows["p40"] == ["3", "400", "400k", "400k", "8.00e+11", "5.0 min", "67%"]
    rates = table(text_of(sweep), "of it that made steps.")
    assert rates["objective.mask_rate"] == ["0.15", "0.4", "0.8"]


def test_verdicts_stand_on_the_first_metric_alone(sweep):
    text = text_of(sweep)
    assert table(text, "### yardstick/family/masked_loss: masked")["variant"][-1] == "verdict"
    for other in ("### eval/loss: hidden", "## yardstick/blimp/accuracy"):
        assert table(text, other)["variant"][-1] == "alike"


def test_contrasts_of_the_question(sweep):
    """p80 - p40: .4, .6, .8."""
    asked = sweep.parent / "more" / "sweep.py"
    asked.write_text(SWEEP + '\nCONTRASTS = {"p40": "p15", "p80": "p40"}\n')
    rows = table(text_of(sweep), "### yardstick/family/masked_loss: masked")
    assert rows["p40"][3:5] == ["p15", "-0.2"]
    assert rows["p80"][3:5] == ["p40", "+0.6"]
    assert "Contrasts: p40 against p15; p80 against p40." in text_of(sweep)


def test_captions_tell_what_could_be_found_and_of_how_many_items(sweep):
    """Both have differences with an sd of .1; t(.9875, 2) = 6.205347 from a table."""
    text = text_of(sweep)
    assert round(6.205347 * 0.1 / 3**0.5, 2) == 0.36
    assert "2 contrasts. With the spread seen, a difference of 0.36 (p" in text
    assert "Measured on 512 rows of held-out text." in text
    assert "Measured on at most 20 pairs of each paradigm." in text


def test_another_baseline(sweep):
    """It was not planned: there are tests, and no verdicts."""
    rows = table(text_of(sweep, "p80"), "### yardstick/family/masked_loss: masked")
    assert rows["p80"][3:5] == ["", ""]
    assert rows["p15"][3:5] == ["p80", "-0.4"]
    assert rows["p15"][7] == "0.040"
    assert "verdict" not in rows["variant"]
    with pytest.raises(UserError, match="--baseline=p90: no run is of it; there are p15, p40, p80"):
        text_of(sweep, "p90")


def test_matched_views(tmp_path):
    """The second takes 2,000 FLOPs a token, the first 1,000, and has 300 steps, not 400.

    Tokens: both reached 300k, where the first is at 6 - 1/2 and the second at 5. FLOPs: the first
    reached .4e9 x 1,000, which is step 200 of the second.
    """
    write_run(tmp_path / "a-seed0", {200: 6.0, 400: 5.0}, step_flops=1e6)
    short = {"train.steps": 300}
    write_run(tmp_path / "b-seed0", {100: 7.0, 200: 5.5, 300: 5.0}, short, step_flops=2e6)
    write_run(tmp_path / "dead-seed0", {100: 7.0}, step_flops=2e6)
    text = text_of(tmp_path)
    tokens = text[: text.index("Matched tokens: eval/loss at 300k tokens")]
    rows = table(tokens[tokens.rindex("| variant") :], "|")
    assert (rows["a"][1], rows["b"][1], rows["b"][4]) == ("5.500", "5.000", "-0.5")
    assert rows["variant"] == ["n", "mean", "sd", "against", "difference"]
    assert "No tests: a trained further, so the schedule of the learning rate is not" in text
    assert "Left out, as not at their end: dead-seed0." in text
    flops = text[: text.index("Matched FLOPs: eval/loss at 4.00e+08 FLOPs")]
    rows = table(flops[flops.rindex("| variant") :], "|")
    assert (rows["a"][1], rows["b"][1], rows["b"][4]) == ("5.000", "5.500", "+0.5")
    assert "No tests: b trained further" in text


def test_matched_views_of_runs_that_ended_together(sweep):
    text = text_of(sweep)
    assert "Matched tokens: all whole runs were last evaluated at 400k tokens" in text
    assert "Matched FLOPs: all whole runs were last evaluated at 8.00e+11 FLOPs" in text


def test_blimp_by_phenomenon(sweep):
    rows = table(text_of(sweep), "## BLiMP by phenomenon")
    assert rows["variant"] == ["binding", "ellipsis"]
    assert rows["p15"] == ["0.600", "0.700"]


# ---------------------------------------------------------------------------------------- families


@pytest.fixture
def families(tmp_path):
    """Two objectives, each of a family of its own, with two seeds."""
    for seed in (0, 1):
        for name, family, metric in (
            ("both", "masked", "family/masked_loss"),
            ("left", "causal", "family/bits_per_byte"),
            ("third", "third", "family/bits_per_byte"),
        ):
            values = {metric: 2.0 + seed, "blimp/accuracy": 0.5 + seed / 10}
            folder, config = tmp_path / f"{name}-seed{seed}", {"objective.name": name}
            write_run(folder, {400: 3.0 + seed}, config, figures=values, family=family)
    return tmp_path


def test_families_are_not_ranked(families):
    text = text_of(families)
    for metric, kinds, sections_of in (
        ("yardstick/family/bits_per_byte", "families", {"left": "causal", "third": "third"}),
        ("eval/loss", "objectives", {"both": "both", "left": "left", "third": "third"}),
    ):
        assert f"{metric} is not ranked across {kinds}" in text
        for variant, label in sections_of.items():
            rows = table(text, f"### {metric}: {label}")
            assert list(rows) == ["variant", variant]
    shared = table(text, "## yardstick/blimp/accuracy")
    assert list(shared) == ["variant", "both", "left", "third"]
    names = {
        block.name
        for block in sections.blocks(context.make(source.read(families), None))
        if isinstance(block, page.Picture)
    }
    assert {"curves-both", "curves-left", "curves-third"} <= names


def test_runs_of_no_family_are_compared_with_nobody(tmp_path):
    for variant, family in (("a", "masked"), ("b", ""), ("c", "")):
        figures = {"family/masked_loss": 2.0, "blimp/accuracy": 0.5}
        write_run(tmp_path / f"{variant}-seed0", {400: 3.0}, figures=figures, family=family)
    frame = context.make(source.read(tmp_path), None).frame
    found = metrics.groups(frame, "yardstick/family/masked_loss")
    assert {label: list(runs.variant) for label, runs in found.items()} == {"masked": ["a"]}


def test_how_sentences_are_judged_is_told(tmp_path):
    kinds = {"a": "likelihood", "b": "detection", "c": "likelihood"}
    for variant, kind in kinds.items():
        settings = SETTINGS | {"blimp_score": kind}
        figures = {"blimp/accuracy": 0.5}
        write_run(tmp_path / f"{variant}-seed0", {400: 3.0}, figures=figures, settings=settings)
    assert "not judged alike here: by detection in b; likelihood in a, c." in text_of(tmp_path)
    assert "blimp_score" not in faults_of(tmp_path)


def test_figures_of_families_stand_in_the_report_if_the_question_asks(sweep):
    asked = sweep.parent / "more" / "sweep.py"
    asked.write_text(SWEEP.replace("yardstick/family/masked_loss", "yardstick/blimp/accuracy"))
    assert "family/masked_loss" not in text_of(sweep)


def test_a_loss_that_the_question_does_not_show_compares_between_equal_settings_alone(sweep):
    assert list(table(text_of(sweep), "### eval/loss: hidden")) == ["variant", "p15", "p40", "p80"]
    asked = sweep.parent / "more" / "sweep.py"
    asked.write_text(SWEEP.replace('Figure("eval/loss", "Validation loss", "lower"),', ""))
    text = text_of(sweep)
    assert "eval/loss is not ranked across objectives, nor settings" in text
    assert list(table(text, "### eval/loss: hidden, mask_rate=0.4")) == ["variant", "p40"]


def test_evaluations_of_other_units_are_not_ranked(tmp_path):
    """Two variants have one objective; the third masks spans."""
    for variant, config in (
        ("a", {"objective.unit": "token"}),
        ("b", {"objective.unit": "token", "optimizer.learning_rate": 0.4}),
        ("c", {"objective.unit": "span"}),
    ):
        figures = {"family/masked_loss": 4.0}
        write_run(tmp_path / f"{variant}-seed0", {400: 5.0}, config, figures=figures)
    text = text_of(tmp_path)
    assert "eval/loss is not ranked across objectives, nor settings of one that may change" in text
    assert list(table(text, "### eval/loss: hidden, unit=token")) == ["variant", "a", "b"]
    assert list(table(text, "### eval/loss: hidden, unit=span")) == ["variant", "c"]
    assert list(table(text, "## yardstick/family/masked_loss")) == ["variant", "a", "b", "c"]


def test_one_family_is_not_lectured(sweep):
    text = text_of(sweep)
    assert "is not ranked" not in text
    assert "of different kinds" not in text


def test_runs_without_a_yardstick_stand_in_no_family(families):
    write_run(families / "new-seed0", {400: 3.0}, {"objective.name": "both"})
    of = context.make(source.read(families), None)
    for metric in ("yardstick/family/masked_loss", "yardstick/family/bits_per_byte"):
        assert "new-seed0" not in {
            n for g in metrics.groups(of.frame, metric).values() for n in g.index
        }
    assert "new-seed0" in metrics.groups(of.frame, "eval/loss")["both"].index


# ------------------------------------------------------------------------------------ comparability


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
    for name, config in (("a-seed0", {}), ("b-seed0", own | {"data.cache": "x", "seed.init": 9})):
        write_run(tmp_path / name, {400: 5.0}, config)
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
    assert "Missing: p80-seed2." in faults
    assert "Failed: p80-seed1." in faults
    assert "p80-seed1 at step 200 of 400" in faults
    assert "Yardstick: none in p80-seed1; yes in the other 7 runs." in faults
    text = text_of(sweep)
    assert "8 runs of 9 planned" in text
    assert table(text, "### yardstick/family/masked_loss: masked")["p80"][:2] == ["1", "5.300"]
    rows = table(text, "### yardstick/family/masked_loss: masked")
    assert "no test" in rows["p80"]
    assert rows["p40"][7] == "0.148"  # .074 x 2: the other contrast is still to come
    assert "verdict" not in rows["variant"]
    assert "No verdicts yet: 2 planned runs lack yardstick/family/masked_loss" in text


# -------------------------------------------------------------------------------------------- files


class Reader(html.parser.HTMLParser):
    """Collects what a browser would fetch, and the tags that are open."""

    def __init__(self):
        super().__init__()
        self.sources, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_files(sweep, tmp_path, capsys):
    output = tmp_path / "out"
    assert report.main(str(sweep), None, str(output)) == 0
    assert not (sweep / "report.html").exists()
    text, whole = (output / "report.md").read_text(), (output / "report.html").read_text()
    pictures = re.findall(r"!\[.*?\]\((figures/.*?\.png)\)", text)
    assert len(pictures) == 4  # two of the question, the curves, BLiMP by phenomenon
    for name in pictures:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (output / name).with_suffix(".svg").read_bytes()
    reader = Reader()
    reader.feed(whole)
    assert not reader.open
    assert len(reader.sources) == 4
    assert all(value.startswith("data:image/svg+xml;base64,") for value in reader.sources)
    assert not re.search(r"url\(|@import|<script|https?:", whole)
    assert "A paper, table 1" in text
    printed = capsys.readouterr().out
    assert re.search(r"^p80 +3 +5\.500 +0\.2 +p15 +\+0\.4 ", printed, re.M)
    assert str(output) in printed


def test_text_cannot_break_the_page():
    blocks = [page.Heading(1, "<script>"), page.Table(("a|b", "c"), [("<b>", "&")], "<i>")]
    whole = page.page(blocks, {})
    assert not re.search("<script>|<b>|<i>|&<", whole)
    assert "| a\\|b | c |" in page.markdown(blocks)


@pytest.mark.parametrize("moment", ["drawing", "writing"])
def test_an_interrupted_report_leaves_the_old_one_whole(moment, sweep, monkeypatch):
    report.main(str(sweep), None, None)
    before = {path: path.read_bytes() for path in sweep.glob("**/*") if path.is_file()}
    line = sweep / "runs" / "p80-seed0" / "metrics.jsonl"
    line.write_text(line.read_text().replace("5.3", "5.4"))
    write = files.write_atomically

    def interrupted(path, content):
        if path.name == "report.html":
            raise KeyboardInterrupt
        write(path, content)

    def undrawn(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "drawing":
            patch.setattr(page, "draw", undrawn)
        else:
            patch.setattr(files, "write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report.main(str(sweep), None, None)
    changed = {path for path in before if path.read_bytes() != before[path]}
    assert sweep / "report.html" not in changed
    assert (sweep / "report.md" in changed) == (moment == "writing")
    assert moment == "writing" or changed == {line}
    report.main(str(sweep), None, None)
    assert b"5.533" in (sweep / "report.html").read_bytes()  # (5.4 + 5.5 + 5.7) / 3
    assert not list(sweep.glob("**/.*"))


def test_the_same_runs_give_the_same_files(sweep):
    report.main(str(sweep), None, None)
    before = {path: path.read_bytes() for path in sweep.glob("**/*") if path.is_file()}
    report.main(str(sweep), None, None)
    assert {path: path.read_bytes() for path in sweep.glob("**/*") if path.is_file()} == before


def test_a_variant_looks_the_same_everywhere_and_unlike_all_others():
    looks = figures.looks([f"v{i}" for i in range(30)])
    assert len({(look.colour, look.dash) for look in looks.values()}) == 30
    assert looks["v1"] == figures.looks(["v0", "v1"])["v1"]


def test_heatmap_is_in_percent(sweep):
    (drawn,) = (
        block.figure
        for block in sections.blocks(context.make(source.read(sweep), None))
        if isinstance(block, page.Picture) and block.name == "blimp-by-phenomenon"
    )
    assert [text.get_text() for text in drawn.axes[0].texts] == ["60", "70"] * 3


# ----------------------------------------------------------------------------------- other folders


def test_without_its_question(sweep):
    """Its figures against the one key that differs, and it says so; no verdicts."""
    (sweep / "sweep.json").unlink()
    (sweep / "runs.csv").unlink()
    text = text_of(sweep)
    assert "There is no sweep.json: the question is not known." in text
    assert "Drawn: eval/loss against objective.mask_rate, yardstick/family/masked_loss" in text
    assert "figures/1-yardstick-family-masked-loss-masked.png" in text
    assert "Contrasts: p40, p80 against p15." in text
    assert "verdict" not in table(text, "### yardstick/family/masked_loss: masked")["variant"]


def test_a_question_that_is_gone_is_told(sweep):
    told = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(told | {"question": "no/such"}))
    assert "The question cannot be read: question 'no/such': no such folder" in text_of(sweep)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("sweep.json", "{", "sweep.json is damaged"),
        ("sweep.json", "{}", "sweep.json is damaged: it has no question"),
        ("runs.csv", "a,b\n1,2\n", "runs.csv is damaged: line 2: the columns are not name"),
        ("runs/p15-seed0/metrics.jsonl", "x\n", "metrics.jsonl line 1 is damaged"),
    ],
)
def test_damage_is_named(name, text, told, sweep):
    (sweep / name).write_text(text)
    with pytest.raises(UserError, match=told) as error:
        report.main(str(sweep), None, None)
    assert "\n" not in str(error.value)
    assert not (sweep / "report.html").exists()


def test_nothing_to_report_is_told(tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        report.main(str(tmp_path / "nowhere"), None, None)
    with pytest.raises(UserError, match="there are no runs in it"):
        report.main(str(tmp_path), None, None)
    write_table(tmp_path, {"a-seed0": ("waiting", {}), "a-seed1": ("waiting", {})})
    with pytest.raises(UserError, match="none of its 2 runs has begun"):
        report.main(str(tmp_path), None, None)
    write_run(tmp_path / "runs" / "a-seed0", {})
    write_run(tmp_path / "runs" / "a-seed1", {100: None})
    with pytest.raises(UserError, match="none of the 2 runs that have begun has a figure yet"):
        report.main(str(tmp_path), None, None)


def test_report_in_the_place_of_a_file(sweep):
    with pytest.raises(UserError, match="a folder is needed, and that is a file"):
        report.main(str(sweep), None, str(sweep / "runs.csv"))


def test_a_sweep_that_has_a_yardstick_alone_is_reported(tmp_path, capsys):
    """Its only figure is that of one task, which is in no table with a test."""
    write_run(tmp_path / "a-seed0", {400: None}, figures={"probe/sst2/mean": 0.7})
    assert report.main(str(tmp_path), None, None) == 0
    assert table((tmp_path / "report.md").read_text(), "## Probes by task")["a"] == ["0.700"]
    assert "The report is in" in capsys.readouterr().out


def test_command(tmp_path):
    process = running.start([sys.executable, "-m", "experiments.report", str(tmp_path)])
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == f"error: {tmp_path}: there are no runs in it (no */config.json)\n"
