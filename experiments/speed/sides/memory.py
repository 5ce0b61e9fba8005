"""The peak of this process's memory, as Linux tells it; imports the standard library alone."""

import math
import pathlib
import re


class Peak:
    """The most that this process holds from now on (proc(5): clear_refs, status).

    Attributes:
      held: bytes now; NaN where the system does not let an earlier peak be forgotten.
    """

    def __init__(self):
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.held = math.nan
        else:
            self.held = _status("VmRSS")

    def bytes(self) -> float:
        """At most so far; NaN where it is unknown."""
        return self.held if math.isnan(self.held) else _status("VmHWM")


def _status(field: str) -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024.0 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M)[1])
