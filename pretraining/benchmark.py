"""Times the training step of a config and prints one JSON line.

    python -m pretraining.benchmark --config=configs/masked_lm.py:tiny [--steps=N] [--tokens=random]

A step is that of training, whole: the next rows, corruption, forward and backward pass, optimizer,
and the figures of the step before fetched while this one runs. `step_s` is the median time from one
step's end to the next's; `tokens_per_s` counts payload tokens (batch_size x (sequence_length - 3));
`data_wait` is the share of all step time spent on getting rows and putting them on the devices;
`mfu` = `flops_per_step` / (`step_s` x `peak_flops`), both as in pretraining/flops.py: matmuls,
forward x 3, and on a CPU its measured float32 peak. `peak_memory_bytes` is the device's, or on a
CPU the whole process's. `--tokens=random` needs no corpus: random rows of a vocabulary of
config.tokenizer.size.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.benchmark",
        __doc__,
        steps="steps that are timed (default 20)",
        tokens="corpus (default) | random",
    )

import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pretraining import config as config_lib
from pretraining import flops, metrics, sharding
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining.data import loader, prepare, tokenizer
from pretraining.data.row import SPECIAL_POSITIONS, WORD_START, Row
from pretraining.errors import UserError


def main(config, steps: str | None, tokens: str | None) -> int:
    """The command; the JSON line is the last that it prints."""
    count = cli.number("steps", steps, 20, at_least=2)
    if tokens not in (None, "corpus", "random"):
        raise UserError(f"--tokens={tokens!r}: corpus (the default) or random")
    print(json.dumps(measure(config, count, tokens == "random")))
    return 0


def measure(config, steps: int, random_tokens: bool) -> dict:
    """The figures; see the module's docstring."""
    config_lib.validate(config)
    if random_tokens:
        vocabulary = tokenizer.stand_in(config.tokenizer.size)
        config = config_lib.without_epochs(config)
        batches = random_batches(config, vocabulary)
    else:
        prepared = prepare.prepare(config)
        vocabulary = prepared.vocabulary
        rows = program_lib.rows_per_epoch(prepared, config)
        config = config_lib.resolve_durations(config, rows)
        batches = loader.train_batches(prepared.train, config, 0)
    program = program_lib.build(config, vocabulary)
    state = state_lib.init(program.objective, program.optimizer, config, program.mesh)
    compile_start = time.perf_counter()
    update = program_lib.compile_update(program, config)
    compile_s = time.perf_counter() - compile_start
    put = lambda rows: sharding.put_rows(rows, program.mesh, config.train.batch_size)
    step = lambda state, rows: update(state, rows, program.seeds)
    step_times, waits = time_steps(step, state, map(put, batches), steps)
    step_s = float(np.median(step_times))
    payload = config.data.sequence_length - SPECIAL_POSITIONS
    step_flops, peak = flops.step_flops(config, vocabulary), flops.peak_flops(config)
    return {
        "objective": config.objective.name,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "tokens_per_s": config.train.batch_size * payload / step_s,
        "step_s": step_s,
        "mfu": step_flops / step_s / peak,
        "flops_per_step": step_flops,
        "peak_flops": peak,
        "data_wait": sum(waits) / sum(step_times),
        "peak_memory_bytes": peak_memory(),
        "compile_s": compile_s,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": steps,
        "tokens": "random" if random_tokens else "corpus",
    }


def time_steps(update, state, batches: Iterator[Any], steps: int) -> tuple[list, list]:
    """Seconds of each of `steps` steps, and of these those spent waiting for the next of `batches`.

    As the loop of training runs them: the figures of a step are fetched once the next one has been
    started. The first step, which touches all memory for the first time, is not timed.

    Args:
      update: `(state, rows) -> (state, figures)`.
      state: is used up.
      batches: rows on the devices; one is taken for each step and the two around them.
    """
    state, running = update(state, next(batches))
    ends, waits = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        rows = next(batches)
        waits.append(time.perf_counter() - start)
        state, started = update(state, rows)
        metrics.fetch(running)
        ends.append(time.perf_counter())
        running = started
    jax.block_until_ready(running)
    return np.diff(ends).tolist(), waits[1:]


def peak_memory() -> int:
    """Bytes in use at most: of the first device, or of this process where that is not told."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def random_batches(config, vocabulary: tokenizer.Vocabulary):
    """Endless batches of full rows of random tokens."""
    batch, payload = config.train.batch_size, config.data.sequence_length - SPECIAL_POSITIONS
    generator = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special_ids).astype(np.int32)
    for _ in itertools.count():
        tokens = generator.choice(ordinary, (batch, payload))
        yield Row(
            tokens=tokens,
            length=np.full(batch, payload, np.int32),
            document=np.zeros((batch, payload), np.int32),
            boundary=np.where(vocabulary.word_start[tokens], WORD_START, 0).astype(np.uint8),
            index=np.arange(batch, dtype=np.int32) // config.data.copies,
            copy=np.arange(batch, dtype=np.int32) % config.data.copies,
        )
