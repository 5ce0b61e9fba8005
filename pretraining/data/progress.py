"""Progress of a preparation: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator

import tqdm

from pretraining.data.store import Encoded

LOG_SECONDS = 30  # between lines where there is no terminal


def show(
    chunks: Iterable[dict[str, Encoded]],
    title: str,
    unit: str,
    total: int | None,
    size: Callable[[Encoded], int],
) -> Iterator[dict[str, Encoded]]:
    """Passes chunks through; shows documents, speed and, where the total is known, the time left.

    Args:
      unit: of `total` and `size`.
      size: of a piece of a chunk.
    """
    terminal = sys.stderr.isatty()
    documents = 0
    with tqdm.tqdm(
        desc=title,
        total=total,
        unit=unit,
        unit_scale=True,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else LOG_SECONDS,
        miniters=1,
    ) as bar:
        for chunk in chunks:
            documents += sum(part.lengths.size for part in chunk.values())
            bar.set_postfix(documents=documents, refresh=False)
            bar.update(sum(map(size, chunk.values())))
            yield chunk


class _Lines:
    """Takes the redraws of a bar and prints them as lines."""

    def write(self, text: str):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        sys.stderr.flush()
