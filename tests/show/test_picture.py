"""What is drawn, where, and in which colour."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from pretraining import show


def test_a_picture_holds_every_word(corrupted, tmp_path):
    figure = show.figure(corrupted)
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    for line in corrupted.lines:
        assert line.title in texts
    for word, count in {"·man": 2, "[MASK]": 1 + 2, "12": 1, "name": 1, "seed 0": 1}.items():
        assert texts.count(word) == count, word
    (mesh,) = axes.collections
    assert (mesh.get_array().reshape(5, 5) == np.tri(5)).all()
    figure.savefig(tmp_path / "show.png", dpi=100)
    with Image.open(tmp_path / "show.png") as image:
        size = figure.get_size_inches() * 100
        assert image.size == tuple(int(length) for length in size)
        assert image.size[0] == 888  # 640 points


def boxes(figure, text):
    """(face, edge) of the boxes around a text, downwards."""
    (axes,) = figure.axes
    found = {}
    for written in axes.texts:
        if written.get_text() == text:
            x, y = written.get_position()
            for box in axes.patches:
                left, top, width, height = box.get_bbox().bounds
                if left < x < left + width and top < y < top + height:
                    found[top] = box.get_facecolor(), box.get_edgecolor()
    return [found[top] for top in sorted(found)]


def test_boxes_tell_changed_predicted_and_kept(corrupted):
    figure = show.figure(corrupted)
    grey, orange, blue, line = "#efefef", "#f5bd41", "#9fd3f2", "#0072b2"
    expected = {
        "[MASK]": [(orange, line)],
        "·ran": [(grey, "none"), (grey, line), (blue, "none")],
        "·man": [(grey, "none"), (blue, "none")],
        "[CLS]": [(grey, "none"), (grey, "none")],
    }
    for word, colors in expected.items():
        found = boxes(figure, word)
        assert len(found) == len(colors), word
        for pair, wanted in zip(found, colors, strict=True):
            assert pair == tuple(map(to_rgba, wanted)), word


def test_larger_numbers_are_darker(make):
    figure = show.figure(make({"input": ["▁a", "▁a", "▁a"]}, {"rank": [30, 10, 20]}))
    brightness = [sum(boxes(figure, number)[0][0][:3]) for number in ("10", "20", "30")]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == 3


def test_letters_that_cannot_be_drawn_warn_nobody(tmp_path, make):
    """Warnings are errors here; dollars would enclose a formula."""
    shown = make(
        {"input": ["名前", r"$\frac$", "\n", r"$\frac$"]}, sees={"sees": np.ones((4, 4), bool)}
    )
    figure = show.figure(shown)
    figure.savefig(tmp_path / "show.png")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("□□") == 1 + 2
    assert texts.count(r"$\frac$") == 2 + 4
    assert "↵" in texts


@pytest.mark.parametrize("n, matrices, labelled", [(3, 1, 1), (40, 2, 2), (128, 4, 0)])
def test_nothing_overlaps_or_lies_outside(n, matrices, labelled, make):
    ids = np.resize(["▁a", "▁man", "s", "▁ran"], n)
    sees = {f"stream {i}": np.tri(n, dtype=bool) for i in range(matrices)}
    figure = show.figure(make({"input": ids}, sees=sees))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    places = [
        mesh.get_datalim(axes.transData).transformed(axes.transData) for mesh in axes.collections
    ]
    assert len(places) == matrices
    places += [text.get_window_extent() for text in axes.texts]
    inner = figure.bbox.padded(-5)
    assert all(inner.x0 <= box.x0 and box.x1 <= inner.x1 for box in places)
    assert all(inner.y0 <= box.y0 and box.y1 <= inner.y1 for box in places)
    assert not [pair for pair in itertools.combinations(places, 2) if pair[0].overlaps(pair[1])]
    words = sum(text.get_text() == "s" for text in axes.texts)
    assert words == (ids == "s").sum() * (1 + 2 * labelled)
