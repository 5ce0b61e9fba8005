"""One side of a comparison: a process that computes when it is asked to, and else sleeps.

Requests and answers are lines of JSON on stdin and stdout. It imports the standard library alone:
a side may run under another interpreter, without anything that the project needs.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.speed.sides import memory


class Task(NamedTuple):
    """What both sides train. Letters: B rows of L positions.

    Attributes:
      objective: its name in objectives/.
      folder: what `tokens.write` has written.
      layers, width, heads, mlp_width: of the (discriminator's) Transformer.
      vocabulary_size: ids; the first five are [PAD] [UNK] [CLS] [SEP] [MASK].
      batch_size: B.
      sequence_length: L.
      dropout: of hidden vectors and of attention probabilities.
    """

    objective: str
    folder: str
    layers: int
    width: int
    heads: int
    mlp_width: int
    vocabulary_size: int
    batch_size: int
    sequence_length: int
    dropout: float


class Side(NamedTuple):
    """What a side can do.

    Attributes:
      facts: told to the parent once: `parameters`, their number, and of our side `flops` of a step.
      take: () -> the next batch.
      update: batch -> loss; returns when the parameters are updated.
      peak: () -> FLOP/s of this machine at its best; None where nobody asks for it.
    """

    facts: dict[str, Any]
    take: Callable[[], Any]
    update: Callable[[Any], float]
    peak: Callable[[], float] | None = None


WARM_UP = 2  # steps before the first request: what is compiled or allocated once is


def serve(start: Callable[[Task], Side]) -> None:
    """The whole process: builds the side, warms it up, and answers until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    side = start(Task(**json.loads(sys.argv[1])))
    losses = [side.update(side.take()) for _ in range(WARM_UP)]
    peak_memory = memory.Peak()  # that of steps, not of a compiler
    _send(channel, side.facts | {"first_loss": losses[0]})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "steps":
            _send(channel, _time_steps(side, request["count"]) | {"memory": peak_memory.bytes()})
        else:
            _send(channel, side.peak())


def _send(channel, answer: Any) -> None:
    channel.write(json.dumps(answer) + "\n")


def _time_steps(side: Side, count: int) -> dict[str, list[float]]:
    """Seconds of each step, and how many of them it waited for its batch.

    One step goes before that does not count: while this side waited, others took the caches and
    the pages that it had freed.
    """
    side.update(side.take())
    seconds, waits = [], []
    for _ in range(count):
        start = time.perf_counter()
        batch = side.take()
        waits.append(time.perf_counter() - start)
        side.update(batch)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "waits": waits}
