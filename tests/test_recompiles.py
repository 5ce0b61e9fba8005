"""A run compiles each function once, and its loop waits for the device in one place, one step late.

What the loop does is written down while it trains, on eight simulated devices: an array that lies
on several cannot be read but through `jax.Array._value`, which `float`, `item`, `np.asarray` and
`jax.device_get` come to, whereas one that lies on a single CPU lends NumPy its memory unseen.
"""

import collections
import os
import signal
import threading

import jax
import pytest

from pretraining import config as config_lib
from pretraining import goodput, metrics, report, train
from pretraining import program as program_lib
from tests import running

STEPS, STOPPED_AT, EVALUATE_EVERY = 8, 6, 4
CORPORA = ("validation", "another set", "validation under the moving average")
LOOP = ("data_wait", "step", "evaluate", "save")  # phases of the ledger
COMPILED = "/jax/core/compile/backend_compile_duration"


class Diary:
    """What the main thread did, in order.

    Attributes:
      phase: that of the ledger.
      compiled: [(phase, function)].
      loop: [("update" | "fetch", number of the update, 0 of an evaluation) | ("wait", phase)] and,
        of what is read elsewhere than in `metrics.fetch`, ("read", phase).
    """

    def __init__(self):
        self._thread, self._updates = threading.get_ident(), []
        self.phase, self.compiled, self.loop = "start", [], []
        self._fetching = False

    def on_compile(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event == COMPILED and self._here():
            self.compiled.append((self.phase, fun_name))

    def on_host(self, what: str) -> None:
        """A read of an array, or a wait for one."""
        if self.phase in LOOP and not self._fetching and self._here():
            self.loop.append((what, self.phase))

    def _here(self) -> bool:
        return threading.get_ident() == self._thread

    def update(self, compiled, *arguments):
        """One update, written down; after update STOPPED_AT the run is told to stop."""
        state, figures = compiled(*arguments)
        self._updates.append(figures)
        self.loop.append(("update", len(self._updates)))
        if len(self._updates) == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return state, figures

    def fetch(self, original, figures):
        """A fetch, written down with the update whose figures it is."""
        leaves = {id(leaf) for leaf in jax.tree.leaves(figures)}
        made = [{id(leaf) for leaf in jax.tree.leaves(figures)} for figures in self._updates]
        (number,) = [n for n, own in enumerate(made, 1) if leaves & own] or [0]
        self.loop.append(("fetch", number))
        self._fetching = True
        fetched = original(figures)
        self._fetching = False
        return fetched


@pytest.fixture
def diary(monkeypatch):
    """Of a run in this process, in which nothing has been compiled before."""
    jax.clear_caches()
    kept = Diary()

    def around(owner, name, make):
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    def enter(original):
        def entered(ledger, phase):
            kept.phase = phase
            original(ledger, phase)

        return entered

    def push(original):
        def pushed(*arguments):  # no CPU minds the guard, other devices do
            with jax.transfer_guard_device_to_host("disallow"):
                return original(*arguments)

        return pushed

    def compile_update(original):
        def compiled(*arguments):
            update = original(*arguments)
            return lambda *given: kept.update(update, *given)

        return compiled

    def wait(original):
        def waited(arrays):
            kept.on_host("wait")
            return original(arrays)

        return waited

    array = type(jax.device_put(0))
    value = array._value.fget
    monkeypatch.setattr(array, "_value", property(lambda x: kept.on_host("read") or value(x)))
    around(array, "block_until_ready", wait)
    around(jax, "block_until_ready", wait)
    around(goodput.Ledger, "enter", enter)
    around(report.Report, "push", push)
    around(program_lib, "compile_update", compile_update)
    around(metrics, "fetch", lambda original: lambda figures: kept.fetch(original, figures))
    monkeypatch.chdir(running.ROOT)
    jax.monitoring.register_event_duration_secs_listener(kept.on_compile)
    jax.config.update("jax_disable_most_optimizations", True)
    yield kept
    jax.config.update("jax_disable_most_optimizations", False)
    jax.monitoring.unregister_event_duration_listener(kept.on_compile)


@pytest.fixture
def overrides(run_overrides, small_corpus):
    """With all that could make shapes or types differ from one step, or evaluation, to the next."""
    return run_overrides | {
        "train.steps": STEPS,
        "evaluate.every": EVALUATE_EVERY,
        "evaluate.rows": 12,  # the last batch, of 8, is not full
        "evaluate.sets": (("again", str(small_corpus)),),
        "checkpoint.every": EVALUATE_EVERY,
    }


def load(objective, overrides):
    config = config_lib.load(f"configs/{objective}.py:tiny", overrides)
    if "mask_rate_schedule" in config.objective:
        config.objective.update(mask_rate_schedule="cosine", mask_rate_final=0.4)
    return config


@pytest.mark.parametrize("objective", config_lib.objective_names())
def test_each_function_is_compiled_once_and_figures_are_fetched_one_step_late(
    objective, diary, overrides, tmp_path
):
    starts = []
    for status in (128 + signal.SIGTERM, 0):
        assert train.main(load(objective, overrides), str(tmp_path)) == status
        starts.append((diary.compiled, diary.loop))
        diary.compiled, diary.loop = [], []
        jax.clear_caches()

    evaluation = [("wait", "step"), *[("fetch", 0)] * len(CORPORA)]
    assert starts[0][1] == [
        *in_order("u1 u2 f1 u3 f2 u4 f3"),
        *evaluation,
        *in_order("f4 u5 u6 f5"),
        ("wait", "step"),
        *in_order("f6"),
    ]
    assert starts[1][1] == [*in_order("u7 u8 f7"), *evaluation, *in_order("f8")]
    for compiled, _ in starts:
        assert [phase for phase, _ in compiled if phase in LOOP] == ["evaluate"]
        # The update, compiled ahead, and the evaluation have one name and a phase each.
        assert max(collections.Counter(compiled).values()) == 1, compiled


def in_order(written):
    """[("update" or "fetch", its number)] of e.g. "u1 u2 f1"."""
    return [({"u": "update", "f": "fetch"}[word[0]], int(word[1:])) for word in written.split()]
