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
    assert rows["p15"] == ["3", "5.100", "0.1", "baseline", "", "", "", "", ""]
    half = 0.1 * 4.302653 / 3**0.5
    for name, mean, sd, difference, p, holm, decided in (
        ("p40", "4.900", "0", -0.2, "0.074", "0.074", "no"),
        ("p80", "5.500", "0.2", 0.4, "0.020", "0.040", "higher"),
    ):
        interval = f"{difference - half:+.3g} to {difference + half:+.3g}"
        cells = ["3", mean, sd, f"{difference:+.3g}", interval, p, holm, "3 of 3", decided]
        assert rows[name][:2] == cells[:2]
        assert float(rows[name][2]) == pytest.approx(float(sd), abs=1e-9)
        assert rows[name][3:] == cells[3:]


def test_costs(sweep):
    rows = table(text_of(sweep), "## Variants and what they took")
    assert rows["p40"] == ["3", "400", "400k", "400k", "8.00e+11", "6.7 min", "50%"]
    rates = table(text_of(sweep), "that made steps.")
    assert rates["objective.mask_rate"] == ["0.15", "0.4", "0.8"]


def test_another_baseline(sweep):
    rows = table(text_of(sweep, "p80"), "### eval/loss: hidden")
    assert rows["p80"][3] == "baseline"
    assert rows["p15"][3] == "-0.4"
    with pytest.raises(UserError, match="--baseline=p90: no run is of it; there are p15, p40, p80"):
        text_of(sweep, "p90")


def test_matched_views(tmp_path):
    """The second takes 2,000 FLOPs a token, the first 1,000, and ends at step 300 of 400.

    Tokens: both reached 300k, where the first is at 6 - 1/2 and the second at 5. FLOPs: the first
    reached .4e9 x 1,000, which is step 200 of the second.
    """
    write_run(tmp_path / "a-seed0", {200: 6.0, 400: 5.0}, step_flops=1e6)
    write_run(tmp_path / "b-seed0", {100: 7.0, 200: 5.5, 300: 5.0}, step_flops=2e6)
    text = text_of(tmp_path)
    tokens = text[: text.index("Matched tokens: eval/loss at 300k tokens")]
    rows = table(tokens[tokens.rindex("| variant") :], "|")
    assert (rows["a"][1], rows["b"][1], rows["b"][3]) == ("5.500", "5.000", "-0.5")
    flops = text[: text.index("Matched FLOPs: eval/loss at 4.00e+08 FLOPs")]
    rows = table(flops[flops.rindex("| variant") :], "|")
    assert (rows["a"][1], rows["b"][1], rows["b"][3]) == ("5.000", "5.500", "+0.5")


def test_matched_views_of_runs_that_ended_together(sweep):
    text = text_of(sweep)
    assert "Matched tokens: all these runs were last evaluated at 400k tokens" in text
    assert "Matched FLOPs: all these runs were last evaluated at 8.00e+11 FLOPs" in text


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
    assert "likelihoods of different kinds: exact in some, pseudo in others" in text
    names = {
        block.name
        for block in sections.blocks(context.make(source.read(families), None))
        if isinstance(block, page.Picture)
    }
    assert {"curves-both", "curves-left", "curves-third"} <= names


def test_evaluations_of_other_units_are_not_ranked(tmp_path):
    """Two variants are evaluated alike, whatever their mask rate; the third on spans."""
    for variant, config in (
        ("a", {"objective.unit": "token"}),
        ("b", {"objective.unit": "token", "objective.mask_rate": 0.4}),
        ("c", {"objective.unit": "span"}),
    ):
        figures = {"family/masked_loss": 4.0}
        write_run(tmp_path / f"{variant}-seed0", {400: 5.0}, config, figures=figures)
    text = text_of(tmp_path)
    assert "eval/loss is not ranked across objectives, nor settings of one that change" in text
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
        ({"config": {"evaluate.rows": 64}}, "evaluation (evaluate.rows): 64 in b-seed0; 512 in"),
        ({"config": {"data.validation": 0.1}}, "evaluation (data.validation): 0.1 in b-seed0"),
        ({"config": {"seed.evaluation": 1}}, "evaluation (seed.evaluation): 1 in b-seed0"),
        (
            {"config": {"objective.evaluation_mask_rate": 0.3}},
            "evaluation_mask_rate): 0.3 in b-seed0",
        ),
        (
            {"config": {"objective.unit": "span"}},
            '(objective.unit): "span" in b-seed0; "absent" in',
        ),
        (
            {"config": {"seed.data": 3}},
            "rows in repetition 0 (seed.data): 0 in a-seed0; 3 in b-seed0",
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


def test_alike_runs_have_nothing_to_name(sweep):
    assert comparable.differences(source.read(sweep)) == ([], [])


def test_what_the_question_varies_is_not_a_fault(sweep):
    """Two copies of each row: fewer distinct tokens, and the question says so."""
    rows = {f"{v}-seed{s}": ("done", {"data.copies": 1}) for v in LOSS for s in range(3)}
    for seed in range(3):
        path = sweep / "runs" / f"p40-seed{seed}" / "config.json"
        config = json.loads(path.read_text())
        config["data"]["copies"] = 2
        path.write_text(json.dumps(config))
    told = "Other distinct tokens seen: 200,000 in p40; 400,000 in the other 6 runs."
    assert comparable.differences(source.read(sweep)) == ([told], [])
    rows |= {f"p40-seed{seed}": ("done", {"data.copies": 2}) for seed in range(3)}
    write_table(sweep, rows)
    assert comparable.differences(source.read(sweep)) == ([], [told])
    assert f"> **Differences that the question itself asks for**\n>\n> - {told}" in text_of(sweep)


def test_objectives_of_their_own_masks_are_not_held_against_each_other(families):
    path = families / "both-seed0" / "config.json"
    config = json.loads(path.read_text())
    config["objective"]["evaluation_mask_rate"] = 0.15
    path.write_text(json.dumps(config))
    told = '(objective.evaluation_mask_rate): 0.15 in both-seed0; "absent" in both-seed1.'
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
    assert "no test" in table(text, "### yardstick/family/masked_loss: masked")["p80"]


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
    assert len(pictures) == 3  # the question's, the curves, BLiMP by phenomenon
    for name in pictures:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (output / name).with_suffix(".svg").read_bytes()
    reader = Reader()
    reader.feed(whole)
    assert not reader.open
    assert len(reader.sources) == 3
    assert all(value.startswith("data:image/svg+xml;base64,") for value in reader.sources)
    assert not re.search(r"url\(|@import|<script|https?:", whole)
    assert "A paper, table 1" in text
    printed = capsys.readouterr().out
    assert re.search(r"^p80 +3 +5\.500 +0\.2 +\+0\.4 ", printed, re.M)
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
    """The loss against the one key that differs, and it says so."""
    (sweep / "sweep.json").unlink()
    (sweep / "runs.csv").unlink()
    text = text_of(sweep)
    assert "There is no sweep.json: the question is not known." in text
    assert "Drawn: eval/loss against objective.mask_rate." in text
    assert "figures/0-eval-loss-hidden.png" in text
    assert "baseline: p15" in text


def test_a_question_that_is_gone_is_told(sweep):
    told = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(told | {"question": "no/such"}))
    assert "The question cannot be read: question 'no/such': no such folder" in text_of(sweep)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("sweep.json", "{", "sweep.json is damaged"),
        ("sweep.json", "{}", "sweep.json is damaged: KeyError: 'question'"),
        ("runs.csv", "a,b\n1,2\n", "runs.csv is damaged: KeyError: 'name'"),
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
