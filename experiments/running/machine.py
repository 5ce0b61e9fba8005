"""How runs that go on at once share one machine."""

import os
import subprocess
from typing import NamedTuple

from pretraining.errors import UserError


class Share(NamedTuple):
    """The part of the machine that one run gets.

    Attributes:
      cores: numbers of the CPU cores; () = whichever are free.
      environment: variables that show it its accelerators.
    """

    cores: tuple[int, ...]
    environment: dict[str, str]


def shares(jobs: int | None) -> list[Share]:
    """One for each run that goes on at once.

    Every run gets as many cores as any other, because the last bits of a run depend on their
    number; cores that are left over stay idle. With GPUs each run gets those that its number makes
    out: several each, or one that it shares with others and of whose memory it takes a part.

    Args:
      jobs: None = one per GPU, or one.

    Raises:
      UserError: there are more jobs than cores.
    """
    gpus = _gpus()
    jobs = jobs or len(gpus) or 1
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores and jobs > len(cores):
        raise UserError(f"--jobs={jobs}: this machine has {len(cores)} cores")
    each = len(cores) // jobs
    return [
        Share(tuple(cores[each * job : each * (job + 1)]), _show(gpus, job, jobs))
        for job in range(jobs)
    ]


def bind(cores: tuple[int, ...]) -> None:
    """Keeps this process, and those that it starts, on some cores."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _show(gpus: list[str], job: int, jobs: int) -> dict[str, str]:
    if not gpus:
        return {}
    if each := len(gpus) // jobs:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[each * job : each * (job + 1)])}
    together = -(-jobs // len(gpus))
    return {
        "CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)],
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / together:.2f}",
    }


def _gpus() -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves, as it names them; asked without starting CUDA."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(number) for number in range(count)]
