"""How time and memory of a training step grow with what it is asked for: tables, exponents, curves.

    python -m experiments.speed.costs [--part=growth|kernels] [--rounds=7] [--output=FILE]

`growth`, on the devices of this machine: one size at a time is varied around a small masked
language model. `kernels`, compiled with libtpu for a TPU that need not be here and never run: the
memory of attention by the XLA path and by splash, against length. Without --part both.

Written are measured/costs_<part>.md and .svg, or FILE, of one part, and its .svg. An exponent is
the slope of a least-squares line through the logarithms: 1 = doubles with the size. That of the
last two points stands below it, because whatever does not grow (the layers, beside a larger
vocabulary) flattens the line at its small end. Memory is the compiler's own account of the update,
which does not vary; times are medians of rounds in which every point makes one step.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.speed.costs",
        __doc__,
        with_config=False,
        part="growth | kernels (default: both)",
        rounds="rounds of growth that are timed (default 7)",
        output="file that one part writes (default: experiments/speed/measured/costs_<part>.md)",
    )

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.speed import page
from experiments.speed.sides import memory
from pretraining import benchmark, flops, plan, sharding
from pretraining import config as config_lib
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining.data import tokenizer
from pretraining.errors import UserError
from pretraining.models import attention

MIB = 2**20
RECIPE = "configs/masked_lm.py:tiny"
BASE = {
    "train.batch_size": 16,
    "data.sequence_length": 128,
    "model.layers": 4,
    "tokenizer.size": 8192,
    "objective.mask_rate": 0.2,
}
# What is varied, and its values; the others stay at BASE, which is one of them.
GROWTH = {
    "batch": ("train.batch_size", (4, 8, 16, 32, 64)),
    "length": ("data.sequence_length", (64, 128, 256, 512, 1024)),
    "depth": ("model.layers", (1, 2, 4, 8, 16)),
    "vocabulary": ("tokenizer.size", (2048, 8192, 16384, 32768)),
    "mask rate": ("objective.mask_rate", (0.05, 0.1, 0.2, 0.4, 0.8)),
}

TOPOLOGY = "v5e:2x2"  # the smallest that libtpu describes; one of its chips is used
TPU_RECIPE = "configs/causal_lm.py:tiny"
TPU_TOKENS, TPU_ROWS = 8192, 16
PACKAGES = {"growth": ("jax", "jaxlib"), "kernels": ("jax", "jaxlib", "libtpu")}
LENGTHS = (512, 1024, 2048, 4096, 8192)
TPU = {"model.dtype": "bfloat16", "model.execution": "scanned", "tokenizer.size": 4096}


def main(part: str | None, rounds: str | None, output: str | None) -> int:
    """The command."""
    count = cli.number("rounds", rounds, 7, at_least=2)
    parts = {"growth": functools.partial(growth, count), "kernels": kernels}
    if part not in (None, *parts):
        raise UserError(f"--part={part!r}: {' or '.join(parts)}, or left out for both")
    if output and not part:
        raise UserError(
            f"--output={output!r} is one page: choose --part={' or --part='.join(parts)}"
        )
    paths = {name: page.place(f"costs_{name}", output) for name in ([part] if part else parts)}
    for name, path in paths.items():
        options = {"part": name, "rounds": count if name == "growth" else None}
        origin = page.origin("costs", options, PACKAGES[name])
        text, figure = parts[name]()
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        page.write(path, f"# Costs: {name}", origin, text)
    return 0


# ------------------------------------------------------------------------------------------ growth


class Cost(NamedTuple):
    """What one step takes.

    Attributes:
      step_s: median seconds.
      flops: of its matrix products, see pretraining/flops.py.
      temporaries, arguments: bytes by the compiler's account: activations and gradients; state and
        batch.
      process: bytes by which a step raises this process's peak above what it held before; NaN where
        the system does not tell.
    """

    step_s: float
    flops: float
    temporaries: float
    arguments: float
    process: float


class Step:
    """A compiled update with its state and one batch, to be run again and again."""

    def __init__(self, overrides: Mapping[str, Any]):
        config = config_lib.without_epochs(config_lib.load(RECIPE, BASE | dict(overrides)))
        vocabulary = tokenizer.stand_in(config.tokenizer.size)
        program = program_lib.build(config, vocabulary)
        rows = next(benchmark.random_batches(config, vocabulary))
        self._rows = sharding.put_rows(rows, program.mesh, config.train.batch_size)
        self._state = state_lib.init(program.objective, program.optimizer, config, program.mesh)
        self._seeds = program.seeds
        self._update = program_lib.compile_update(program, config)
        self.flops = flops.step_flops(config, vocabulary)
        self.memory = self._update.memory_analysis()

    def run(self) -> tuple[float, float]:
        """(seconds, bytes of the process) of one more step."""
        peak, start = memory.Peak(), time.perf_counter()
        self._state, figures = self._update(self._state, self._rows, self._seeds)
        jax.block_until_ready(figures)
        return time.perf_counter() - start, peak.bytes() - peak.held


def growth(rounds: int) -> tuple[str, Figure]:
    """The tables of all that GROWTH varies, and their curves."""
    wanted = [(name, value) for name, (_, values) in GROWTH.items() for value in values]
    steps = {point: Step({GROWTH[point[0]][0]: point[1]}) for point in wanted}
    costs = _measure(steps, rounds)
    curves = {
        name: {value: costs[name, value] for value in values}
        for name, (_, values) in GROWTH.items()
    }
    base = ", ".join(f"{key}={value}" for key, value in BASE.items())
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    text = [f"`{RECIPE}` with {base}; one of them is varied at a time, on {devices}."]
    text += [_growth_table(name, curve) for name, curve in curves.items()]
    shown = {"step, s": "step_s", "temporaries, MiB": "temporaries"}
    panels = {
        name: {
            label: {
                x: getattr(cost, field) / (MIB if "MiB" in label else 1) for x, cost in c.items()
            }
            for label, field in shown.items()
        }
        for name, c in curves.items()
    }
    return "\n\n".join(text), figure(panels)


def _measure(steps: Mapping[Any, Step], rounds: int) -> dict[Any, Cost]:
    """Interleaved, so that a busy moment of the machine hits all points alike; the first round,
    which touches all memory for the first time, does not count."""
    found = [{point: step.run() for point, step in steps.items()} for _ in range(rounds + 1)][1:]
    return {
        point: Cost(
            step_s=float(np.median([each[point][0] for each in found])),
            flops=step.flops,
            temporaries=step.memory.temp_size_in_bytes,
            arguments=step.memory.argument_size_in_bytes,
            process=float(np.median([each[point][1] for each in found])),
        )
        for point, step in steps.items()
    }


def _growth_table(name: str, curve: Mapping[float, Cost]) -> str:
    columns: dict[str, Callable[[Cost], float]] = {
        "step, ms": lambda cost: cost.step_s * 1e3,
        "GFLOP": lambda cost: cost.flops / 1e9,
        "GFLOP/s": lambda cost: cost.flops / cost.step_s / 1e9,
        "temporaries, MiB": lambda cost: cost.temporaries / MIB,
        "arguments, MiB": lambda cost: cost.arguments / MIB,
        "process, MiB": lambda cost: cost.process / MIB,
    }
    values = {
        label: {x: read(cost) for x, cost in curve.items()} for label, read in columns.items()
    }
    return table(name, values)


# ----------------------------------------------------------------------------------------- kernels


def kernels() -> tuple[str, Figure]:
    """Temporaries of an update for a TPU against length, of both kernels; and who has none."""
    device = plan.devices(TOPOLOGY)[0]
    settings = {
        f"{TPU_TOKENS} tokens a batch": {length: TPU_TOKENS // length for length in LENGTHS},
        # Of fewer tokens the compiler keeps much in the chip's fast memory, outside this account;
        # more than 4,096 positions of so many rows XLA's scores leave no room for.
        f"{TPU_ROWS} rows a batch": {length: TPU_ROWS for length in LENGTHS if length <= 4096},
    }
    panels = {
        f"length, {setting}": {
            f"{kernel}, MiB": {
                length: _temporaries(device, kernel, length, count) / MIB
                for length, count in rows.items()
            }
            for kernel in ("xla", "splash")
        }
        for setting, rows in settings.items()
    }
    text = [
        f"Temporaries of the update of `{TPU_RECIPE}` (bfloat16, scanned layers), compiled for one "
        f"chip of {TOPOLOGY} by libtpu, not run."
    ]
    text += [table(name, values) for name, values in panels.items()]
    return "\n\n".join([*text, unserved()]), figure(panels)


@functools.cache
def _temporaries(device, kernel: str, length: int, rows: int) -> float:
    """Bytes of an update of `rows` rows."""
    sizes = {"data.sequence_length": length, "train.batch_size": rows, "evaluate.batch_size": 1}
    overrides = TPU | sizes | {"model.attention": kernel}
    config = config_lib.without_epochs(config_lib.load(TPU_RECIPE, overrides))
    program = program_lib.build(config, tokenizer.stand_in(config.tokenizer.size), [device])
    return program_lib.compile_update(program, config).memory_analysis().temp_size_in_bytes


# What a config may ask of attention, as `attention.check_kernel` wants it told.
_ASKED = {
    "causal or padded, without dropout (all objectives but permutation_lm)": {},
    "dropout of the probabilities (config.model.attention_dropout)": {"dropout_rate": 0.1},
    "documents apart (config.model.document_attention)": {"by_document": True},
    "any order and relative positions (permutation_lm)": {"by_rank": True, "by_distance": True},
    "float32 (config.model.dtype)": {"dtype": "float32"},
    "heads of 12": {"head_width": 12},
    "a length of 1,000": {"sequence_length": 1000},
}
_USUAL = dict(
    dtype="bfloat16", dropout_rate=0.0, by_document=False, head_width=64, sequence_length=1024
)


def unserved() -> str:
    """Which kernel serves what, by the refusals of the program itself."""
    rows = [
        [asked, *(_served(kernel, facts) for kernel in ("splash", "cudnn"))]
        for asked, facts in _ASKED.items()
    ]
    served = page.markdown(("attention", "splash (TPU)", "cudnn (GPU)"), rows)
    return (
        f"{served}\n\nWhere a kernel does not serve, the XLA path does, with memory quadratic in "
        "length. The cuDNN kernel cannot be compiled without a GPU: its memory is not in these "
        "tables."
    )


def _served(kernel: str, facts: Mapping[str, Any]) -> str:
    try:
        attention.check_kernel(kernel, **_USUAL | dict(facts))
    except UserError:
        return "no"
    return "yes"


# ------------------------------------------------------------------------------- tables and curves

Curve = Mapping[float, float]  # size -> cost


def exponent(curve: Curve) -> float:
    """b of cost = a x size^b, by least squares of the logarithms; NaN where a cost is none."""
    if not min(curve.values()) > 0:
        return np.nan
    sizes, costs = np.log(list(curve)), np.log(list(curve.values()))
    return float(np.polyfit(sizes, costs, 1)[0])


def table(name: str, columns: Mapping[str, Curve]) -> str:
    """Markdown: a line per size, and the exponents below."""
    sizes = list(next(iter(columns.values())))
    values = {f"{x:g}": [curve[x] for curve in columns.values()] for x in sizes}
    values["exponent"] = [exponent(curve) for curve in columns.values()]
    last = [{x: curve[x] for x in sizes[-2:]} for curve in columns.values()]
    values["of the last two"] = [exponent(curve) for curve in last]
    return page.markdown((name, *columns), [[k, *map(_short, v)] for k, v in values.items()])


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure(panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """A panel for each name, its curves on logarithmic axes, each with its exponent."""
    drawn = Figure(figsize=(3.4 * len(panels), 3.4), layout="constrained", facecolor="white")
    for axis, (name, curves) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        for label, curve in curves.items():
            text = f"{label}: {exponent(curve):.2f}"
            axis.loglog(list(curve), list(curve.values()), "o-", label=text)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="exponent", title_fontsize=8)
    return drawn
