"""Were the runs done alike? Every difference is named, and which runs have it."""

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiments import question as question_lib
from experiments import results as results_lib
from experiments.question import Run
from experiments.reporting import metrics, wording
from experiments.reporting.source import Sweep
from experiments.results import Result
from pretraining.doctor import record
from pretraining.errors import UserError

# Config keys that change no figure: where and how fast a run works, and what it writes. The seeds
# are the repetition; that of the data is told by a sentence of its own.
_NO_MATTER = (
    *("seed.init", "seed.corruption", "seed.dropout", "seed.data", "log.", "checkpoint."),
    *("mesh.", "data.cache", "data.workers", "data.prefetch", "data.threads"),
    *("evaluate.every", "evaluate.batch_size", "guard.silence"),
)
_SHARES = {"optimizer.warmup", "optimizer.decay"}  # of the run, which are stored in steps
_MARGIN = 0.05  # nats, as for the doctor
_STANDS = "stands on the plateau at the unigram loss: its figures say little."
_TOKENS = ("train.steps", "train.batch_size", "data.sequence_length")


def differences(sweep: Sweep) -> tuple[list[str], list[str]]:
    """Sentences: what makes runs not comparable, and what differs because the question asks it.

    A difference is the question's own when all of the config keys that it comes from are overridden
    by the question with different values, or belong to a recipe that only some variants have; where
    the question is not known, none is. Runs of one variant may differ in their seeds alone.
    """
    runs, asked = sweep.results, _asked(sweep)
    faults = [
        *_changed(sweep),
        *_incomplete(sweep),
        *_not_finite(runs),
        *_left_out(runs),
        *_other_machine(runs),
    ]
    faults += [*_other_yardstick(runs), *_other_within_variants(runs)]
    own = []
    for keys, sentence in (*_other_tokens(runs), *_other_settings(runs)):
        (own if keys <= asked else faults).append(sentence)
    return faults, own


def plateau(runs: Sequence[Result]) -> list[str]:
    """Sentences: which variants have learned no more than how frequent each token is.

    Those with runs whose last training loss of tokens (the objective's `token_term`) is not
    `_MARGIN` below the unigram loss of the same batches.
    """
    stuck, unknown = [], []
    for run in (r for r in runs if any("train/unigram_loss" in line for line in r.lines)):
        try:
            told = record.read(run.folder)
        except (UserError, AttributeError, TypeError):  # damaged, or its code was another
            unknown.append(run.name)
            continue
        loss, unigram = told.last(f"train/{told.term}"), told.last("train/unigram_loss")
        if None not in (loss, unigram) and loss > unigram - _MARGIN:
            stuck.append(run.variant)
    total = collections.Counter(run.variant for run in runs)
    sentences = [
        f"{variant} ({count} of {wording.count(total[variant], 'run')}) {_STANDS}"
        for variant, count in collections.Counter(stuck).items()
    ]
    lost = f"Not known, as the objective cannot be built: {names(unknown, runs)}."
    return sentences + [lost] * bool(unknown)


def names(runs: Sequence[str], of: Sequence[Result | Run]) -> str:
    """Run names; a variant's own name stands for all of its runs, where there are several."""
    variants = collections.defaultdict(list)
    for run in of:
        variants[run.variant].append(run.name)
    whole = {v: own for v, own in variants.items() if len(own) > 1 and set(own) <= set(runs)}
    covered = {name for own in whole.values() for name in own}
    return ", ".join([*whole, *(name for name in runs if name not in covered)])


def _changed(sweep: Sweep) -> Iterable[str]:
    """What the question decides by, if it is not what it was when the first run began."""
    if sweep.then is None or sweep.question is None:
        return
    then, now = sweep.then, question_lib.plan_of(sweep.question)
    changes = [
        f"{what} {then[key]} -> {now[key]}"
        for key, what in (
            ("baseline", "BASELINE"),
            ("metric", "the first metric of FIGURES"),
            ("better", "its better"),
        )
        if then[key] != now[key]
    ]
    before, after = then["contrasts"], now["contrasts"]
    for variant in dict.fromkeys([*before, *after]):
        one, other = before.get(variant, "none"), after.get(variant, "none")
        if one != other:
            changes.append(f"contrast of {variant} {one} -> {other}")
    if changes:
        yield f"The question was changed after its runs began: {'; '.join(changes)}."


def _asked(sweep: Sweep) -> set[str]:
    """Config keys that the question varies: in its overrides, or by taking other recipes.

    A key is a recipe's own if it has one value in all runs of the recipe, overrides apart.
    """
    asked = set(results_lib.differing([run.overrides for run in sweep.planned]))
    recipe = {run.name: run.config for run in sweep.planned}
    by_recipe = collections.defaultdict(list)
    for run in sweep.results:
        by_recipe[recipe.get(run.name, "")].append(run.config)
    if len(by_recipe) > 1:
        varied = results_lib.differing([run.config for run in sweep.results])
        within = {k for configs in by_recipe.values() for k in results_lib.differing(configs)}
        asked |= set(varied) - within
    return asked | _SHARES if "train.steps" in asked else asked


def _not_finite(runs: Sequence[Result]) -> Iterable[str]:
    """Where a loss became null, which means of it silently leave out."""
    for metric in (metrics.LOSS, "train/loss"):
        steps = {
            r.name: next((x["step"] for x in r.lines if metric in x and x[metric] is None), None)
            for r in runs
        }
        found = ", ".join(f"{name} at step {at:,}" for name, at in steps.items() if at is not None)
        if found:
            yield f"Not finite: {metric} of {found}."


def _left_out(runs: Sequence[Result]) -> Iterable[str]:
    """Where batches or updates were left out, so that runs have not seen the same rows."""
    for metric, what in (
        ("train/rewinds", "Went back from a spike and left out batches, times"),
        ("train/skipped", "Left out updates that were not finite"),
    ):
        last = {r.name: [x[metric] for x in r.lines if x.get(metric) is not None] for r in runs}
        found = ", ".join(f"{own[-1]:.0f} in {name}" for name, own in last.items() if any(own[-1:]))
        if found:
            yield f"{what} ({metric}): {found}."


def _incomplete(sweep: Sweep) -> Iterable[str]:
    failed = [name for name, status in sweep.status.items() if status == "failed"]
    if failed:
        yield f"Failed: {names(failed, sweep.planned)}."
    early = [r for r in sweep.results if r.step < r.config["train.steps"]]
    if early:
        ends = (f"{r.name} at step {r.step:,} of {r.config['train.steps']:,}" for r in early)
        yield f"Ended early, or not at their end yet: {', '.join(ends)}."
    partial = {r.name: "yes" if r.yardstick else "none" for r in sweep.results}
    yield from _sentence("Yardstick", partial, sweep.results)


def _other_machine(runs: Sequence[Result]) -> Iterable[str]:
    """Store, code, versions and devices, as the provenance of every start has them."""
    for what, value in (
        ("Other token store", lambda entry: entry["data"][:12]),
        ("Other code (commit)", lambda entry: _commit(entry["commit"])),
        ("Other Python", lambda entry: entry["python"]),
        ("Other devices", lambda entry: "{} x {}".format(*entry["devices"])),
        ("Other number of cores", lambda entry: entry["cores"]),
        ("Other number of processes", lambda entry: entry["processes"]),
        ("Other XLA_FLAGS", lambda entry: entry["xla_flags"] or "none"),
    ):
        yield from _sentence(what, _provenance(runs, value), runs)
    for package in sorted({p for r in runs for entry in r.provenance for p in entry["versions"]}):
        versions = _provenance(runs, lambda entry, p=package: entry["versions"].get(p, "absent"))
        yield from _sentence(f"Other version of {package}", versions, runs)
    for what, is_so in (
        ("Code with uncommitted changes", lambda c: c is not None and c.endswith("+")),
        ("Code of an unknown commit", lambda c: c is None),
    ):
        found = [r.name for r in runs if any(is_so(entry["commit"]) for entry in r.provenance)]
        if found:
            yield f"{what}: {names(found, runs)}."
    for seed in sorted({r.seed for r in runs}):
        pairs = [r for r in runs if r.seed == seed]
        orders = {r.name: r.config["seed.data"] for r in pairs}
        yield from _sentence(f"Other order of rows in repetition {seed} (seed.data)", orders, pairs)


def _other_tokens(runs: Sequence[Result]) -> Iterable[tuple[set[str], str]]:
    planned = {r.name: r.config["train.steps"] * r.step_tokens for r in runs}
    distinct = {r.name: planned[r.name] // r.config["data.copies"] for r in runs}
    for what, counts, keys in (
        ("Other tokens seen", planned, _TOKENS),
        ("Other distinct tokens seen", distinct, (*_TOKENS, "data.copies")),
    ):
        varied = set(results_lib.differing([{k: r.config[k] for k in keys} for r in runs]))
        by_run = {name: f"{count:,}" for name, count in counts.items()}
        for sentence in _sentence(what, by_run, runs):
            yield varied, sentence


def _other_settings(runs: Sequence[Result]) -> Iterable[tuple[set[str], str]]:
    """Every config key that matters; those of an objective among the runs of that objective."""
    counted = {*_TOKENS, "data.copies"}
    for key in _varied(runs):
        by_objective = collections.defaultdict(list)
        for run in runs:
            own = key.startswith("objective.") and key != "objective.name"
            by_objective[run.config["objective.name"] if own else ""].append(run)
        for alike in by_objective.values() if key not in counted else ():
            for sentence in _sentence(f"Other {key}", _texts(alike, key), alike):
                yield {key}, sentence


def _other_within_variants(runs: Sequence[Result]) -> Iterable[str]:
    for variant in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == variant]
        for key in _varied(own):
            yield from _sentence(f"Not one {key} in {variant}", _texts(own, key), ())


def _other_yardstick(runs: Sequence[Result]) -> Iterable[str]:
    have = [r for r in runs if r.yardstick]
    for key in results_lib.differing([r.yardstick["settings"] for r in have]):
        if key == "blimp_score":  # a property of the objective; see metrics.note
            continue
        values = {r.name: json.dumps(r.yardstick["settings"].get(key, "absent")) for r in have}
        yield from _sentence(f"Other yardstick ({key})", values, have)
    averaged = {r.name: "moving average" if r.yardstick["ema"] else "parameters" for r in have}
    yield from _sentence("Other yardstick (of what)", averaged, have)
    old = [r for r in have if r.yardstick["step"] != r.step]
    if old:
        steps = (f"{r.name} at step {r.yardstick['step']:,} of {r.step:,}" for r in old)
        yield f"The yardstick is not of the last step: {', '.join(steps)}."


# ---------------------------------------------------------------------------------------- wording


def _sentence(what: str, by_run: Mapping[str, object], runs: Sequence[Result]) -> Iterable[str]:
    """Nothing if all runs have one value, else a sentence: which runs have which."""
    having = collections.defaultdict(list)
    for name, value in by_run.items():
        having[str(value)].append(name)
    if len(having) > 1:
        *few, (most, others) = sorted(having.items(), key=lambda item: len(item[1]))
        listed = [f"{value} in {names(own, runs)}" for value, own in few]
        rest = (
            f"{most} in the other {len(others)} runs"
            if len(others) > 1
            else f"{most} in {others[0]}"
        )
        yield f"{what}: {'; '.join([*listed, rest])}."


def _provenance(runs: Sequence[Result], value: Callable[[dict], object]) -> dict[str, str]:
    """{run: its value at every start, once each}."""
    return {
        r.name: ", then ".join(dict.fromkeys(str(value(entry)) for entry in r.provenance))
        or "unknown"
        for r in runs
    }


def _varied(runs: Sequence[Result]) -> list[str]:
    keys = results_lib.differing([run.config for run in runs])
    return [key for key in keys if not key.startswith(_NO_MATTER)]


def _texts(runs: Sequence[Result], key: str) -> dict[str, str]:
    return {run.name: json.dumps(run.config.get(key, "absent")) for run in runs}


def _commit(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:10] + "+" * commit.endswith("+")
