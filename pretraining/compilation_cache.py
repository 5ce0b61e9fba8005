"""Compiled programs, kept from one start to the next: JAX's persistent compilation cache.

It lies in the folder `compiled` of the project's cache (`config.data.cache`, else
$PRETRAINING_CACHE, else ~/.cache/pretraining), unless the user has chosen another one
(JAX_COMPILATION_CACHE_DIR, `jax.config`): then nothing is changed here. JAX's other variables are
heeded too (JAX_COMPILATION_CACHE_MAX_SIZE). Off: JAX_ENABLE_COMPILATION_CACHE=false.

An entry is found by a hash of the program, the compiler's version and options and the devices, and
holds the executable that the compiler made, so a run that is resumed with it remains the same bit
for bit. Processes lock the folder while they read or write; of a run of several, process 0 writes.
What was compiled for one CPU may hold instructions that another lacks, and is divided among as many
cores as there were, hence a folder for each type of CPU and number of cores: caches are shared.
Who can write to the folder decides what is executed.
"""

import hashlib
import os
import pathlib
import platform
import sys

import filelock
import jax

from pretraining import processes
from pretraining.data import cache

MAX_BYTES = 2 << 30  # above it the programs unused for longest go; one of ours takes 0.1 to 20 MB
_NO_LIMIT = -1  # of size, in JAX's words
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_TYPE = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # lines of x86, of ARM
_WAIT_S = 10.0  # for the lock of the folder, as long as JAX waits
_PROGRAM, _USED = "-cache", "-atime"  # endings of JAX's files: an entry, and when it was last used


def use(data_config) -> None:
    """Keeps what this process compiles from now on, and reads what others have kept.

    Args:
      data_config: a config's section `data`, see `cache.root`.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache.root(data_config) / "compiled" / _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _choose_settings()
        if jax.config.jax_compilation_cache_max_size != _NO_LIMIT:
            _remove_remains(folder)
    except OSError as error:  # also where another process holds the lock for long
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _choose_settings() -> None:
    """Sets what the user leaves open."""
    settings = {
        "jax_compilation_cache_max_size": MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # small ones add up
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _cpu() -> str:
    """A hash of the type of this machine's CPU and of the cores that this process may use."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []  # Linux has it
    facts = [platform.system(), platform.machine(), platform.processor(), str(processes.cores())]
    facts += sorted({line for line in lines if line.startswith(_TYPE)})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _remove_remains(folder: pathlib.Path) -> None:
    """Entries in whose writing a process died; JAX would stumble over them at every start.

    It notes the use of an entry as the last thing of writing it, before it gives back the lock;
    without a limit of size it notes none.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=_WAIT_S):
        for entry in folder.glob(f"*{_PROGRAM}"):
            if not entry.with_name(entry.name.removesuffix(_PROGRAM) + _USED).exists():
                entry.unlink()
