"""The files of a report, and reports of folders that are not whole."""

import html.parser
import itertools
import json
import re
import shutil
import sys

import pandas
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments import report
from experiments.reporting import context, figures, page, sections, source
from pretraining import files
from pretraining.errors import UserError
from tests import running
from tests.experiments.synthetic import (
    START,
    SWEEP,
    metric_table,
    table,
    text_of,
    write_run,
    write_sweep,
    write_table,
)


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


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
    assert "verdict" not in metric_table(text, "yardstick/family/masked_loss", "masked")["variant"]


def test_a_question_that_is_gone_is_told(sweep, capsys):
    told = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(told | {"question": "no/such"}))
    report.main(str(sweep), None, None)
    gone = "The question is gone: there is no no/such/sweep.py."
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {gone} Without it its figures, planned contrasts and verdicts are lost."
    ]
    text = (sweep / "report.md").read_text()
    assert gone in text
    assert "experiments/masking_ratio" not in text


def test_what_is_not_measured_is_told(sweep, capsys):
    """The loss is; of the probes, which decide, and of a family's figure there is no number."""
    asked = sweep.parent / "more" / "sweep.py"
    new = """FIGURES = (
    Figure("yardstick/probe/average", "Probes", "higher"),
    Figure("yardstick/family/bits_per_byte", "Bits", "lower"),"""
    asked.write_text(SWEEP.replace("FIGURES = (", new))
    report.main(str(sweep), None, None)
    probes = (
        "Not measured: Probes (yardstick/probe/average); run again with --tasks=... to have it."
    )
    text = (sweep / "report.md").read_text()
    assert f"\n\n{probes}\n\n" in text
    assert "\n\nNot measured: Bits (yardstick/family/bits_per_byte).\n\n" in text
    assert "Not measured: Loss" not in text
    printed = capsys.readouterr().out
    assert f"\n{probes}\n" in printed
    assert "Not measured: Bits" not in printed
    told = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(told | {"tasks": "tasks"}))
    assert "--tasks=..." not in text_of(sweep)


def test_captions_stand_once(sweep):
    report.main(str(sweep), None, None)
    text = (sweep / "report.md").read_text()
    assert "![Validation loss](figures/" in text
    assert text.count("Validation loss: eval/loss (nats, lower is better) against variant") == 1
    assert "## Loss at 15 % (yardstick/family/masked_loss)\n" in text


def test_numbers_of_one(tmp_path):
    write_run(tmp_path / "a-seed0", {400: 5.0})
    write_run(tmp_path / "b-seed0", {400: 5.0})
    text = text_of(tmp_path)
    assert "2 runs, 2 variants." in text
    assert "; 1 contrast." in text
    shutil.rmtree(tmp_path / "b-seed0")
    assert "1 run, 1 variant." in text_of(tmp_path)


def test_how_it_was_made(sweep):
    told = json.loads((sweep / "sweep.json").read_text())
    told |= {"overrides": {"train.steps": "9"}, "tasks": "my tasks"}
    (sweep / "sweep.json").write_text(json.dumps(told))
    path = sweep / "runs" / "p40-seed1" / "provenance.jsonl"
    later = {"time": "2026-01-02T00:00:00+00:00", "commit": "d" * 40}
    path.write_text(path.read_text() + json.dumps(START | later) + "\n")
    rows = table(text_of(sweep), "## How this was made")
    question = told["question"]
    assert {what: value for what, (value,) in rows.items()} == {
        "what": "value",
        "corpus": "some-text",
        "vocabulary size": "1024",
        "sequence length": "103",
        "commit": f"{'c' * 40}, {'d' * 40}",
        "jax": "0.10.2",
        "Python": "3.11.7",
        "devices": "1 x cpu",
        "cores": "2",
        "first start": "2026-01-01T00:00:00+00:00",
        "last start": "2026-01-02T00:00:00+00:00",
        "command": f"python -m experiments.run {question} --workdir={sweep} --protocol=tiny "
        "'--tasks=my tasks' --config.train.steps=9",
    }


def test_where_the_decision_rule_is(sweep):
    readme = sweep.parent / "more" / "README.md"
    assert f"No decision rule is written down: there is no {readme}." in text_of(sweep)
    readme.write_text("# More\n")
    assert f"The decision rule is in the question's README, {readme}." in text_of(sweep)


def test_axes_of_flops_are_labelled_as_tokens_are():
    """A linear and a logarithmic one; labels do not overlap."""
    look = figures.looks(["a"])
    for least, labels in ((2e9, {"2G", "3G", "4G"}), (1e8, {"100M", "300M", "1G", "3G"})):
        seeds = pandas.DataFrame({"a-seed0": [2.0, 1.0]}, index=[least, 4e9])
        panels = {"tokens": {"a": seeds}, "FLOPs": {"a": seeds}}
        drawn = figures.loss_curves(panels, look, "eval/loss")
        FigureCanvasAgg(drawn).draw()
        axis = drawn.axes[1].xaxis
        shown = [tick.label1 for tick in axis.get_major_ticks() + axis.get_minor_ticks()]
        boxes = {t.get_text(): t.get_window_extent() for t in shown if t.get_text()}
        low, high = drawn.axes[1].get_xlim()
        at = axis.get_majorticklocs()
        assert labels <= set(boxes)
        assert len([place for place in at if low <= place <= high]) <= 6
        edges = sorted((box.x0, box.x1) for box in boxes.values())
        assert all(one[1] < other[0] for one, other in itertools.pairwise(edges))


def test_whole_numbers_have_ticks_where_they_were_measured():
    points = pandas.DataFrame({"place": [1, 3, 10], "value": [1.0, 2.0, 3.0], "variant": "a"})
    curve = figures.Curve("", points)
    drawn = figures.ablation([curve], figures.looks(["a"]), "knob", "loss", "title", ())
    assert list(drawn.axes[0].get_xticks()) == [1, 3, 10]


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
    with pytest.raises(UserError, match="no sweep and no runs here"):
        report.main(str(tmp_path), None, None)
    write_table(tmp_path, {"a-seed0": ("waiting", {}), "a-seed1": ("waiting", {})})
    with pytest.raises(UserError, match="none of its 2 runs has begun"):
        report.main(str(tmp_path), None, None)
    write_run(tmp_path / "runs" / "a-seed0", {})
    write_run(tmp_path / "runs" / "a-seed1", {100: None})
    with pytest.raises(UserError, match="no run of the 2 that have begun has a figure yet"):
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
    assert err == f"error: {tmp_path}: no sweep and no runs here (no */config.json of a run)\n"
