"""An example as a picture: rows of boxes, and under them who sees whom.

All is drawn on one axes whose unit is a point, 1/72 inch, from the upper left corner down.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pretraining.show import example
from pretraining.show.example import ANSWER, CHANGED, PLAIN, SPECIAL, Shown

WIDTH = 640  # of the picture
_MARGIN, _GAP, _ROW, _BOX = 12, 14, 19, 15  # _ROW: from row to row, of which a box takes _BOX
_SIZE, _SMALL, _LEAST = 9, 7.5, 4  # of letters; smaller ones than _LEAST cannot be read
_CELL, _MATRIX = 14, 250  # a matrix has cells of _CELL, or is _MATRIX wide
_FONT = "DejaVu Sans"  # matplotlib brings it along

# From the palette of Okabe and Ito, lightened: every kind of eye tells them apart.
_FACES = {PLAIN: "#efefef", SPECIAL: "#efefef", CHANGED: "#f5bd41", ANSWER: "#9fd3f2"}
_OUTLINE, _SEEN, _UNSEEN, _INK, _FAINT = "#0072b2", "#3d7f9f", "#efefef", "#1a1a1a", "#808080"


class _Cell(NamedTuple):
    text: str
    face: str
    ink: str = _INK
    outline: str = "none"


_Row = tuple[str, list[_Cell]]


def figure(shown: Shown):
    """The example as a matplotlib figure, WIDTH points wide and as high as it has to be."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _draw_heading(axes, _MARGIN, _MARGIN, shown.name, shown.facts)
    bottom = _draw_table(axes, shown, _MARGIN + 1.8 * _ROW)
    bottom = _draw_legend(axes, shown, bottom)
    if shown.sees:
        bottom = _draw_matrices(axes, shown, bottom + _GAP)
    axes.set(xlim=(0, WIDTH), ylim=(bottom + _MARGIN, 0))
    figure.set_size_inches(WIDTH / 72, (bottom + _MARGIN) / 72)
    return figure


# ---------------------------------------------------------------------------------- rows of boxes


def _draw_table(axes, shown: Shown, top: float) -> float:
    """Draws the lines and the numbers in bands; the place below."""
    rows = [*_token_rows(shown), *_number_rows(shown)]
    left = _MARGIN + max(_text_width(title) for title, _ in rows) + 10
    texts = zip(*([cell.text for cell in cells] for _, cells in rows), strict=True)
    widths = [max(_BOX, *(_text_width(text) + 6 for text in column)) + 3 for column in texts]
    for band in example.bands(widths, WIDTH - _MARGIN - left):
        for title, cells in rows:
            _write(axes, _MARGIN, top + _ROW / 2, title, color=_FAINT)
            x = left
            for column in band:
                if cells[column].text:
                    _draw_box(axes, x, top + (_ROW - _BOX) / 2, widths[column] - 3, cells[column])
                x += widths[column]
            top += _ROW
        top += _GAP
    return top - _GAP


def _token_rows(shown: Shown) -> Iterator[_Row]:
    if shown.numbers:  # which may speak of positions
        yield "position", [_Cell(str(i), "none", _FAINT) for i in range(shown.answered.size)]
    for number, line in enumerate(shown.lines):
        outlined = shown.answered & (number > 0) & line.whole
        yield (
            line.title,
            [
                _Cell(
                    _drawable(piece),
                    _FACES[mark],
                    _FAINT if mark == SPECIAL else _INK,
                    _OUTLINE if out else "none",
                )
                for piece, mark, out in zip(line.pieces, line.marks, outlined, strict=True)
            ],
        )


def _number_rows(shown: Shown) -> Iterator[_Row]:
    """The larger a number in its line, the darker."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    for title, values in shown.numbers.items():
        low = min(values[values >= 0], default=0)
        shades = 0.08 + 0.5 * (values - low) / max(1, values.max() - low)
        yield (
            title,
            [
                _Cell(str(value) if value >= 0 else "", to_hex(colormaps["YlGn"](shade)))
                for value, shade in zip(values, shades, strict=True)
            ],
        )


def _draw_box(axes, x: float, y: float, width: float, cell: _Cell) -> None:
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (x, y),
        width,
        _BOX,
        boxstyle="round,pad=0,rounding_size=2.5",
        facecolor=cell.face,
        edgecolor=cell.outline,
        linewidth=1.4,
    )
    axes.add_patch(box)
    _write(axes, x + width / 2, y + _BOX / 2, cell.text, color=cell.ink, ha="center")


def _draw_legend(axes, shown: Shown, top: float) -> float:
    """Names the marks that occur; the place below."""
    marks = {mark for line in shown.lines for mark in line.marks}
    entries = [
        (_Cell(" ", _FACES[mark]), meaning)
        for mark, meaning in example.MEANING.items()
        if mark in marks
    ]
    if any(line.whole for line in shown.lines[1:]) and shown.answered.any():
        entries.append((_Cell(" ", _FACES[PLAIN], outline=_OUTLINE), example.ANSWERED))
    x, y = _MARGIN, top + _ROW - _BOX
    for cell, meaning in entries:
        _draw_box(axes, x, y, _BOX, cell)
        _write(axes, x + _BOX + 5, y + _BOX / 2, meaning, size=_SMALL, color=_FAINT)
        x += _BOX + _text_width(meaning, _SMALL) + 20
    _write(axes, x, y + _BOX / 2, example.SPACE, size=_SMALL, color=_FAINT)
    return y + _BOX


# -------------------------------------------------------------------------------- who sees whom


def _draw_matrices(axes, shown: Shown, top: float) -> float:
    """Draws the matrices side by side, at most three in a row; the place below."""
    labels = [_drawable(label) for label in shown.labels]
    slot = (WIDTH - 2 * _MARGIN + _GAP) / min(len(shown.sees), 3)
    cell = min(_CELL, _MATRIX / len(labels))
    margin = _label_margin(labels, cell)
    cell = min(cell, (slot - margin - _GAP) / len(labels))
    height = 2 * _ROW + _label_margin(labels, cell) + cell * len(labels)
    for number, (title, matrix) in enumerate(shown.sees.items()):
        x, y = _MARGIN + number % 3 * slot, top + number // 3 * (height + _GAP)
        _draw_heading(axes, x, y, title, example.MATRIX)
        _draw_matrix(axes, x + margin, y + height - cell * len(labels), cell, matrix, labels)
    return y + height


def _label_margin(labels: list[str], cell: float) -> float:
    size = _label_size(cell)
    return max(_text_width(label, size) for label in labels) + 6 if size >= _LEAST else 0


def _label_size(cell: float) -> float:
    return min(_SMALL, 0.75 * cell)


def _draw_matrix(axes, x: float, y: float, cell: float, matrix: np.ndarray, labels: list[str]):
    from matplotlib.colors import ListedColormap

    edges = np.arange(len(labels) + 1) * cell
    colors = ListedColormap([_UNSEEN, _SEEN])
    axes.pcolormesh(
        x + edges,
        y + edges,
        matrix,
        cmap=colors,
        vmin=0,
        vmax=1,
        edgecolors="w",
        linewidth=cell / 20,
    )
    if (size := _label_size(cell)) < _LEAST:
        return
    for label, place in zip(labels, edges + cell / 2, strict=False):
        _write(axes, x - 4, y + place, label, size=size, ha="right")
        _write(axes, x + place, y - 4, label, size=size, ha="center", va="bottom", rotation=90)


# ------------------------------------------------------------------------------------------ letters


def _draw_heading(axes, x: float, top: float, title: str, facts: str) -> None:
    """Two lines."""
    _write(axes, x, top + 0.4 * _ROW, title, weight="bold")
    _write(axes, x, top + 1.1 * _ROW, facts, size=_SMALL, color=_FAINT)


def _write(axes, x: float, y: float, content: str, size: float = _SIZE, **style) -> None:
    style = {"va": "center_baseline", "color": _INK} | style
    axes.text(x, y, content, fontfamily=_FONT, fontsize=size, parse_math=False, **style)


def _text_width(content: str, size: float = _SIZE) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_FONT, size=size)
    return text_to_path.get_text_width_height_descent(content, font, ismath=False)[0]


def _drawable(content: str) -> str:
    """Characters that the font lacks become boxes."""
    return "".join(c if _font().get_char_index(ord(c)) else "\u25a1" for c in content)


@functools.cache
def _font():
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(_FONT))
