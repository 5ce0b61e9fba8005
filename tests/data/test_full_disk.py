"""A disk that is full while a corpus is prepared, and a worker that is killed; real processes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

PAGE = os.sysconf("SC_PAGESIZE")  # what a tmpfs counts in
ROOT = pathlib.Path(__file__).parent.parent.parent

RECIPE = """
from configs import base

def get_config():
    config = base.get_config()
    config.data.corpus, config.data.cache = {corpus!r}, {cache!r}
    config.data.validation, config.data.workers = 0.2, {workers}
    config.tokenizer.size, config.tokenizer.kind = 300, "bpe"
    return config
"""


def write_recipe(folder: pathlib.Path, cache: pathlib.Path, documents: int, workers: int):
    """A recipe for a corpus of random words, which no tokenizer makes small."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnop"))
    texts = ["".join(rng.choice(letters, 60)) for _ in range(documents)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(corpus=str(corpus), cache=str(cache), workers=workers))
    return recipe


def start(recipe, prefix=()) -> subprocess.Popen:
    words = [*prefix, sys.executable, "-m", "pretraining.data.prepare", f"--config={recipe}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=ROOT, **pipes)


# ---------------------------------------------------------------------------------- a small disk


class Disk:
    """A tmpfs in a mount namespace of its own: it is gone with the process that holds it.

    That one waits for the end of its input, so it ends with this process, however that dies.
    """

    def __init__(self, folder: pathlib.Path, enter: list[str]):
        self.folder = folder
        self.enter = enter

    def run(self, *words) -> str:
        done = subprocess.run([*self.enter, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def resize(self, pages: int):
        self.run("mount", "-o", f"remount,size={pages * PAGE}", str(self.folder))

    def clear(self):
        self.run("sh", "-c", f"rm -rf {self.folder}/*")

    def names(self) -> list[str]:
        """Of all files but locks, and of all folders."""
        found = self.run("find", str(self.folder), "-mindepth", "1", "-not", "-name", "*.lock")
        return sorted(os.path.relpath(name, self.folder) for name in found.splitlines())

    def hashes(self) -> dict[str, str]:
        found = self.run("sh", "-c", f"cd {self.folder} && find . -type f | xargs sha256sum")
        lines = (line.split() for line in found.splitlines())
        return {name: sha256 for sha256, name in lines if not name.endswith(".lock")}

    def pages(self) -> int:
        """Used."""
        used = self.run("df", "--block-size=1", "--output=used", str(self.folder))
        return int(used.split()[-1]) // PAGE


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs Linux with unshare and nsenter")
    folder = tmp_path_factory.mktemp("disk")
    mount = f"mount -t tmpfs -o size={PAGE * 5000} none {folder} && echo ready && exec cat"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for user, join in (([], []), (["-r"], ["-U", "--preserve-credentials"])):
        words = ["unshare", "-m", *user, "sh", "-c", mount]
        holder = subprocess.Popen(words, **pipes, text=True)
        if holder.stdout.readline() == "ready\n":
            yield Disk(folder, ["nsenter", "-t", str(holder.pid), "-m", *join, "--wd=/"])
            holder.communicate()
            return
        holder.communicate()
    pytest.skip("a tmpfs may be mounted neither directly nor in a user namespace")


@pytest.fixture(scope="module")
def undisturbed(disk, tmp_path_factory):
    """(recipe, hashes of what it makes, {folder of the cache: pages, manifests among them})."""
    recipe = write_recipe(tmp_path_factory.mktemp("corpus"), disk.folder, 4000, workers=1)
    process = start(recipe, disk.enter)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    hashes, total = disk.hashes(), disk.pages()
    assert sum(name.endswith("/manifest.json") for name in hashes) == 2
    disk.run("sh", "-c", f"rm -rf {disk.folder}/stores")
    tokenizer = disk.pages()
    return recipe, hashes, {"tokenizers": tokenizer, "stores": total}


@pytest.mark.parametrize(
    "where, less",
    [
        ("tokenizers", None),  # a disk of one page: not even the model
        ("tokenizers", 1),  # room for all but the manifest
        ("stores", None),  # no page beside the tokenizer
        ("stores", 20),  # room for a part of the shards
        ("stores", 1),  # room for all but the manifest
    ],
)
def test_a_full_disk_is_one_line_and_nothing_is_lost(disk, undisturbed, where, less):
    recipe, hashes, pages = undisturbed
    before = {"tokenizers": 0, "stores": pages["tokenizers"]}[where]
    disk.clear()
    disk.resize(before + 1 if less is None else pages[where] - less)

    process = start(recipe, disk.enter)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2, err
    last = err.splitlines()[-1]
    assert last.startswith(f"error: config.data.cache: {disk.folder}/{where}/")
    assert "No space left on device" in last
    assert "Traceback" not in err
    left = disk.names()
    assert not any("partial" in name for name in left)
    complete = [name.split("/")[0] for name in left if name.endswith("/manifest.json")]
    assert complete == (["tokenizers"] if where == "stores" else [])

    disk.resize(5000)
    process = start(recipe, disk.enter)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert disk.hashes() == hashes


# ------------------------------------------------------------------------------- a killed worker


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds workers in /proc")
def test_a_killed_worker_is_one_line_and_nothing_is_believed(tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "cache", 30_000, workers=2)
    recipe.write_text(
        "from pretraining.data import encode, progress\n"
        "encode.CHUNK_CHARACTERS, progress.LOG_SECONDS = 10_000, 0\n" + recipe.read_text()
    )
    process = start(recipe)
    try:
        for line in process.stderr:
            if "documents=" in line:  # both are at work
                break
        os.kill(worker(process.pid), signal.SIGKILL)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith("error: a process that tokenised died")
    assert list((tmp_path / "cache" / "stores").glob("*/")) == []


def worker(parent: int) -> int:
    children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    command = {int(pid): pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return next(pid for pid, words in command.items() if b"spawn_main" in words)
