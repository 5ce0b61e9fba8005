"""Writes spanbert.npz, what SpanBERT's own masking.py does: choices, and statistics of its draws.

    git clone https://github.com/facebookresearch/SpanBERT
    python tests/objectives/originals/spanbert.py SpanBERT

Needs numpy alone. Written with commit 0670d8b of SpanBERT and numpy 2.4.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np

CHOICES, LONGEST_ROW, MOST_SPANS, PAIR = 400, 59, 12, 15
RUNS, ROW = 10_000, 510
WORDS = {"one": (1,), "mixed": (1, 1, 2, 3)}  # numbers of pieces, again and again
STATISTICS = ("spans", "with_pair", "single", "over_15", "targets")


def main(clone: str) -> None:
    original = load(pathlib.Path(clone) / "pretraining/fairseq/data/masking.py")
    np.random.seed(0)  # noqa: NPY002, the original draws from it
    arrays = choices(original)
    for name, sizes in WORDS.items():
        runs = np.array(list(statistics(original, sizes)))
        arrays[f"mean_{name}"], arrays[f"sd_{name}"] = runs.mean(axis=0), runs.std(axis=0, ddof=1)
    np.savez_compressed(
        pathlib.Path(__file__).with_suffix(".npz"), names=STATISTICS, runs=RUNS, **arrays
    )


def load(path: pathlib.Path) -> types.ModuleType:
    """The original file, with nothing in the place of what span masking does not use."""
    package = types.ModuleType("original")
    package.data_utils, package.FairseqDataset = None, None
    unused = {"tqdm": types.SimpleNamespace(tqdm=None), "torch": types.ModuleType("torch")}
    sys.modules.update({"original": package, **unused})
    spec = importlib.util.spec_from_file_location("original.masking", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choices(original) -> dict[str, np.ndarray]:
    """Random spans of rows of `size` tokens, overlapping or not, and the pairs made of them.

    A pair is [left, right, tokens]; token i of a row is 5 + i. What is not there is -1.
    """
    rng = np.random.default_rng(0)
    size = rng.integers(1, LONGEST_ROW + 1, CHOICES)
    spans = np.full((CHOICES, MOST_SPANS, 2), -1, np.int8)
    pairs = np.full((CHOICES, MOST_SPANS, 2 + PAIR), -1, np.int8)
    for row, n in enumerate(size):
        starts = rng.integers(0, n, rng.integers(1, MOST_SPANS + 1))
        ends = np.minimum(
            starts + rng.geometric(rng.choice([0.04, 0.2, 0.6]), len(starts)) - 1, n - 1
        )
        chosen = [[int(start), int(end)] for start, end in zip(starts, ends, strict=True)]
        spans[row, : len(chosen)] = chosen
        mask = {i for start, end in chosen for i in range(start, end + 1)}
        tokens = np.arange(5, 5 + n)
        made = original.span_masking(
            tokens, chosen, tokens, -1, 4, PAIR, mask, replacement="span", endpoints="external"
        )[2]
        pairs[row, : len(made)] = np.array(made).reshape(-1, 2 + PAIR)
    return {"size": size.astype(np.int8), "spans": spans, "pairs": pairs}


def statistics(original, sizes):
    """STATISTICS of RUNS rows of ROW tokens, masked with the arguments of the published command."""
    begins = np.resize([piece == 0 for size in sizes for piece in range(size)], ROW)
    dictionary = types.SimpleNamespace(is_start_word=lambda token: begins[token])
    arguments = types.SimpleNamespace(
        mask_ratio=0.15,
        max_pair_targets=PAIR,
        span_lower=1,
        span_upper=10,
        geometric_p=0.2,
        tagged_anchor_prob=0.0,
        replacement_method="span",
        endpoints="external",
        return_only_spans=False,
    )
    scheme = original.PairWithSpanMaskingScheme(
        arguments, np.arange(ROW), -1, -2, original.ParagraphInfo(dictionary)
    )
    for _ in range(RUNS):
        target, pairs = scheme.mask(np.arange(ROW))[1:]
        edges = np.diff(np.pad(target != -1, 1).astype(int))
        lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
        assert lengths.sum() == 77
        targets = int(np.sum(np.array(pairs)[:, 2:] != -1))
        yield len(lengths), len(pairs), np.sum(lengths == 1), np.sum(lengths > 15), targets


if __name__ == "__main__":
    main(*sys.argv[1:])
