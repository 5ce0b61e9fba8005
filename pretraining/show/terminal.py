"""An example in a terminal: lines under each other, colours where they are wanted."""

import unicodedata
from collections.abc import Iterator

import numpy as np

from pretraining.show import example
from pretraining.show.example import ANSWER, CHANGED, PLAIN, SPECIAL, Shown

# Parameters of ANSI's "select graphic rendition". Orange and blue differ for every kind of eye.
_STYLES = {PLAIN: "", SPECIAL: "2", CHANGED: "30;48;5;214", ANSWER: "30;48;5;117"}
_UNDERLINED, _NUMBER = "4", "36"
_YES, _NO = "■", "."

_Row = tuple[str, list[str], list[str]]  # a title, n cells and their styles


def text(shown: Shown, width: int = 80, color: bool = False) -> str:
    """The example in lines that fit; a piece that is wider by itself, and prose, do not.

    Args:
      width: columns of the terminal.
      color: with ANSI escapes; without, text alone.
    """
    rows = [*_token_rows(shown), *_number_rows(shown)]
    titles = max(len(title) for title, _, _ in rows) + 2
    columns = [max(map(_width, cells)) for cells in zip(*(row[1] for row in rows), strict=True)]
    out = [f"{shown.name}: {shown.facts}"]
    for band in example.bands([column + 1 for column in columns], width - titles + 1):
        out.append("")
        for title, cells, styles in rows:
            parts = [_paint(cells[i], styles[i] if color else "", columns[i]) for i in band]
            out.append((title.ljust(titles) + " ".join(parts)).rstrip())
    for title, matrix in shown.sees.items():
        out += ["", *_matrix_rows(title, matrix, shown.labels, width)]
    return "\n".join([*out, "", *_legend(shown, color)])


def _token_rows(shown: Shown) -> Iterator[_Row]:
    if shown.numbers:  # which may speak of positions
        n = shown.answered.size
        yield "position", list(map(str, range(n))), [_STYLES[SPECIAL]] * n
    for number, line in enumerate(shown.lines):
        underlined = shown.answered & (number > 0) & line.whole
        styles = [
            ";".join(filter(None, (_STYLES[mark], _UNDERLINED * bool(under))))
            for mark, under in zip(line.marks, underlined, strict=True)
        ]
        yield line.title, line.pieces, styles


def _number_rows(shown: Shown) -> Iterator[_Row]:
    for title, values in shown.numbers.items():
        cells = [str(value) if value >= 0 else "" for value in values]
        yield title, cells, [_NUMBER] * len(cells)


def _matrix_rows(title: str, matrix: np.ndarray, labels: list[str], width: int) -> Iterator[str]:
    """One line for each position that sees; cells touch where they don't fit otherwise."""
    yield f"{title}: {example.MATRIX}"
    n, left = len(labels), max(map(_width, labels))
    fitting = [gap for gap in (" ", "") if left + 1 + n + (n - 1) * len(gap) <= width]
    if not fitting:
        yield f"  {n} columns do not fit here"
        return
    for label, row in zip(labels, matrix, strict=True):
        cells = fitting[0].join(_YES if seen else _NO for seen in row)
        yield f"{' ' * (left - _width(label))}{label} {cells}"


def _legend(shown: Shown, color: bool) -> Iterator[str]:
    if color:
        marks = {mark for line in shown.lines for mark in line.marks}
        parts = [
            f"{_paint(mark, _STYLES[mark])} {meaning}"
            for mark, meaning in example.MEANING.items()
            if mark in marks
        ]
        if shown.answered.any():
            parts.append(f"{_paint('underlined', _UNDERLINED)} {example.ANSWERED}")
        yield "; ".join(parts)
    yield f"{example.SPACE}, {_YES} sees, {_NO} does not see"


def _paint(content: str, style: str, width: int = 0) -> str:
    """Filled up with spaces, which stay unpainted."""
    space = " " * (width - _width(content))
    return f"\x1b[{style}m{content}\x1b[0m{space}" if style and content else content + space


def _width(content: str) -> int:
    """Columns that a terminal gives to it."""
    marks = ("Mn", "Me", "Cf")
    widths = (1 + (unicodedata.east_asian_width(c) in "WF") for c in content)
    return sum(
        width
        for c, width in zip(content, widths, strict=True)
        if unicodedata.category(c) not in marks
    )
