"""What notebooks draw of a text: tokens with a colour each, and maps of attention."""

import html

import numpy as np
from matplotlib.figure import Figure

_GRID_WIDTH = 1.6  # inches of one small map


class Html(str):
    """HTML that a notebook shows as it looks, and that prints as its source."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def coloured(pieces: list[str], values: np.ndarray) -> Html:
    """The pieces of a text, the redder the lower their value among them; the value on hovering.

    Args:
      pieces: [n], of the vocabulary.
      values: [n] nats, such as log-probabilities; NaN = no value, grey.
    """
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    spans = [_span(piece, value, low, high) for piece, value in zip(pieces, values, strict=True)]
    legend = (
        f"white {high:.2f} nats, red {low:.2f} nats; mean {known.mean():.2f}" if len(known) else ""
    )
    return Html(
        f'<div style="line-height:1.9;font-family:monospace;color:#000">{"".join(spans)}'
        f'<div style="color:#777">{legend}</div></div>'
    )


def _span(piece: str, value: float, low: float, high: float) -> str:
    text = html.escape(piece.replace("\u2581", " ")).replace(" ", "&nbsp;")
    if not np.isfinite(value):
        return f'<span style="background:#ddd">{text}</span>'
    shade = round(255 * (value - low) / (high - low)) if high > low else 255
    colour = f"rgb(255,{shade},{shade})"
    return f'<span title="{value:.3f}" style="background:{colour}">{text}</span>'


def attention(found, layer: int | None = None, head: int | None = None) -> Figure:
    """A heatmap of one layer and head, numbered from 0; without them a small one of each.

    Args:
      found: `observe.AttentionMap`.
    """
    if layer is not None and head is not None:
        return _heatmap(
            found.pieces, found.probabilities[layer, head], f"layer {layer} head {head}"
        )
    layers, heads = found.probabilities.shape[:2]
    figure = Figure(figsize=(_GRID_WIDTH * heads, _GRID_WIDTH * layers), layout="constrained")
    for place, axes in np.ndenumerate(figure.subplots(layers, heads, squeeze=False)):
        axes.imshow(found.probabilities[place], cmap="Blues", vmin=0)
        axes.set(xticks=[], yticks=[])
        axes.set_title("layer {} head {}".format(*place), fontsize=7)
    return figure


def _heatmap(pieces: list[str], matrix: np.ndarray, title: str) -> Figure:
    side = 1.5 + 0.28 * len(pieces)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="Blues", vmin=0)
    names = [piece.replace("\u2581", "·").replace("$", r"\$") for piece in pieces]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(title=title, xlabel="takes from", ylabel="position")
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure
