"""Checks of the curves against what is known without a model: log V, unigram, majority."""

import numpy as np

from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record

_ENOUGH = 2_000_000  # tokens after which a run that learns has left the unigram plateau,
_ENOUGH_AT_END = 1_000_000  # and after which a finished one ought to have
_MARGIN = 0.05  # nats that count as a difference
_LEAK_ACCURACY, _LEAK_SHARE = 0.9, 0.1  # no text is that predictable
_RISE = 0.1  # nats by which a curve has risen
_EPOCHS = 4.0  # repeats up to which tokens are worth nearly as much as new ones
_FEW = 8  # lines below which a curve has no shape
_OVERFLOW = 0.01  # share of the targets that found no slot


def first_loss(record: Record) -> Finding | None:
    """Does a fresh model begin as one that knows nothing, at log V?"""
    if record.config["init_from"] or not record.term:
        return None if record.config["init_from"] else _no_term(record)
    steps, losses = record.series(f"train/{record.term}")
    first, log_v = float(losses[0]), record.log_v
    figures = {"first": first, "log_v": log_v, "step": int(steps[0])}
    text = f"{record.term} begins at {first:.2f} (step {steps[0]:.0f}), log V is {log_v:.2f}"
    if first > 1.25 * log_v:
        causes = ("an initialization that is too wide (model.init_std)", "logits without a norm")
        return Finding("first loss", "warning", text, figures, causes, ("model.init_std=0.02",))
    if first < 0.5 * log_v and steps[0] <= 0.01 * record.steps + 1:
        causes = ("the answer is in the input: no mask, or no causal order", "labels of padding")
        advice = ("python -m pretraining.show --workdir=...",)
        return Finding("first loss", "warning", text, figures, causes, advice)
    return Finding("first loss", "ok", text, figures)


def _no_term(record: Record) -> Finding | None:
    if record.last("train/unigram_loss") is None:
        return None  # an objective that gives no baseline
    return Finding(
        "first loss",
        "warning",
        f"no term of the loss begins near log V = {record.log_v:.2f}, where fresh models do",
        {"log_v": record.log_v},
        ("an initialization that is too wide or too narrow", "the answer is in the input"),
        ("python -m pretraining.show --workdir=...", "model.init_std=0.02"),
    )


def learns(record: Record) -> Finding | None:
    """Has the training loss fallen, and stayed down?"""
    _, losses = record.series("train/loss")
    if len(losses) < _FEW:
        return None
    means = [float(part.mean()) for part in np.array_split(losses, min(10, len(losses) // 4))]
    start, best, end = means[0], min(means), means[-1]
    figures = {"start": start, "best": best, "end": end}
    text = f"training loss {start:.3f} at the beginning, {best:.3f} at best, {end:.3f} of late"
    if end > best + max(_RISE, 0.05 * abs(best)) and not _knobs_change(record):
        causes = ("a learning rate that is too high", "a gradient that is not clipped")
        advice = ("optimizer.learning_rate at a third", "a longer optimizer.warmup")
        return Finding("learning", "warning", text + ": it diverges", figures, causes, advice)
    if start - best < 0.01 * abs(start) and record.step >= 100:
        causes = (
            "a learning rate of 0, or far too low",
            "no position that counts in the loss",
            "parameters that are frozen, or a loss without a gradient",
        )
        advice = ("look at learning rate and gradient norm above",)
        return Finding("learning", "warning", text + ": it stands still", figures, causes, advice)
    return Finding("learning", "ok", text, figures)


def unigram(record: Record) -> Finding | None:
    """Does the model know more than how frequent each token is?"""
    _, excess = record.excess()
    if not len(excess):
        return None
    last = float(excess[-1])
    figures = {"excess": last, "tokens": record.tokens}
    where = f"{abs(last):.2f} nats {'above' if last > 0 else 'below'} the unigram distribution"
    text = f"validation {record.term} is {where} after {record.tokens:,} tokens"
    if last < -_MARGIN:
        return Finding("unigram baseline", "ok", text, figures)
    enough = _ENOUGH_AT_END if record.finished else _ENOUGH
    if record.tokens < enough:
        text += f": too early to tell (below {enough:,} tokens runs may stand there)"
        return Finding("unigram baseline", "note", text, figures)
    return Finding(
        "unigram baseline",
        "warning",
        text + ": the model makes no use of context",
        figures,
        (
            "context that does not reach the prediction: masks in the wrong place, an attention "
            "mask that hides everything, labels shifted by one, shuffled positions",
            "the plateau itself: a small batch, post-norm and learned positions stay there long",
            "a learning rate that is far too low or too high",
        ),
        (
            "python -m pretraining.show --workdir=... (is what is predicted next to what is seen?)",
            "model.position=rotary model.norm_order=pre",
            "optimizer.learning_rate three times higher and lower",
        ),
    )


def leak(record: Record) -> Finding | None:
    """Is it too good to be true?"""
    found = [_too_good(record, kind) for kind in _KINDS]
    found = [finding for finding in found if finding is not None]
    return max(found, key=lambda finding: finding.severity == "warning", default=None)


_KINDS = {"eval": "validation", "train": "training"}


def _too_good(record: Record, kind: str) -> Finding | None:
    loss, baseline = (record.last(f"{kind}/{name}") for name in (record.term, "unigram_loss"))
    if not record.term or loss is None or baseline is None:
        return None
    accuracy = record.last(f"{kind}/accuracy") or 0.0
    figures = {"accuracy": accuracy, "loss": loss, "unigram": baseline}
    figured = f"accuracy {accuracy:.1%}, {record.term} {loss:.2f} (unigram {baseline:.2f})"
    text = f"{_KINDS[kind]} {figured}"
    if accuracy < _LEAK_ACCURACY and loss > _LEAK_SHARE * baseline:
        return Finding("leak", "ok", text, figures)
    return Finding(
        "leak",
        "warning",
        text + ": too good to be true, the answer is probably in the input",
        figures,
        (
            "nothing is masked: tokens are kept as they are where they are predicted",
            "positions that see what they predict (causal order, the query stream)",
            "text that repeats itself, or validation text that is in the training text",
        ),
        ("python -m pretraining.show --workdir=...", "objective.keep_fraction", "deduplicate"),
    )


def overfitting(record: Record) -> Finding | None:
    """Does the validation loss rise while the training loss falls?"""
    steps, loss = record.series(f"eval/{record.term}")
    train_steps, train = record.series(f"train/{record.term}")
    if not record.term or len(loss) < 3:
        return None
    best = int(loss.argmin())
    rise = float(loss[-1] - loss[best])
    figures = {"rise": rise, "best_step": int(steps[best]), "epochs": _epochs(record)}
    text = f"validation {record.term} {loss[-1]:.3f}, at best {loss[best]:.3f}"
    if rise < _RISE:
        return Finding("overfitting", "ok", text, figures)
    falls = _median(train, train_steps > steps[-2]) < _median(train, train_steps <= steps[best])
    if falls:
        return Finding(
            "overfitting",
            "warning",
            text + f", while training goes on falling: overfitting in epoch {_epochs(record):.1f}",
            figures,
            ("the same text too often: too few epochs' worth of it", "no dropout"),
            ("more text", "train.steps lower", "model.dropout=0.1 model.attention_dropout=0.1"),
        )
    return Finding(
        "overfitting",
        "warning",
        text + ", and training rises too: it comes apart",
        figures,
        ("a learning rate that is too high", "a spike that was not recovered from"),
        ("optimizer.learning_rate at a third", "guard.spike=8 guard.rewinds=3"),
    )


def _median(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.median(values[chosen])) if chosen.any() else float("nan")


def gap(record: Record) -> Finding | None:
    """Has validation come away from training since the first evaluation?

    The growth counts, not the gap: training may mask more than evaluation does.
    """
    steps, loss = record.series(f"eval/{record.term}")
    train_steps, train = record.series(f"train/{record.term}")
    if not record.term or len(loss) < 3 or record.step < 100 or _knobs_change(record):
        return None
    near = [  # so near that training has not fallen much since
        _median(train, (train_steps > step - 0.2 * width) & (train_steps <= step))
        for step, width in zip(steps, np.diff(steps, prepend=0), strict=True)
    ]
    gaps = loss - np.array(near)
    growth = float(gaps[-1] - gaps[0])
    figures = {"first": float(gaps[0]), "last": float(gaps[-1]), "epochs": _epochs(record)}
    text = f"validation minus training {gaps[-1]:+.2f} nats, {gaps[0]:+.2f} at the first evaluation"
    if not growth > 0.3:
        return Finding("train-validation gap", "ok", text, figures)
    return Finding(
        "train-validation gap",
        "warning",
        text + f", in epoch {_epochs(record):.1f}",
        figures,
        (
            "the training text is being learned by heart",
            "an answer that leaks in training, but not in evaluation",
            "validation text of another kind",
        ),
        ("more text", "model.dropout=0.1", "a look at both texts"),
    )


def _knobs_change(record: Record) -> bool:
    names = [name for name in record.lines[0] if name.startswith("train/knobs/")]
    return any(np.ptp(record.series(name)[1]) > 1e-6 for name in names)


def _epochs(record: Record) -> float:
    copies = record.config["data.copies"]
    return record.tokens / copies / max(int(record.counts.sum()), 1)


def epochs(record: Record) -> Finding | None:
    """How often has each token been seen?"""
    total, seen = int(record.counts.sum()), _epochs(record)
    if not total:
        return None
    planned = seen * record.steps / max(record.step, 1)
    figures = {"tokens": total, "epochs": seen, "planned": planned}
    text = f"{seen:.2f} epochs of {total:,} tokens so far, {planned:.2f} in the whole run"
    if planned <= _EPOCHS:
        return Finding("epochs", "ok", text, figures)
    return Finding(
        "epochs",
        "note",
        text + f": beyond {_EPOCHS:.0f} repeats are worth ever less (Muennighoff et al. 2023)",
        figures,
        ("too little text for so many steps",),
        ("more text, or a lower train.steps",),
    )


def majority(record: Record) -> Finding | None:
    """Does a classification of tokens beat the answer that is always the same?"""
    share, loss = record.last("eval/replaced"), record.last("eval/discriminator")
    baseline = record.last("eval/majority_accuracy")
    accuracy = record.last("eval/discriminator_accuracy")
    if None in (share, loss, accuracy, baseline) or not 0 < share < 1:
        return None
    entropy = float(-share * np.log(share) - (1 - share) * np.log(1 - share))
    figures = {"accuracy": accuracy, "majority": baseline, "loss": loss, "entropy": entropy}
    text = (
        f"detection is right in {accuracy:.2%} (majority {baseline:.2%}), its loss {loss:.4f} "
        f"(knowing the rate alone: {entropy:.4f})"
    )
    if accuracy > baseline + 0.001:
        return Finding("majority baseline", "ok", text, figures)
    stuck = loss > entropy - 0.0005 and record.tokens >= _ENOUGH
    return Finding(
        "majority baseline",
        "warning" if stuck else "note",
        text + (": it only knows how many are replaced" if stuck else ": it has just begun"),
        figures,
        (
            "a short run: detection starts once samples can be told from text",
            "a generator as good as the discriminator, or one that samples the original",
            "a discriminator weight that is too low",
        ),
        ("more tokens", "a smaller objective.generator_size", "objective.discriminator_weight=50"),
    )


def slots(record: Record) -> Finding | None:
    """Is there a place for everything that is to be predicted?

    Rows are cut from one stream of tokens, so a full batch holds no padding, and what a row holds
    is not among the metrics; only targets that found no slot are counted.
    """
    values = [record.last(f"{kind}/overflow") for kind in ("train", "eval")]
    if None in values:
        return None
    figures = dict(zip(("train", "eval"), values, strict=True))
    text = f"{max(values):.2%} of the chosen tokens found no slot; rows are not padded"
    if max(values) <= _OVERFLOW:
        return Finding("slots and padding", "ok", text, figures)
    return Finding(
        "slots and padding",
        "warning",
        text,
        figures,
        ("a number of targets that varies (whole words, spans, count='bernoulli') at a high rate",),
        ("objective.count=exact", "a lower objective.mask_rate", "a longer sequence_length"),
    )


def evaluations(record: Record) -> Finding | None:
    """Is there anything to compare by?"""
    steps, _ = record.series("eval/loss")
    if len(steps) or record.step < record.steps:
        return None
    text = "the run has ended without one evaluation"
    return Finding("evaluation", "warning", text, {}, ("a damaged metrics.jsonl",), ("evaluate",))


CHECKS = (
    first_loss,
    learns,
    unigram,
    majority,
    leak,
    overfitting,
    gap,
    epochs,
    slots,
    evaluations,
)
