import multiprocessing
import os
import queue
import struct
import subprocess
import sys
import threading

import pytest

from pretraining.data import encode
from pretraining.errors import UserError


class Future:
    def __init__(self, running, value):
        self._running, self._value = running, value

    def result(self):
        self._running.remove(self._value)
        return self._value * 10


def test_results_keep_their_order_within_a_window():
    running, most = set(), []

    def submit(value):
        running.add(value)
        most.append(len(running))
        return Future(running, value)

    results = encode.in_order(submit, iter(range(20)), 3)
    assert [next(results) for _ in range(4)] == [0, 10, 20, 30]
    assert len(most) == 6  # two are waiting: nothing else was taken from the input
    assert list(results) == list(range(40, 200, 10))
    assert max(most) == 3


SPY = """
import os, sys
import numpy as np
class Spy:
    size, eos = 9, 1
    def __init__(self):
        self.model = bytes(1 << 20)  # more than a pipe holds
    def encode_document(self, text):
        if text == "die":
            os._exit(1)
        return np.array([2 + ("jax" in sys.modules)], np.int32), np.zeros(1, np.uint8)
"""

SCRIPT = """
import jax
print("imported")
from pretraining.data import encode
from spy import Spy
if __name__ == "__main__":
    {first}
    encode.CHUNK_CHARACTERS = 1
    texts = {texts}
    for chunk in encode.encode_all(texts, Spy(), 0.0, 2):
        print(chunk["train"].tokens[0])
"""


def run_script(tmp_path, texts, first="pass"):
    (tmp_path / "spy.py").write_text(SPY)
    (tmp_path / "script.py").write_text(SCRIPT.format(texts=texts, first=first))
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_workers_import_neither_jax_nor_the_main_module(tmp_path):
    done = run_script(tmp_path, ["a"] * 4)
    assert done.stdout.split() == ["imported", "2", "2", "2", "2"], done.stderr


def test_a_worker_that_dies_is_reported(tmp_path):
    done = run_script(tmp_path, ["a", "die", "a"])
    assert done.stderr.splitlines()[-1].startswith("pretraining.errors.UserError: a process that")
    assert "lower config.data.workers" in done.stderr


def test_a_worker_that_dies_as_it_starts_is_reported(tmp_path):
    """`false` ends without reading what the parent sends it."""
    first = (
        "import multiprocessing, shutil; from multiprocessing import resource_tracker;"
        " resource_tracker.ensure_running(); multiprocessing.set_executable(shutil.which('false'))"
    )
    done = run_script(tmp_path, ["a"] * 4, first)
    assert done.stderr.splitlines()[-1].startswith("pretraining.errors.UserError: a process that")


def test_a_worker_that_dies_while_it_answers_is_a_mistake_and_not_a_wait():
    here, there = multiprocessing.Pipe()

    def answer_in_part():
        there.recv()
        os.write(there.fileno(), struct.pack("!i", 1000) + b"the first of a thousand bytes")
        there.close()

    worker = threading.Thread(target=answer_in_part)
    worker.start()
    idle = queue.SimpleQueue()
    idle.put(here)
    with pytest.raises(UserError, match="a process that tokenised died"):
        encode._encode_elsewhere(idle, ["a text"])
    worker.join()
    assert idle.get_nowait() is here  # who waits for a connection is not left waiting
    here.close()


def test_what_goes_wrong_in_a_worker_is_raised_here():
    here, there = multiprocessing.Pipe()
    there.send(UserError("the text is not to its liking"))
    idle = queue.SimpleQueue()
    idle.put(here)
    with pytest.raises(UserError, match="not to its liking"):
        encode._encode_elsewhere(idle, ["a text"])
    here.close()
    there.close()
