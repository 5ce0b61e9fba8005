"""Writes xlnet.npz, what XLNet's own data_utils.py does: perm_masks, and statistics of its draws.

    git clone https://github.com/zihangdai/xlnet
    python tests/objectives/originals/xlnet.py xlnet

Needs numpy and tensorflow; two functions are executed out of a file that no longer imports. Written
with commit bbaa3a6 of XLNet, numpy 2.4 and tensorflow 2.21.
"""

import ast
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import tensorflow

ROWS, PERM_SIZE = 40, 8  # perm_masks: rows of two halves, one permutation each
RUNS, SIZE = 20_000, 64  # draws: segments of so many pieces
STARTS = np.array([1, 1, 0, 1, 0, 0, 1, 0] * (SIZE // 8), bool)  # does a piece begin a word?
STARTS[:2] = [False, True]  # as where a row is cut inside a word
# name: (reverse, goal, alpha, beta, is the n-gram of words?)
DRAWS = {
    "pieces": (False, 11, 6, 1, False),
    "reversed": (True, 11, 6, 1, False),
    "dense": (False, 20, 5, 2, False),
    "words": (False, None, 6, 1, True),
}
SLIP = "if _is_start_piece(sp.IdToPiece(seg[beg].item())):"


def main(clone: str) -> None:
    text = (pathlib.Path(clone) / "data_utils.py").read_text()
    np.random.seed(0)  # noqa: NPY002, the original draws from it
    arrays = perm_masks(text) | {"starts": STARTS, "runs": RUNS}
    for name, (reverse, goal, alpha, beta, words) in DRAWS.items():
        sample = execute(text, words, mask_alpha=alpha, mask_beta=beta)["_sample_mask"]
        pieces = SimpleNamespace(IdToPiece=lambda i: "▁a" if i else "a")
        runs = (sample(pieces, STARTS.astype(np.int64), reverse, 5, goal) for _ in range(RUNS))
        arrays |= {f"{name}_{key}": value for key, value in statistics(runs).items()}
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **arrays)


def execute(text: str, words: bool = False, shuffle=None, **flags) -> dict:
    """The functions of the original file; `words` mends the loop that looks at the wrong piece."""
    if words:
        before, after = text.split(SLIP)
        text = before + SLIP.replace("beg", "end") + after
    tf = SimpleNamespace(**{n: getattr(tensorflow.compat.v1, n) for n in dir(tensorflow.compat.v1)})
    tf.random_shuffle = shuffle
    scope = {"np": np, "tf": tf, "FLAGS": SimpleNamespace(**flags), "SEP_ID": 4, "CLS_ID": 3}
    for node in ast.parse(text).body:
        if getattr(node, "name", "") in ("_is_start_piece", "_sample_mask", "_local_perm"):
            exec(ast.get_source_segment(text, node), scope)
    return scope


def perm_masks(text: str) -> dict[str, np.ndarray]:
    """Random halves, and for each the permutation that the original was made to draw.

    inputs: ids, of which 3 and 4 are functional. The other arrays are named as in the original.
    """
    rng = np.random.default_rng(0)
    shape = ROWS, 2, PERM_SIZE
    inputs = rng.integers(3, 12, shape)
    masked = rng.random(shape) < rng.choice([0.2, 0.5, 1.0], (ROWS, 1, 1))
    index = rng.permuted(np.tile(np.arange(PERM_SIZE), (ROWS, 2, 1)), axis=-1)
    halves = []
    for place in np.ndindex(ROWS, 2):
        shuffle = lambda column, place=place: tensorflow.gather(column, index[place])
        local_perm = execute(text, shuffle=shuffle)["_local_perm"]
        following = np.append(inputs[place][1:], 9)
        found = local_perm(inputs[place], following, masked[place], PERM_SIZE, PERM_SIZE)
        halves.append([np.asarray(x) for x in found[:3]])
    names = ("perm_mask", "new_targets", "target_mask")
    found = {
        name: np.stack(x).reshape(*shape[:2], *x[0].shape).astype(np.int8)
        for name, x in zip(names, zip(*halves, strict=True), strict=True)
    }
    return dict(
        inputs=inputs.astype(np.int8), is_masked=masked, index=index.astype(np.int8), **found
    )


def statistics(runs) -> dict[str, np.ndarray]:
    """How often each position is masked; mean and sd of the number of runs of 1, 2, ... masked
    positions, the last one of all longer ones."""
    masks = np.stack(list(runs))
    lengths = np.array([run_lengths(mask) for mask in masks])
    return {
        "masked": masks.sum(axis=0),
        "mean": lengths.mean(axis=0),
        "sd": lengths.std(axis=0, ddof=1),
        "counts": np.bincount(masks.sum(axis=1), minlength=SIZE + 1),
    }


def run_lengths(mask: np.ndarray, longest: int = 10) -> np.ndarray:
    edges = np.flatnonzero(np.diff(np.pad(mask.astype(int), 1)))
    return np.bincount(np.minimum(edges[1::2] - edges[::2], longest), minlength=longest + 1)[1:]


if __name__ == "__main__":
    main(*sys.argv[1:])
