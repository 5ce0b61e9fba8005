"""Injects faults into real runs, one at a time, and prints what became of them.

    python -m tests.faults --all
    python -m tests.faults --only=kill,signals --objectives=masked_lm --kills=10

Every objective's tiny recipe is trained undisturbed once; after each fault a run must end equal to
that one bit for bit, timings apart. Exits with 1 if one did not, if a fault was not survived, and
with --all if one could not be injected here.
"""

import argparse
import concurrent.futures
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable

from tests.faults import bench as runs
from tests.faults import kills, storage, suites, updates
from tests.faults.outcome import Outcome, table


def faults(count: int, seed: int) -> dict[str, Callable[[runs.Bench], Outcome]]:
    """{name: what injects the fault}."""
    return {
        "kill": functools.partial(kills.kill_often, seed=seed, count=count),
        "signals": functools.partial(kills.stop_by_signal, seed=seed),
        "checkpoint": functools.partial(storage.damage_checkpoints, seed=seed),
        "disk": storage.fill_disk,
        "store": functools.partial(storage.damage_store, seed=seed),
        "metrics": functools.partial(storage.cut_metrics, seed=seed),
        "not_finite": functools.partial(updates.not_finite, seed=seed),
        "spike": functools.partial(updates.spike, seed=seed),
    }


def main() -> int:
    options = _options()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from pretraining.config import objective_names

    injected = faults(options.kills, options.seed)
    names = _chosen("only", options.only, injected)
    objectives = _chosen("objectives", options.objectives, objective_names())
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="faults-") as folder:
        place = pathlib.Path(folder)
        benches = [runs.create(place, objective) for objective in objectives]
        runs.reference(benches[0])  # prepares the store that all read
        jobs = [
            (name, bench.objective, functools.partial(injected[name], bench))
            for name in names
            for bench in benches
        ]
        if options.all:
            run = functools.partial(suites.run, folder=place)
            jobs += [(name, "-", functools.partial(run, name)) for name in suites.FILES]
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(runs.reference, benches))
            outcomes = list(_progress(pool.map(lambda job: _inject(*job), jobs), jobs))
    print(table(outcomes))
    return status(outcomes, options.all)


def status(outcomes: Iterable[Outcome], everything: bool) -> int:
    """0 = all passed; where everything is asked for, nothing may have been skipped."""
    return int(not all(each.passed and not (everything and each.skipped) for each in outcomes))


def _inject(name: str, objective: str, inject: Callable[[], Outcome]) -> Outcome:
    """One fault; what goes wrong in the injection itself counts as a failure, too."""
    try:
        return inject()
    except Exception as error:
        return Outcome(name, objective, complaints=[f"{type(error).__name__}: {error}"])


def _progress(outcomes: Iterable[Outcome], jobs: list) -> Iterable[Outcome]:
    """A bar on a terminal, elsewhere a line for each outcome; and what is to be complained of."""
    from tqdm import tqdm

    for each in tqdm(outcomes, total=len(jobs), unit="fault", disable=None):
        word = "survived" if each.passed else "FAILED"
        word = f"skipped: {each.skipped}" if each.passed and each.skipped else word
        lines = [] if sys.stderr.isatty() else [word]
        for line in lines + each.complaints:
            tqdm.write(f"{each.fault}, {each.objective}: {line}", file=sys.stderr)
        yield each


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--all", action="store_true", help="every fault, and tests of others")
    parser.add_argument("--only", help=f"of {', '.join(faults(0, 0))}")
    parser.add_argument("--objectives", help="names; all if not given")
    parser.add_argument("--kills", type=int, default=50, help="of each objective")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--jobs", type=int, default=2, help="faults injected side by side")
    parser.add_argument("--folder", help="where the runs are made; else with other temporary files")
    options = parser.parse_args()
    if not (options.all or options.only):
        parser.error("--all, or --only=...")
    return options


def _chosen(option: str, written: str | None, known: Iterable[str]) -> list[str]:
    chosen = written.split(",") if written else list(known)
    if unknown := set(chosen) - set(known):
        sys.exit(f"error: --{option}: {', '.join(sorted(unknown))} of {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
