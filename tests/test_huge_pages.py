"""A command gets large pages without being told, and nothing but a command is started over."""

import mmap
import os
import pathlib
import re
import subprocess
import sys

import pytest

from pretraining import huge_pages

ROOT = pathlib.Path(__file__).parent.parent
TUNABLE = "glibc.malloc.hugetlb"
PROGRAM = """
import os, pathlib, sys
print("started", os.getpid(), sys.argv[1:], flush=True)
from pretraining import huge_pages
huge_pages.use("program", pathlib.Path(sys.argv[1]))
print("used", os.environ.get("GLIBC_TUNABLES"))
"""
# Noted at each start of Python, before anything else.
NOTE = """
import os
with open(os.environ["NOTES"], "a") as notes:
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), file=notes)
"""
REQUEST = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(not huge_pages.library_can_ask(), reason="of a recent glibc alone")
on_request = pytest.mark.skipif(
    not REQUEST.exists() or "[madvise]" not in REQUEST.read_text(), reason="not on request here"
)


@pytest.fixture
def folder(tmp_path):
    """Holds the program, the setting, and what is noted at each start."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return tmp_path


def start(folder, *command, **environment):
    """The finished process; its lines."""
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    kept |= {"PYTHONPATH": f"{folder}:{ROOT}", "NOTES": str(folder / "notes")}
    command = command or ("-m", "program", str(folder / "enabled"), "two words")
    return subprocess.run(
        [sys.executable, *command],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def lines(folder, *command, **environment):
    return start(folder, *command, **environment).stdout.splitlines()


def test_the_same_process_starts_over_once_with_the_tunable(folder):
    first, second, used = lines(folder)
    assert first == second  # its id and its arguments
    assert f"{[str(folder / 'enabled'), 'two words']}" in first
    assert used == f"used {TUNABLE}=1"


def test_options_of_python_are_kept(folder):
    *_, used = lines(folder, "-X", "importtime", "-m", "program", str(folder / "enabled"))
    assert used == f"used {TUNABLE}=1"


def test_other_tunables_are_kept(folder):
    *_, used = lines(folder, GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert used == f"used glibc.malloc.perturb=0:{TUNABLE}=1"


def test_what_the_user_says_about_it_is_kept(folder):
    _, used = lines(folder, GLIBC_TUNABLES=f"{TUNABLE}=0")
    assert used == f"used {TUNABLE}=0"


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
def test_where_it_would_not_help_nothing_happens(folder, text):
    setting = folder / "enabled"
    setting.unlink() if text is None else setting.write_text(text)
    _, used = lines(folder)
    assert used == "used None"


RUN = "import runpy, sys; sys.argv = ['program', {!r}]; runpy.run_module('program', run_name={!r})"


@pytest.mark.parametrize(
    "kind", ["code", "script", "another module", "debugger", "script of a debugger"]
)
def test_a_process_that_is_not_the_command_alone_is_never_replaced(folder, kind):
    setting = str(folder / "enabled")
    code = RUN.format(setting, "__main__")
    (folder / "script.py").write_text(code)
    (folder / "tracer.py").write_text(
        "import runpy, sys; sys.settrace(lambda *_: None); sys.argv = ['program', *sys.argv[2:]]\n"
        "runpy.run_module('program', run_name='__main__')"
    )
    (folder / "runner.py").write_text(  # sees what is executed in a way that nobody can see
        "import runpy, sys; sys.argv = ['program', *sys.argv[3:]]\n"
        "runpy.run_module('program', run_name='__main__')"
    )
    command = {
        "code": ("-c", code),
        "script": (str(folder / "script.py"),),
        "another module": ("-m", "script"),
        "debugger": ("-m", "tracer", "program", setting),
        "script of a debugger": (str(folder / "runner.py"), "-m", "program", setting),
    }[kind]
    _, used = lines(folder, *command)
    assert used == "used None"


def test_a_process_that_cannot_be_started_over_goes_on(monkeypatch, folder):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # and put back afterwards
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "program"])
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "executable", "")
    huge_pages.use("program", folder / "enabled")
    assert os.environ["GLIBC_TUNABLES"] == f"{TUNABLE}=1"  # it got as far as to try


@on_request
def test_a_command_starts_over_once_and_keeps_its_exit_status(folder):
    done = start(folder, "-m", "pretraining.doctor", str(folder / "missing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    first, second = (folder / "notes").read_text().splitlines()
    process = first.split()[0]
    assert [first, second] == [f"{process} None", f"{process} {TUNABLE}=1"]


def granted(size=64 << 20):
    """Whether this process, which asks for itself, is given large pages for most of `size`."""
    held = lambda: int(
        re.search(r"AnonHugePages: +(\d+)", pathlib.Path("/proc/self/smaps_rollup").read_text())[1]
    )
    before = held()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
        return held() - before > size >> 11


@on_request
def test_memory_is_then_in_large_pages(folder):
    if not granted():
        pytest.skip("there are none to be had: memory is in pieces, or this group's is short")
    code = (
        "import re; x = bytearray(b'x') * (64 << 20)\n"
        "text = open('/proc/self/smaps_rollup').read()\n"
        "print(re.search(r'AnonHugePages: +([0-9]+)', text)[1])"
    )
    kilobytes = lambda **tunable: int(lines(folder, "-c", code, **tunable)[0])
    assert kilobytes(GLIBC_TUNABLES=f"{TUNABLE}=0") < 32 << 10
    assert kilobytes(**huge_pages.environment()) >= 32 << 10
