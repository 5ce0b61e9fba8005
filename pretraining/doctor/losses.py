"""Checks of the curves against what is known without a model: log V, unigram, majority."""

import re

import numpy as np

from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record

# After so many tokens, and so many updates beyond twice the warm-up, a run that learns has left the
# plateau of what needs no context; a finished one ought to have after half of them.
_ENOUGH_TOKENS, _ENOUGH_UPDATES = 2_000_000, 2_000
_MARGIN = 0.05  # nats that count as a difference
_LEAK_ACCURACY, _LEAK_SHARE = 0.9, 0.1  # no text is that predictable
_RISE = 0.1  # nats by which a curve has risen
_EPOCHS = 4.0  # repeats up to which tokens are worth nearly as much as new ones
_FEW = 8  # lines below which a curve has no shape
_FIRST = 20  # updates within which a line tells of the fresh model
_PADDING = 0.02  # share of the payload
_OVERFLOW = 0.01  # share of the targets that found no slot


def first_loss(record: Record) -> Finding | None:
    """Does a fresh model begin as one that knows nothing, at log V?"""
    steps, losses = record.series(f"train/{record.term}")
    if record.config["init_from"] or not len(losses):
        return None
    first, log_v = float(losses[0]), record.log_v
    figures = {"first": first, "log_v": log_v, "step": int(steps[0])}
    text = f"{record.term} begins at {first:.2f} (step {steps[0]:.0f}), log V is {log_v:.2f}"
    if first > 1.25 * log_v:
        causes = ("an initialization that is too wide (model.init_std)", "logits without a norm")
        return Finding("first loss", "warning", text, figures, causes, ("model.init_std=0.02",))
    if first < 0.5 * log_v and steps[0] <= _FIRST:
        causes = ("the answer is in the input: no mask, or no causal order", "labels of padding")
        advice = ("python -m pretraining.show --workdir=...",)
        return Finding("first loss", "warning", text, figures, causes, advice)
    return Finding("first loss", "ok", text, figures)


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
    fresh = not record.config["init_from"]  # what is trained already may have nothing left to learn
    young = record.step < max(100, record.config["optimizer.warmup"])
    if start - best < 0.01 * abs(start) and fresh and not young:
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
    tokens, updates = _enough(record)
    if _is_young(record):
        why = "too short a run" if record.finished else "too early"
        text += f": {why} to tell, before {tokens:,} tokens and {updates:,} updates"
        return Finding("unigram baseline", "note", text, figures)
    return Finding(
        "unigram baseline",
        "warning",
        text + ": the model makes no use of context",
        figures,
        (
            *_evaluated_otherwise(record),
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


def _enough(record: Record) -> tuple[int, int]:
    """Tokens and updates after which a run ought to know more than frequencies."""
    parts = 2 if record.finished else 1
    beyond = 2 * record.config["optimizer.warmup"]
    return _ENOUGH_TOKENS // parts, beyond + _ENOUGH_UPDATES // parts


def _is_young(record: Record) -> bool:
    tokens, updates = _enough(record)
    return record.tokens < tokens or record.step < updates


def leak(record: Record) -> Finding | None:
    """Is it too good to be true?"""
    found = [_too_good(record, kind) for kind in _KINDS]
    found = [finding for finding in found if finding is not None]
    return max(found, key=lambda finding: _SEVERITIES.index(finding.severity), default=None)


_SEVERITIES = ("ok", "note", "warning")
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
    if kind == "train" and _epochs(record) > 1:
        text += f" after {_epochs(record):.1f} epochs: probably learned by heart"
        causes = ("text that has been seen often", "an answer that leaks in training alone")
        return Finding("leak", "note", text, figures, causes, ("a look at the validation loss",))
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
    if len(loss) < 3:
        return None
    best, epochs = int(loss.argmin()), _epochs(record)
    rise = float(loss[-1] - loss[best])
    figures = {"rise": rise, "best_step": int(steps[best]), "epochs": epochs}
    text = f"validation {record.term} {loss[-1]:.3f}, at best {loss[best]:.3f}"
    if rise < _RISE:
        return Finding("overfitting", "ok", text, figures)
    before, late = _training_near(record, steps)[[best, -1]]
    if np.isnan([before, late]).any():
        return None
    if late >= before:
        text += ", and training rises too: it comes apart"
        causes = ("a learning rate that is too high", "a spike that was not recovered from")
        advice = ("optimizer.learning_rate at a third", "guard.spike=8 guard.rewinds=3")
    elif epochs > 1:
        text += f", while training goes on falling: overfitting, after {epochs:.1f} epochs"
        causes = ("the same text too often: too few epochs' worth of it", "no dropout")
        dropout = "model.dropout=0.1 model.attention_dropout=0.1"
        advice = ("more text", "train.steps lower", dropout)
    else:
        text += ", while training goes on falling, though nothing has been seen twice"
        causes = (
            "validation text of another kind, or training text that changes on the way",
            "an answer that leaks in training, but not in evaluation",
            "training that is made easier on the way (knobs)",
        )
        advice = ("a look at both texts", "python -m pretraining.show --workdir=...")
    otherwise = _evaluated_otherwise(record)
    severity = "note" if otherwise else "warning"
    return Finding("overfitting", severity, text, figures, (*otherwise, *causes), advice)


def _evaluated_otherwise(record: Record) -> tuple[str, ...]:
    """The cause that explains a validation loss like no training loss: other knobs."""
    now = {name: record.last(f"train/knobs/{name}") for name in record.evaluation_knobs}
    other = [
        f"{name} {now[name]:.3g}, in evaluation {knob:.3g}"
        for name, knob in record.evaluation_knobs.items()
        if now[name] is not None and abs(now[name] - knob) > 1e-6
    ]
    return (f"training unlike evaluation: {'; '.join(other)}",) * bool(other)


def _training_near(record: Record, steps: np.ndarray) -> np.ndarray:
    """Medians of the training loss in equal windows that end at the evaluations; NaN = no line.

    A window is a fifth of what lies between two evaluations: there training has not fallen much.
    """
    at, loss = record.series(f"train/{record.term}")
    width = 0.2 * float(np.median(np.diff(steps, prepend=0)))
    windows = [loss[(at > step - width) & (at <= step)] for step in steps]
    return np.array([np.median(window) if len(window) else np.nan for window in windows])


def gap(record: Record) -> Finding | None:
    """Has validation come away from training since the first evaluation?

    The growth counts, not the gap: training may mask more than evaluation does.
    """
    steps, loss = record.series(f"eval/{record.term}")
    if len(loss) < 3 or record.step < 100 or _knobs_change(record):
        return None
    gaps = loss - _training_near(record, steps)
    gaps = gaps[~np.isnan(gaps)]
    if len(gaps) < 2:
        return None
    growth = float(gaps[-1] - gaps[0])
    figures = {"first": float(gaps[0]), "last": float(gaps[-1]), "epochs": _epochs(record)}
    text = f"validation minus training {gaps[-1]:+.2f} nats, {gaps[0]:+.2f} at the first evaluation"
    if growth <= 0.3:
        return Finding("train-validation gap", "ok", text, figures)
    otherwise = _evaluated_otherwise(record)
    return Finding(
        "train-validation gap",
        "note" if otherwise else "warning",
        text + f", after {_epochs(record):.1f} epochs",
        figures,
        (
            *otherwise,
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
    """Does a classification of tokens beat the answer that is always the same?

    An objective that classifies logs `majority_accuracy` beside the loss `<term>` and
    `<term>_accuracy`.
    """
    share, term = record.last("eval/majority_accuracy"), _classifier(record)
    loss, accuracy = (record.last(f"eval/{name}") for name in (term, f"{term}_accuracy"))
    if None in (share, loss, accuracy) or not 0 < share < 1:
        return None
    entropy = float(-share * np.log(share) - (1 - share) * np.log(1 - share))
    figures = {"accuracy": accuracy, "majority": share, "loss": loss, "entropy": entropy}
    text = (
        f"{term} is right in {accuracy:.2%} (majority {share:.2%}), its loss {loss:.4f} "
        f"(knowing the rate alone: {entropy:.4f})"
    )
    if accuracy > share + 0.001:
        return Finding("majority baseline", "ok", text, figures)
    stuck = loss > entropy - 0.0005 and not _is_young(record)
    return Finding(
        "majority baseline",
        "warning" if stuck else "note",
        text + (": it only knows the rate" if stuck else ": it has just begun"),
        figures,
        (
            "a short run: such a term starts once its classes can be told apart",
            "classes that look alike: samples as good as the text, or equal to it",
            "a weight of the term that is too low",
        ),
        ("more tokens", "what is to be told apart made easier", "a higher weight of the term"),
    )


def _classifier(record: Record) -> str:
    """The term whose accuracy `majority_accuracy` belongs to; "" = none."""
    names = {name for line in record.lines for name in line}
    found = (re.fullmatch(r"eval/(?!majority)(\w+)_accuracy", name) for name in sorted(names))
    return next((match[1] for match in found if match), "")


def slots(record: Record) -> Finding | None:
    """Is there a place for everything that is to be predicted?"""
    values = [record.last(f"{kind}/overflow") for kind in ("train", "eval")]
    if None in values:
        return None
    figures = dict(zip(("train", "eval"), values, strict=True))
    text = f"{max(values):.2%} of the chosen tokens found no slot"
    if max(values) <= _OVERFLOW:
        return Finding("slots", "ok", text, figures)
    return Finding(
        "slots",
        "warning",
        text,
        figures,
        ("a number of targets that varies (whole words, spans, count='bernoulli') at a high rate",),
        ("objective.count=exact", "a lower objective.mask_rate", "a longer sequence_length"),
    )


def padding(record: Record) -> Finding | None:
    """How much of what is computed is no text?"""
    _, fill = record.series("train/fill")
    if not len(fill):
        return None
    share = 1 - float(fill.mean())
    text = f"{share:.2%} of the rows is padding"
    if share <= _PADDING:
        return Finding("padding", "ok", text, {"share": share})
    cause = "documents that are shorter than a row, and rows that are not cut from one stream"
    advice = ("a shorter data.sequence_length", "rows of several documents")
    return Finding("padding", "warning", text, {"share": share}, (cause,), advice)


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
    padding,
    evaluations,
)
