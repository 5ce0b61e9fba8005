"""Checks of the learning rate, the gradient, and updates that went wrong."""

import numpy as np

from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record

_CLIPPED = 0.95  # share of updates over the limit from which clipping is no exception
_EXPLODED, _VANISHED = 100.0, 1e-3  # factors between the norms after warm-up and those at the end
_DEVIATION = 8.0  # standard deviations from which a loss is a spike
_FEW = 8  # lines below which a shape cannot be told


def learning_rate(record: Record) -> Finding | None:
    """Is there one, and does it have the peak and the end of the config?"""
    steps, rates = record.series("train/learning_rate")
    if not len(rates):
        return None
    peak, warmup = record.config["optimizer.learning_rate"], record.config["optimizer.warmup"]
    figures = {"peak": float(rates.max()), "configured": peak, "last": float(rates[-1])}
    if warmup >= record.steps:
        text = f"the warm-up of {warmup} steps is not over when the run ends, at {record.steps}"
        return _rate(text, figures, "warm-up in steps left from a longer run", "warmup='10%'")
    if rates.max() == 0 and record.step > 1:
        text = f"the learning rate is 0 in all {len(rates)} lines: nothing is learned"
        cause = "a warm-up that is longer than what has run, or a schedule that has ended"
        return _rate(text, figures, cause, "optimizer.learning_rate, optimizer.warmup")
    # Some schedules fall during the warm-up too, and so never reach the peak.
    reachable = peak * (1 - warmup / record.steps)
    around = steps[(steps >= warmup) & (steps <= warmup + 0.05 * record.steps)]
    if len(around) and not 0.9 * reachable <= rates.max() <= 1.001 * peak:
        text = f"the learning rate peaks at {rates.max():.3g}, where the config says {peak:.3g}"
        return _rate(text, figures, "durations that were changed between two starts", "a new run")
    return _end_of_rate(record, figures)


def _rate(text: str, figures: dict, cause: str, advice: str) -> Finding:
    return Finding("learning rate", "warning", text, figures, (cause,), (advice,))


def _end_of_rate(record: Record, figures: dict) -> Finding:
    schedule, peak = record.config["optimizer.schedule"], figures["configured"]
    end, last = peak * record.config["optimizer.end_fraction"], figures["last"]
    if record.finished and last > end + 0.1 * peak:
        text = f"the run ends at a learning rate of {last:.3g} (optimizer.schedule={schedule!r})"
        advice = "compare it with runs of the same schedule only: a decay lowers the loss at once"
        return Finding("learning rate", "note", text, figures, (), (advice,))
    text = f"peak {figures['peak']:.3g}, now {last:.3g}, as configured ({schedule})"
    return Finding("learning rate", "ok", text, figures)


def warmup(record: Record) -> Finding:
    """Is there a warm-up where the network needs one?"""
    steps, post = record.config["optimizer.warmup"], record.config["model.norm_order"] == "post"
    figures = {"steps": steps}
    if steps or record.config["init_from"]:
        return Finding("warm-up", "ok", f"{steps} steps", figures)
    return Finding(
        "warm-up",
        "warning" if post else "note",
        "there is no warm-up" + (", and norms follow the sums (norm_order='post')" * post),
        figures,
        (
            "Adam's averages know little in the first updates, which are then as large as any; "
            "post-norm networks often never leave the unigram plateau after that (Xiong et al. "
            "2020)",
        ),
        ("optimizer.warmup='10%'", "model.norm_order=pre"),
    )


def gradient_norm(record: Record) -> Finding | None:
    """Does it explode or vanish?"""
    steps, norms = record.series("train/gradient_norm")
    after = norms[steps > record.config["optimizer.warmup"]]
    if len(after) < _FEW:
        return None
    quarter = len(after) // 4
    early, late = float(np.median(after[:quarter])), float(np.median(after[-quarter:]))
    figures = {"early": early, "late": late, "largest": float(after.max())}
    shape = f"median {early:.3g} after the warm-up, {late:.3g} of late"
    if late > _EXPLODED * max(early, 1e-12) or late > 1e4:
        return Finding(
            "gradient norm",
            "warning",
            f"the gradient explodes: {shape}",
            figures,
            (
                "a learning rate that is too high",
                "clipping that is off (optimizer.clip=0)",
                "attention logits that grow (few heads, bfloat16, no weight decay)",
            ),
            ("optimizer.learning_rate at a third", "optimizer.clip=1", "model.norm_order=pre"),
        )
    if late < _VANISHED * early or late < 1e-7:
        return Finding(
            "gradient norm",
            "warning",
            f"the gradient vanishes: {shape}",
            figures,
            (
                "the loss has nothing left to say: the answer leaks, or no position counts",
                "dead activations or saturated softmaxes after a phase of divergence",
                "deep post-norm networks without warm-up",
            ),
            ("look at accuracy and loss below", "python -m pretraining.show --workdir=..."),
        )
    return Finding("gradient norm", "ok", shape, figures)


def clipping(record: Record) -> Finding | None:
    """Is nearly every update clipped?"""
    limit = record.config["optimizer.clip"]
    steps, norms = record.series("train/gradient_norm")
    after = norms[steps > record.config["optimizer.warmup"]]
    if not limit or len(after) < _FEW:
        return None
    share, median = float(np.mean(after > limit)), float(np.median(after))
    figures = {"share": share, "median": median, "limit": limit}
    text = f"{share:.0%} of the updates are over optimizer.clip={limit:g} (median {median:.3g})"
    if share < _CLIPPED:
        return Finding("clipping", "ok", text, figures)
    return Finding(
        "clipping",
        "note",
        text + ": only the gradient's direction counts, its size never does",
        figures,
        ("a loss of several terms, or of a large scale", "a small batch", "a limit that is low"),
        ("optimizer.clip at a few times the median, if updates ought to differ in size",),
    )


def bad_updates(record: Record) -> Finding:
    """Were there losses or gradients that are not finite?"""
    names = ("train/loss", "train/gradient_norm")
    empty = [
        line["step"]
        for line in record.lines
        if any(name in line and line[name] is None for name in names)
    ]
    skipped = record.last("train/skipped") or 0.0
    figures = {"skipped": skipped, "lines": len(empty), "first": empty[0] if empty else -1}
    if not empty and not skipped:
        return Finding("finite updates", "ok", "all losses and gradients are finite", figures)
    text = f"{max(skipped, len(empty)):.0f} updates were not finite"
    return Finding(
        "finite updates",
        "warning",
        text + (f", the first at step {empty[0]}" if empty else ""),
        figures,
        (
            "a learning rate that is too high",
            "bfloat16 with large logits or a large epsilon of the norm",
            "rows that are broken (see <workdir>/offending)",
        ),
        ("python -m pretraining.replay --workdir=... --step=N", "optimizer.learning_rate lower"),
    )


def bad_evaluations(record: Record) -> Finding | None:
    """Were there evaluations that are not finite?"""
    found = {
        name: [line["step"] for line in record.lines if name in line and line[name] is None]
        for name in sorted({name for line in record.lines for name in line})
        if name.startswith("eval/")
    }
    if not found:
        return None
    bad = {name: steps for name, steps in found.items() if steps}
    figures = {"first": min(min(steps) for steps in bad.values()) if bad else -1}
    if not bad:
        return Finding("finite evaluations", "ok", "all evaluations are finite", figures)
    return Finding(
        "finite evaluations",
        "warning",
        f"{', '.join(bad)} not finite, first at step {figures['first']}",
        figures,
        (
            "parameters that came apart between two lines",
            "a row that is broken, or logits too large",
        ),
        ("the other findings", "python -m pretraining.evaluate --workdir=... at other steps"),
    )


def spikes(record: Record) -> Finding | None:
    """Did the loss jump, and did the run go back?"""
    steps, deviations = record.series("train/loss_deviation")
    rewinds = record.last("train/rewinds") or 0.0
    if not len(deviations):
        return None
    at, worst = int(steps[deviations.argmax()]), float(deviations.max())
    figures = {"largest": worst, "step": at, "rewinds": rewinds}
    if worst < _DEVIATION and rewinds == 0:
        return Finding("spikes", "ok", "no loss jumped, the run never went back", figures)
    went = f"the run went back {rewinds:.0f} times" if rewinds else "the run went on"
    return Finding(
        "spikes",
        "warning" if worst >= _DEVIATION or rewinds > 2 else "note",
        f"the largest jump of the loss is {worst:.1f} standard deviations, at step {at}; {went}",
        figures,
        ("odd rows (repeated or broken text)", "a learning rate at the edge", "a large beta2"),
        ("python -m pretraining.replay on that step", "guard.spike=8 guard.rewinds=3", "beta2=.95"),
    )


CHECKS = (learning_rate, warmup, gradient_norm, clipping, bad_updates, bad_evaluations, spikes)
