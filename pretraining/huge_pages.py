"""Memory in large pages, which on CPUs takes a fifth to a third off a training step.

XLA allocates the buffers of a step anew at every step, and malloc hands memory of that size back to
the system each time: half a million page faults of 4 KiB a step of ELECTRA-small. The GNU C library
asks for pages of 2 MiB where a tunable says so, and it reads its tunables once, when a process
starts. A few thousand faults are left, and no more memory is held than before.
"""

import os
import pathlib
import sys

_TUNABLES = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
_OLDEST = (2, 35)  # of the library, that has the tunable
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use(module: str, setting: pathlib.Path = _SETTING) -> None:
    """Starts `python -m MODULE ...` over with the tunable set; to be called before anything else.

    The process keeps its id and its environment. It returns where the tunable is set, where it
    would not help, and where this process is not that command alone: a notebook, a debugger or a
    script that runs the module is never replaced. What the user says about the tunable is kept:
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` switches this off.

    Args:
      setting: the file in which Linux says who gets large pages.
    """
    if environment().items() <= os.environ.items():
        return
    if _is_command(module) and library_can_ask() and _on_request(setting):
        os.environ.update(environment())
        sys.stdout.flush()
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except (OSError, ValueError):  # then without
            return


def environment() -> dict[str, str]:
    """The variable that asks for large pages, for a process that is yet to be started."""
    known = os.environ.get(_TUNABLES, "")
    if _TUNABLE in known:
        return {_TUNABLES: known}
    return {_TUNABLES: ":".join(filter(None, (known, f"{_TUNABLE}=1")))}


def library_can_ask() -> bool:
    """Is this the GNU C library, in a version that has the tunable?"""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= _OLDEST
    except (AttributeError, OSError, ValueError):  # another system
        return False


def _is_command(module):
    """Was this process started by `python [options] -m MODULE` and the arguments it has?"""
    given = ["-m", module.removesuffix(".__main__"), *sys.argv[1:]]
    alone = sys.orig_argv[-len(given) :] == given and _are_options(sys.orig_argv[1 : -len(given)])
    return alone and sys.gettrace() is None


def _are_options(words):
    """Are they options of Python alone? A debugger's script or module stands among others."""
    words = iter(words)
    for word in words:
        if word in ("-X", "-W"):
            next(words, None)  # its value
        elif not word.startswith("-") or word in ("-m", "-c", "-"):
            return False
    return True


def _on_request(setting):
    try:
        return "[madvise]" in setting.read_text()
    except OSError:
        return False
