"""A report as blocks, and the blocks as Markdown and as one HTML file that needs no network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure


class Heading(NamedTuple):
    """Level 1 is the title."""

    level: int
    text: str


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Warnings(NamedTuple):
    """A list that wants to be seen."""

    title: str
    items: Sequence[str]


class Table(NamedTuple):
    """Text cells; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


class Picture(NamedTuple):
    """A figure, not drawn yet.

    Attributes:
      name: of its files, without ending.
      title: what stands in its place where it is not shown.
      caption: what is to be seen, with the number of seeds.
      figure: of matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: Figure


Block = Heading | Text | Warnings | Table | Picture


def draw(picture: Picture) -> dict[str, bytes]:
    """{"png", "svg": the file}; the same figure gives the same bytes."""
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            file = io.BytesIO()
            picture.figure.savefig(file, format=kind, dpi=150, metadata=metadata)
            files[kind] = file.getvalue()
    return files


def markdown(blocks: Sequence[Block], figures: str = "figures") -> str:
    """The blocks as Markdown, with the pictures in a folder beside it."""
    return "\n\n".join(_markdown(block, figures) for block in blocks) + "\n"


def page(blocks: Sequence[Block], drawn: Mapping[str, bytes]) -> str:
    """The blocks as one HTML file, with everything in it.

    Args:
      drawn: {name of a picture: its SVG}.
    """
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block, drawn) for block in blocks)
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


# --------------------------------------------------------------------------------------- Markdown


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Warnings(title, items):
            return "\n".join([f"> **{title}**", ">", *(f"> - {item}" for item in items)])
        case Table(header, rows, caption):
            lines = [_cells(header), "|" + "---|" * len(header), *map(_cells, rows)]
            return "\n".join(lines) + f"\n\n*{caption}*"
        case Picture(name, title, caption):
            return f"![{title}]({figures}/{name}.png)\n\n*{caption}*"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# ------------------------------------------------------------------------------------------- HTML


def _html(block: Block, drawn: Mapping[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Warnings(title, items):
            listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
            return f"<aside><strong>{html.escape(title)}</strong><ul>{listed}</ul></aside>"
        case Table(header, rows, caption):
            lines = [_row(header, "th"), *(_row(row, "td") for row in rows)]
            inner = f"<caption>{html.escape(caption)}</caption>{''.join(lines)}"
            return f'<div class="wide"><table>{inner}</table></div>'
        case Picture(name, title, caption):
            source = "data:image/svg+xml;base64," + base64.b64encode(drawn[name]).decode()
            image = f'<img alt="{html.escape(title)}" src="{source}">'
            return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _row(cells: Sequence[str], tag: str) -> str:
    first, *rest = (html.escape(cell) for cell in cells)
    return f"<tr><th>{first}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in rest)}</tr>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --ground: #fff; --line: #ccc; --mark: #fff3cd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --ground: #161616; --line: #444; --mark: #3d3210; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 70rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
aside { background: var(--mark); padding: .6rem 1rem; margin: 1rem 0; border-radius: .4rem;
        overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; background: #fff; border-radius: .4rem; }
figcaption { font-size: .875rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
