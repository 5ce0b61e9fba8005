"""Our training step beside that of Hugging Face transformers, on the CPU of this machine.

    python -m experiments.speed.peers [--peer_python=PYTHON] [--rounds=4] [--steps=4]
        [--objectives=masked_lm,...] [--output=FILE]

Both train the same network (12 layers of 256, 4 heads, 1,024; V = 32,000; 32 rows of 128 positions;
dropout .1; float32) on the same random tokens: ours from a token store through the loader,
transformers through a torch DataLoader and its collators. A step is all of it: the next batch,
corruption, forward, backward, clipping, AdamW. Tokens are positions on both sides, 32 x 128 a step.

Every side is a process of its own, and they take turns, so that only one computes: A B C A B C ...
Those that wait sleep; how much CPU time they took all the same is told. transformers runs as it is
started by itself, and with glibc's large pages (GLIBC_TUNABLES), which our commands ask for. For
MLM it runs a third time, with its head at the labels alone, as ours (gathered_head.py).
`--peer_python` is an interpreter that has torch and transformers, which the project does not need
(the extra `parity` installs them).
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.speed.peers",
        __doc__,
        with_config=False,
        peer_python="interpreter with torch and transformers (default: this one)",
        rounds="turns of each side (default 4)",
        steps="steps of a turn (default 4)",
        objectives="some of masked_lm,causal_lm,replaced_token_detection,permutation_lm (default)",
        output="file that is written (default: experiments/speed/measured/peers.md)",
    )

import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from experiments.speed import page
from experiments.speed.sides import tokens
from experiments.speed.sides.worker import Task
from pretraining import huge_pages
from pretraining.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
OURS = "ours"
PEER = "transformers"
PEER_LARGE_PAGES = "transformers, large pages"
GATHERED = "transformers, head at the labels"
# How the objectives are called in tables, and the class of transformers that they stand beside.
TITLES = {
    "masked_lm": "MLM (BERT)",
    "causal_lm": "CLM (GPT-2)",
    "replaced_token_detection": "RTD (ELECTRA)",
    "permutation_lm": "PLM (XLNet)",
}
ELECTRA_SMALL = dict(
    layers=12,
    width=256,
    heads=4,
    mlp_width=1024,
    vocabulary_size=32_000,
    batch_size=32,
    sequence_length=128,
    dropout=0.1,
)
BATCHES = 64  # in the token store


class Side(NamedTuple):
    """How a side is started.

    Attributes:
      name: in tables.
      python: interpreter.
      module: that serves (sides/worker.py).
      environment: variables that it has beside those of this process, GLIBC_TUNABLES apart.
    """

    name: str
    python: str
    module: str
    environment: Mapping[str, str]


def main(
    peer_python: str | None,
    rounds: str | None,
    steps: str | None,
    objectives: str | None,
    output: str | None,
) -> int:
    """The command."""
    names = _objectives(objectives)
    counts = {
        "rounds": cli.number("rounds", rounds, 4, at_least=1),
        "steps": cli.number("steps", steps, 4, at_least=1),
    }
    path, peer = page.place("peers", output), peer_python or sys.executable
    versions = peer_versions(peer)
    options = {"peer_python": peer_python, **counts, "objectives": objectives}
    origin = page.origin("peers", options, ("jax", "jaxlib", "flax", "optax"), versions)
    measured = []
    for name in names:
        measured.append(measure(name, ELECTRA_SMALL, sides(peer, name), **counts))
        print(table(measured[-1:]), file=sys.stderr, flush=True)
    page.write(path, "# Our training step beside that of transformers", origin, report(measured))
    return 0


def _objectives(chosen: str | None) -> list[str]:
    names = chosen.split(",") if chosen else list(TITLES)
    for name in names:
        if name not in TITLES:
            raise UserError(f"--objectives={name!r}: {', '.join(TITLES)}, or some of them")
    return names


_VERSIONS = "import torch, transformers; print(torch.__version__, transformers.__version__)"


def peer_versions(python: str) -> dict[str, str]:
    """Those of torch and transformers under an interpreter.

    Raises:
      UserError: it has none; what to do.
    """
    try:
        found = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--peer_python={python!r}: {error.strerror}") from None
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
        raise UserError(
            f"--peer_python={python!r} cannot import torch and transformers ({reason}): name an"
            " interpreter that can, or install the extra 'parity'"
        )
    return dict(zip(("torch", "transformers"), found.stdout.split()[-2:], strict=True))


def sides(peer_python: str, objective: str) -> list[Side]:
    """Ours, transformers without and with large pages, and for masked_lm with its head gathered."""
    peer, large = (peer_python, "experiments.speed.sides.hugging_face"), huge_pages.environment()
    found = [
        Side(OURS, sys.executable, "experiments.speed.sides.ours", large),
        Side(PEER, *peer, {}),
        Side(PEER_LARGE_PAGES, *peer, large),
    ]
    if objective == "masked_lm":
        found.append(Side(GATHERED, peer_python, "experiments.speed.sides.gathered_head", large))
    return found


# ------------------------------------------------------------------------------------ measurement


class Measured(NamedTuple):
    """One objective.

    Attributes:
      objective: its name.
      tokens: B x L, of a step.
      facts: {side: what it told at its start}.
      rounds: [{side: {"seconds": of each step, "waits": of each, "memory": bytes,
        NaN where unknown}}].
      peaks: FLOP/s of the best of some matrix products, once a round.
      idle: largest share of one core that those that waited took together during a turn.
    """

    objective: str
    tokens: int
    facts: dict[str, dict[str, Any]]
    rounds: list[dict[str, dict[str, Any]]]
    peaks: list[float]
    idle: float

    def rates(self, side: str) -> list[float]:
        """Tokens per second of each round."""
        return [
            self.tokens * len(each[side]["seconds"]) / sum(each[side]["seconds"])
            for each in self.rounds
        ]

    def compared(self) -> dict[str, str]:
        """{row of the tables: the side that ours stands beside}."""
        title = TITLES[self.objective]
        rows = {
            title: PEER,
            f"{title}, large pages too": PEER_LARGE_PAGES,
            f"{title}, large pages too, its head at the labels": GATHERED,
        }
        return {row: side for row, side in rows.items() if side in self.facts}

    def ratios(self, other: str) -> list[float]:
        """How many times faster ours was, in each round."""
        pairs = zip(self.rates(OURS), self.rates(other), strict=True)
        return [ours / theirs for ours, theirs in pairs]

    def data_wait(self, side: str) -> float:
        """Share of all step time that was spent waiting for batches."""
        waits, seconds = (
            sum(sum(each[side][key]) for each in self.rounds) for key in ("waits", "seconds")
        )
        return waits / seconds

    def flops_per_s(self) -> float:
        """Of our side, the median round."""
        return self.facts[OURS]["flops"] * statistics.median(self.rates(OURS)) / self.tokens


def measure(
    objective: str, sizes: Mapping[str, Any], started: Sequence[Side], rounds: int, steps: int
) -> Measured:
    """Starts the sides, warms them up one after the other, and lets them take turns.

    Args:
      objective: one of TITLES.
      sizes: see `Task`.
      started: the first one is ours.
      rounds, steps: turns of each side, and steps of a turn.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        task = Task(objective=objective, folder=folder, **sizes)
        per_step = task.batch_size * task.sequence_length
        tokens.write(pathlib.Path(folder), task.vocabulary_size, BATCHES * per_step)
        workers, facts = {}, {}
        for side in started:  # one after the other: a start computes too
            workers[side.name] = stack.enter_context(_worker(side, task))
            facts[side.name] = workers[side.name].receive()
        idle, taken, peaks = 0.0, [], []
        for _ in range(rounds):
            peaks.append(workers[OURS].ask({"do": "peak"}))
            taken.append({})
            for name in workers:
                taken[-1][name], share = _turn(workers, name, steps)
                idle = max(idle, share)
    return Measured(objective, per_step, facts, taken, peaks, idle)


def _turn(workers: dict[str, "Worker"], name: str, steps: int) -> tuple[dict[str, Any], float]:
    """What one side answers, and the share of a core that the others took meanwhile."""
    waiting = [worker for other, worker in workers.items() if other != name]
    start, before = time.perf_counter(), sum(worker.cpu_seconds() for worker in waiting)
    answer = workers[name].ask({"do": "steps", "count": steps})
    took = sum(worker.cpu_seconds() for worker in waiting) - before
    return answer, took / (time.perf_counter() - start)


class Worker:
    """A side that runs. Talks in lines of JSON: sides/worker.py."""

    def __init__(self, name: str, process: subprocess.Popen):
        self.name = name
        self._process = process

    def ask(self, request: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.receive()

    def receive(self) -> Any:
        """The next answer.

        Raises:
          UserError: the process has ended instead; why, it has told on stderr.
        """
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise UserError(f"the side {self.name!r} ended with status {status}: see above")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """CPU time of the process with all its threads."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def _worker(side: Side, task: Task) -> Iterator[Worker]:
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [side.python, "-m", side.module, json.dumps(task._asdict())],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"} | dict(side.environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Worker(side.name, process)
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------- report

_SPEEDS = (
    "objective",
    "ours, tokens/s",
    "transformers, tokens/s",
    "ratio",
    "data wait, ours / theirs",
    "share of peak",
    "memory, GiB",
)
_CHECKS = (
    "objective",
    "GFLOP of a step, ours",
    "peak, GFLOP/s",
    "parameters, ours / theirs",
    "first loss, ours / theirs",
    "others' CPU",
)
_NOTES = """\
Medians over rounds, with the lowest and the highest; the ratio is that of each round. The first
step of a turn does not count: memory and caches were others' while a side waited. Share of
peak: matmul FLOPs of our step (pretraining/flops.py; heads on K positions, no recomputation) over
its time and over the fastest float32 matrix product that our process ran in the pauses (peak).
Memory is the resident set at most, in steps, without what compiling took. Others' CPU: the largest
share of one core that the sides that waited took together. Parameters that are shared count once.

What is favourable to transformers: its rows have no padding and no attention mask; special tokens
are known to the collator in advance; gelu is one kernel; AdamW is fused; ELECTRA's samples are
drawn at masked positions alone; XLNet predicts K = L / 6 positions for which query stream and head
alone run (its own collator takes all L), drawn by vectorised code, and has no segments, which our
side has. CLM is GPT-2's network on both sides
(configs/causal_lm.py, GPT2).

What is favourable to ours: our commands ask for large pages of memory; the rows "large pages too"
give them to transformers as well, as people have them who set GLIBC_TUNABLES. The head of MLM and
of RTD's generator, 32,000 wide, runs on the K = 19 predicted positions of a row, where the classes
of transformers run it on all 128. That is a better algorithm, not faster code: the row "its head at
the labels" is the same class, parameters and batches with the head called on the vectors of
predicted tokens, and its ratio is what the implementation alone gains; for RTD there is no such
row. Our loader reads ahead in threads, while the collator of transformers runs between the steps
(num_workers=0; see data wait). torch.compile is not used. A row of ours has one padding among its
128 positions (CLS, 125 tokens, SEP), and tokens are positions. Our dropout takes its bits from a
hash of an element's place (pretraining/models/dropout.py), where PyTorch draws from its
generator."""


def table(measured: Sequence[Measured]) -> str:
    """Speeds: a row for each objective, and one for what is compared beside it."""
    return page.markdown(_SPEEDS, _rows(_speeds, measured))


def report(measured: Sequence[Measured]) -> str:
    """Speeds, by what they can be believed, and notes."""
    checks = page.markdown(_CHECKS, _rows(_checks, measured))
    counts = f"{len(measured[0].rounds)} rounds of {_steps(measured[0])} steps of each side."
    return "\n\n".join([table(measured), checks, f"{counts}\n{_NOTES}"])


def _rows(cells, measured: Sequence[Measured]) -> list[list[str]]:
    return [
        [title, *cells(each, peer)] for each in measured for title, peer in each.compared().items()
    ]


def _speeds(each: Measured, peer: str) -> list[str]:
    return [
        _spread(each.rates(OURS), ",.0f"),
        _spread(each.rates(peer), ",.0f"),
        _spread(each.ratios(peer), ".2f"),
        f"{each.data_wait(OURS):.2%} / {each.data_wait(peer):.2%}",
        f"{each.flops_per_s() / max(each.peaks):.1%}",
        " / ".join(_memory(each, side) for side in (OURS, peer)),
    ]


def _memory(each: Measured, side: str) -> str:
    peak = each.rounds[-1][side]["memory"]  # of all rounds so far
    return "unknown" if math.isnan(peak) else f"{peak / 2**30:.2f}"


def _checks(each: Measured, peer: str) -> list[str]:
    facts = [each.facts[side] for side in (OURS, peer)]
    return [
        f"{facts[0]['flops'] / 1e9:,.1f}",
        f"{max(each.peaks) / 1e9:,.0f}",
        " / ".join(f"{fact['parameters']:,}" for fact in facts),
        " / ".join(f"{fact['first_loss']:.2f}" for fact in facts),
        f"{each.idle:.1%}",
    ]


def _spread(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def _steps(each: Measured) -> int:
    return len(each.rounds[0][OURS]["seconds"])
