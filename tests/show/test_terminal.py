"""Every line of the terminal, letter by letter."""

import re

import numpy as np

from pretraining import show


def test_plain_text(corrupted):
    assert show.text(corrupted, 60) == "\n".join(
        [
            "name: seed 0",
            "",
            "position   0     1  2    3      4",
            "original   [CLS] ·a ·man s      ·ran",
            "input      [CLS] ·a ·a   [MASK] ·ran",
            "predicted           ·man s      ·ran",
            "rank                12   0      7",
            "",
            "content: who (row) may see whom (column)",
            " [CLS] ■ . . . .",
            "    ·a ■ ■ . . .",
            "    ·a ■ ■ ■ . .",
            "[MASK] ■ ■ ■ ■ .",
            "  ·ran ■ ■ ■ ■ ■",
            "",
            "· a space, ■ sees, . does not see",
        ]
    )


def test_colors_mark_what_changed_and_what_is_answered(corrupted):
    painted = show.text(corrupted, 60, color=True).split("\n")
    orange, blue, under = "30;48;5;214", "30;48;5;117", "4"
    sgr = lambda style, text: f"\x1b[{style}m{text}\x1b[0m"
    dim = sgr("2", "[CLS]")
    assert painted[3] == f"original   {dim} ·a ·man s      ·ran"
    changed = sgr(f"{orange};{under}", "·a"), sgr(f"{orange};{under}", "[MASK]")
    assert painted[4] == f"input      {dim} ·a {changed[0]}   {changed[1]} {sgr(under, '·ran')}"
    answers = f"{sgr(blue, '·man')} {sgr(blue, 's')}      {sgr(blue, '·ran')}"
    assert painted[5] == f"predicted           {answers}"
    assert f"{sgr(orange, 'changed')} differs from the first line" in painted[-2]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in painted]
    assert [*plain[:-2], plain[-1]] == show.text(corrupted, 60).split("\n")


def test_long_lines_wrap_to_the_width(make):
    ids = ["▁a", "▁man", "s", "▁ran"] * 12
    shown = make({"input": ids, "same": ids}, sees={"sees": np.ones((48, 48), bool)})
    for width in (30, 53, 100):
        lines = show.text(shown, width).split("\n")
        bands = [line for line in lines if line.startswith("input  ")]
        assert max(map(len, bands)) <= width
        assert " ".join(line[7:] for line in bands).split() == ["·a", "·man", "s", "·ran"] * 12
        assert len(bands[0]) + len(" ·man") > width  # no band ends before it is full
    # A matrix: with gaps, without, not at all.
    assert "\n  ·a " + " ".join("■" * 48) in show.text(shown, 100)
    assert "\n  ·a " + "■" * 48 in show.text(shown, 99)
    assert "\n  ·a " + "■" * 48 in show.text(shown, 53)
    assert "48 columns do not fit" in show.text(shown, 52)


def test_columns_are_as_wide_as_a_terminal_draws_them(make):
    shown = make({"input": ["名前", "▁a"], "other": ["▁a", "▁a"]})
    lines = show.text(shown, 40).split("\n")
    assert lines[2:4] == ["input  名前 ·a", "other  ·a   ·a"]


def test_without_numbers_or_matrices_nothing_speaks_of_positions(make):
    lines = show.text(make({"input": ["▁a"]}), 40).split("\n")
    assert lines == ["name: seed 0", "", "input  ·a", "", "· a space, ■ sees, . does not see"]
