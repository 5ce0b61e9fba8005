"""Strict numerics and eight simulated devices for every test."""

import collections
import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the time of the tests is compilation, and most programs are compiled more than once: again
# after `_bounded_memory`, in the processes that tests start, and at the next run of the tests.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".pytest_cache/compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

from pretraining import program
from pretraining.config import objective_names
from tests import running
from tests.faults import bench

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder of all the processes that run tests; pytest-xdist gives each one of its own, too."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextlib.contextmanager
def once(folder: pathlib.Path, name: str):
    """True for the first of those processes that comes here; the others wait until it is done."""
    with open(folder / f"{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield os.fstat(lock.fileno()).st_size == 0
        lock.write("done")


@pytest.fixture(scope="session")
def small_corpus(shared) -> pathlib.Path:
    """600 documents in which a word tells much about the next one."""
    path = shared / "small.txt"
    with once(shared, "corpus") as first:
        if first:
            bench.write_corpus(path)
    return path


@pytest.fixture(scope="session")
def small_overrides(small_corpus, shared) -> dict:
    """Overrides that make any recipe's model and data as small as a test wants them."""
    return bench.SMALL | {"data.corpus": str(small_corpus), "data.cache": str(shared / "cache")}


@pytest.fixture(scope="session")
def command():
    """Starts `python -m <module> --config=<recipe> --config.<key>=<value> ...` as a process."""

    def start(module, recipe=None, overrides=None, options=(), devices=1):
        words = [sys.executable, "-m", module, *options]
        words += [f"--config={recipe}"] if recipe else []
        words += [f"--config.{key}={value}" for key, value in (overrides or {}).items()]
        return running.start(words, devices)

    return start


@pytest.fixture(scope="session")
def run_overrides(small_overrides) -> dict:
    """The small run with everything on that a resumed run could get wrong."""
    return bench.OVERRIDES | small_overrides


@pytest.fixture(scope="session")
def trained(run_overrides, command, shared) -> dict[str, pathlib.Path]:
    """{objective: folder} of runs of 40 steps that nothing disturbed."""

    def train(objective):
        folder = shared / "trained" / objective
        recipe, options = f"configs/{objective}.py:tiny", [f"--workdir={folder}"]
        process = command("pretraining.train", recipe, run_overrides, options)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "Validation, step 40" in out

    with once(shared, "trained") as first:
        if first:
            train(objective_names()[0])  # prepares the store that the others read
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                collections.deque(pool.map(train, objective_names()[1:]))
    return {objective: shared / "trained" / objective for objective in objective_names()}


@pytest.fixture
def never_compile(monkeypatch):
    """In the folder of the project; what is refused is refused before the update is even built."""

    def compiled(*_):
        raise AssertionError("it went on to compile")

    monkeypatch.chdir(running.ROOT)
    monkeypatch.setattr(program, "jitted", compiled)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """What one file compiled is of no use to the next."""
    yield
    jax.clear_caches()
