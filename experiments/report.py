"""The report of a sweep: figures, tables with tests, and what makes runs not comparable.

    python -m experiments.report R [--baseline=variant] [--output=folder]

Reads only run folders (R/runs, or any folder of run folders), R/sweep.json and R/runs.csv where
they are, and the question's sweep.py for what to draw. Writes report.md, report.html (one file,
which needs no network) and figures/*.png, *.svg, each as a whole, report.html last; a sweep that is
not done is reported as far as it is.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.report",
        __doc__,
        with_config=False,
        positional="folder",
        baseline="the variant that the others are compared to (default: the question's)",
        output="where the report is written (default: the folder of the sweep)",
    )

import pathlib
import sys
from collections.abc import Sequence

from pretraining.errors import UserError


def main(folder: str, baseline: str | None, output: str | None) -> int:
    """Writes the report; see the module's docstring.

    Raises:
      UserError: there is no such folder, run or variant, no run has a figure yet, a file is
        damaged, or stands where the report is to be written.
    """
    from experiments.reporting import context, sections, source

    place = pathlib.Path(output or folder)
    if place.is_file():
        raise UserError(f"--output={output}: a folder is needed, and that is a file")
    of = context.make(source.read(folder), baseline)
    if of.sweep.told and of.sweep.note:
        lost = "its figures, planned contrasts and verdicts are lost"
        print(f"warning: {of.sweep.note} Without it {lost}.", file=sys.stderr)
    blocks = sections.blocks(of)
    write(place, blocks)
    _print_summary(of, blocks, place)
    return 0


def write(place: pathlib.Path, blocks: Sequence) -> None:
    """Draws everything, then replaces each file as a whole."""
    from tqdm import tqdm

    from experiments.reporting import page
    from pretraining import files

    pictures = [block for block in blocks if isinstance(block, page.Picture)]
    quiet = not sys.stderr.isatty()
    drawn = {p.name: page.draw(p) for p in tqdm(pictures, "figures", leave=False, disable=quiet)}
    svgs = {name: kinds["svg"] for name, kinds in drawn.items()}
    texts = {"report.md": page.markdown(blocks), "report.html": page.page(blocks, svgs)}
    (place / "figures").mkdir(parents=True, exist_ok=True)
    for name, kinds in drawn.items():
        for kind, content in kinds.items():
            files.write_atomically(place / "figures" / f"{name}.{kind}", content)
    for name, text in texts.items():
        files.write_atomically(place / name, text)


def _print_summary(of, blocks: Sequence, place: pathlib.Path) -> None:
    """The first metric, the warnings, and where the files are."""
    from experiments.reporting import page, sections

    for table in sections.summary(of):
        lines = [table.header, *table.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(padded).rstrip())
        print(f"{table.caption}\n")
    print("".join(f"{line}\n" for line in sections.notices(of)), end="")
    for block in blocks:
        if isinstance(block, page.Warnings):
            print("\n".join([f"{block.title}:", *(f"- {item}" for item in block.items), ""]))
    print(f"The report is in {place}: report.html, report.md, figures/")
