"""What became of the faults that were injected, as rows of a table."""

import dataclasses
import pathlib
from collections.abc import Iterable

from tests.faults import bench


@dataclasses.dataclass
class Outcome:
    """One row of the table.

    Attributes:
      fault, objective: what was done to what.
      injected, survived: faults, and those after which the program did what it must.
      compared, equal: runs that came to their end, and those equal to the undisturbed one.
      complaints: what went wrong, one line each.
      skipped: why the fault, or a part of it, could not be injected here.
      note: what else is worth knowing.
    """

    fault: str
    objective: str
    injected: int = 0
    survived: int = 0
    compared: int = 0
    equal: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)
    skipped: str = ""
    note: str = ""

    def count(self, *complaints: str | None) -> None:
        """One more fault, survived if there is nothing to complain of."""
        found = [complaint for complaint in complaints if complaint]
        self.injected += 1
        self.survived += not found
        self.complaints += found

    def compare(self, folder: pathlib.Path, wanted: pathlib.Path) -> None:
        """One more run that must be equal to another, with nothing left lying."""
        try:
            found = bench.differences(folder, wanted) + bench.remains(folder)
        except (OSError, ValueError) as error:
            found = [f"cannot be compared: {error}"]
        self.compared += 1
        self.equal += not found
        self.complaints += [f"{folder}: {line}" for line in found]

    @property
    def passed(self) -> bool:
        """Everything survived and equal, and something injected or skipped."""
        whole = self.survived == self.injected and self.equal == self.compared
        return whole and not self.complaints and bool(self.injected or self.skipped)


def table(outcomes: Iterable[Outcome]) -> str:
    """One line for each outcome, columns aligned."""
    rows = [("fault", "objective", "injected", "survived", "bit-equal", "")]
    for each in outcomes:
        figures = (str(each.injected), str(each.survived), f"{each.equal} of {each.compared}")
        said = each.note if each.passed else f"FAILED {each.note}"
        if each.skipped:
            figures = figures if each.injected else ("-", "-", "-")
            said = "; ".join(filter(None, [said, f"skipped: {each.skipped}"]))
        rows.append((each.fault, each.objective, *figures, said))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
