"""A command gets large pages without being told."""

import os
import subprocess
import sys

import pytest

from pretraining import huge_pages

TUNABLE = "glibc.malloc.hugetlb"
PROGRAM = """
import os, pathlib, sys
print("started", os.getpid(), sys.argv[1:], flush=True)
from pretraining import huge_pages
huge_pages.use(pathlib.Path(sys.argv[1]))
print("used", os.environ.get("GLIBC_TUNABLES"))
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="of glibc alone"
)


def start(setting, **environment):
    """The lines of a program whose first argument is the setting."""
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, str(setting), "two words"]
    done = subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture
def setting(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


def test_the_same_process_starts_over_once_with_the_tunable(setting):
    first, second, used = start(setting)
    assert first == second  # its id and its arguments
    assert f"{[str(setting), 'two words']}" in first
    assert used == f"used {TUNABLE}=1"


def test_other_tunables_are_kept(setting):
    *_, used = start(setting, GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert used == f"used glibc.malloc.perturb=0:{TUNABLE}=1"


def test_what_the_user_says_about_it_is_kept(setting):
    _, used = start(setting, GLIBC_TUNABLES=f"{TUNABLE}=0")
    assert used == f"used {TUNABLE}=0"


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
def test_where_it_would_not_help_nothing_happens(setting, text):
    setting.unlink() if text is None else setting.write_text(text)
    _, used = start(setting)
    assert used == "used None"


def test_a_process_yet_to_start_is_given_it(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert huge_pages.environment() == {"GLIBC_TUNABLES": f"{TUNABLE}=1"}
