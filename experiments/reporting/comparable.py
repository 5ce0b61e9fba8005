"""Were the runs done alike? Every difference is named, and which runs have it."""

import collections
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiments import results as results_lib
from experiments.reporting import metrics
from experiments.reporting.source import Sweep
from experiments.results import Result

# Config keys that decide what the evaluation in training asks, besides those of the objective; how
# often it does is no matter.
_EVALUATION = re.compile(
    r"evaluate\.(?!every$)|data\.(validation|sequence_length)$|seed\.evaluation$"
)
_TOKENS = ("train.steps", "train.batch_size", "data.sequence_length")


def differences(sweep: Sweep) -> tuple[list[str], list[str]]:
    """Sentences: what makes runs not comparable, and what differs because the question asks it.

    A difference is the question's own when it comes from a config key that the question's runs
    override with different values; where the question is not known, none is.
    """
    runs, asked = sweep.results, _asked(sweep)
    faults = [*_incomplete(sweep), *_other_machine(runs), *_other_yardstick(runs)]
    own = []
    for keys, sentence in (*_other_tokens(runs), *_other_evaluation(runs)):
        (own if keys & asked else faults).append(sentence)
    return faults, own


def _asked(sweep: Sweep) -> set[str]:
    """Config keys that the question varies; all of `objective` where its recipes differ."""
    keys = set(results_lib.differing([run.overrides for run in sweep.planned]))
    if len({run.config for run in sweep.planned}) > 1:
        keys |= {k for r in sweep.results for k in r.config if k.startswith("objective.")}
    return {key for key in keys if not key.startswith("seed.")}


def _incomplete(sweep: Sweep) -> Iterable[str]:
    if sweep.missing:
        yield f"Missing: {_names(sweep.missing, ())}."
    failed = [name for name, status in sweep.status.items() if status == "failed"]
    if failed:
        yield f"Failed: {_names(failed, ())}."
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
            yield f"{what}: {_names(found, runs)}."
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


def _other_evaluation(runs: Sequence[Result]) -> Iterable[tuple[set[str], str]]:
    """Keys of the objective among runs of one objective only: of others no figure is compared."""
    keys = {key for r in runs for key in r.config}
    for key in sorted(k for k in keys if _EVALUATION.match(k) or metrics.changes_evaluation(k)):
        by_objective = collections.defaultdict(list)
        for run in runs:
            name = run.config["objective.name"] if key.startswith("objective.") else ""
            by_objective[name].append(run)
        for alike in by_objective.values():
            values = {r.name: json.dumps(r.config.get(key, "absent")) for r in alike}
            for sentence in _sentence(f"Other evaluation ({key})", values, alike):
                yield {key}, sentence


def _other_yardstick(runs: Sequence[Result]) -> Iterable[str]:
    have = [r for r in runs if r.yardstick]
    for key in results_lib.differing([r.yardstick["settings"] for r in have]):
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
    names = collections.defaultdict(list)
    for name, value in by_run.items():
        names[str(value)].append(name)
    if len(names) > 1:
        *few, (most, others) = sorted(names.items(), key=lambda item: len(item[1]))
        listed = [f"{value} in {_names(own, runs)}" for value, own in few]
        rest = (
            f"{most} in the other {len(others)} runs"
            if len(others) > 1
            else f"{most} in {others[0]}"
        )
        yield f"{what}: {'; '.join([*listed, rest])}."


def _names(names: Sequence[str], runs: Sequence[Result]) -> str:
    """Run names; a variant's own name stands for all of its runs, where there are several."""
    variants = collections.defaultdict(list)
    for run in runs:
        variants[run.variant].append(run.name)
    whole = {v: own for v, own in variants.items() if len(own) > 1 and set(own) <= set(names)}
    covered = {name for own in whole.values() for name in own}
    return ", ".join([*whole, *(name for name in names if name not in covered)])


def _provenance(runs: Sequence[Result], value: Callable[[dict], object]) -> dict[str, str]:
    """{run: its value at every start, once each}."""
    return {
        r.name: ", then ".join(dict.fromkeys(str(value(entry)) for entry in r.provenance))
        or "unknown"
        for r in runs
    }


def _commit(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:10] + "+" * commit.endswith("+")
