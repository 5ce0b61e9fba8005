"""A process that a sweep starts: bound to its cores, and asked to end when the sweep is killed.

    python -m experiments.running.child PARENT CORES COMMAND...

becomes COMMAND. PARENT is the process id of the sweep, CORES "0,1" or "". On Linux the command gets
SIGTERM, at which a training run saves, as soon as that process is gone, even by `kill -9`;
elsewhere it goes on to its end, and the next start of the sweep waits for it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(parent: str, cores: str, *command: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it was gone before
            sys.exit(128 + signal.SIGTERM)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
