"""The normalisation of a SentencePiece model, said with what the package `tokenizers` has.

A model carries its rule (NFKC, case folding, ...) as a table of character sequences: at each place
of a text the longest one that fits is replaced. `tokenizers.normalizers.Precompiled` reads the same
table but looks up whole grapheme clusters, and of those that are a few bytes long takes the
shortest sequence that fits, so that it drops accents ("E" + acute, case folded, becomes "e") and
leaves decomposed Hangul apart. Therefore characters are first parted from each other, except inside
a sequence of the table; each of those is then composed by NFKC, as the table does, and the table
only sees characters that stand alone.

What remains: `NFKC` of `tokenizers` (0.23) does not know the letters that Unicode has added since
its version 13. After such a letter a mark stays apart that the table would have composed.
"""

import functools
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from pretraining.data.piece_model import SPACE

_LABELS = np.arange(1, 256, dtype=np.uint32)
_REMOVED = "\x01"  # what the rules "nmt_..." take out of every text
_TILDE = "\uff5e"


def normalizers(charsmap: bytes) -> list:
    """Normalizers of `tokenizers`, to be applied one after the other to text without U+2581.

    Args:
      charsmap: `normalizer_spec.precompiled_charsmap` of a model.
    """
    from tokenizers import Regex
    from tokenizers import normalizers as library

    boundaries, maps_space = _read(charsmap)
    compose = library.NFKC()
    separator = SPACE  # free, because texts do not hold it
    if maps_space:  # a rule "nmt_...", which moreover keeps the full-width tilde
        separator = _REMOVED
        kept = library.Replace(_TILDE, SPACE), library.Replace(SPACE, _TILDE)
        compose = library.Sequence([kept[0], compose, kept[1]])
    return [
        library.Replace(Regex(boundaries), separator),
        compose,
        library.Precompiled(charsmap),
        library.Replace(separator, ""),
    ]


@functools.lru_cache(maxsize=8)
def _read(charsmap: bytes) -> tuple[str, bool]:
    """The expression of `_boundaries`, and whether U+2581 is in the table."""
    sequences = set(_sequences(_units(charsmap)))
    return _boundaries(sequences), SPACE in sequences


def _units(charsmap: bytes) -> np.ndarray:
    """The double array (Darts-clone) of the table: its size in bytes comes first."""
    (size,) = struct.unpack_from("<I", charsmap)
    return np.frombuffer(charsmap, "<u4", size // 4, 4)


def _offset(unit: np.uint32) -> int:
    return (int(unit) >> 10) << ((int(unit) & (1 << 9)) >> 6)


def _sequences(units: np.ndarray) -> Iterator[str]:
    """Every beginning of a sequence of the table, whole characters."""
    nodes = {}  # many places share what follows

    def follow(node: int, before: str) -> Iterator[str]:
        if node not in nodes:
            nodes[node] = list(_characters(units, node, b""))
        for character, child in nodes[node]:
            yield before + character
            yield from follow(child, before + character)

    return follow(_offset(units[0]), "")


def _characters(units: np.ndarray, node: int, read: bytes) -> Iterator[tuple[str, int]]:
    """The characters that follow at a node, and the node after each."""
    places = node ^ _LABELS
    found = _LABELS[units[places] & 0x800000FF == _LABELS]
    for label in found.tolist():
        character, place = read + bytes([label]), node ^ label
        child = place ^ _offset(units[place])
        if len(character) == _utf8_length(character[0]):
            yield character.decode(), child
        else:
            yield from _characters(units, child, character)


def _utf8_length(first: int) -> int:
    return 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)


def _boundaries(sequences: Iterable[str]) -> str:
    """A regular expression that is empty before every character that continues no sequence.

    ASCII never does and need not be parted, but for the newline of a line end in two characters.
    The start of a text is left out: `tokenizers` (0.23) loses its place after what is put there,
    and panics.
    """
    before = defaultdict(set)  # by character: what stands before it in sequences
    for sequence in sequences:
        if len(sequence) > 1:
            before[sequence[-1]].add(sequence[:-1])
    alike = defaultdict(list)
    for character, prefixes in before.items():
        alike[frozenset(prefixes)].append(character)
    cases = (
        f"(?={_any(characters)})(?<={'|'.join(_alternatives(prefixes))})"
        for prefixes, characters in alike.items()
    )
    return rf"(?!\A)(?=[^\x00-\x09\x0b-\x7f])(?!(?={_any(before)})(?:{'|'.join(cases)}))"


def _alternatives(strings: Iterable[str]) -> Iterator[str]:
    """Expressions without alternatives that together match just these strings."""
    tails = defaultdict(set)  # by first character
    for string in strings:
        if not string:
            yield ""
        else:
            tails[string[0]].add(string[1:])
    alike = defaultdict(list)
    for character, rest in tails.items():
        alike[frozenset(rest)].append(character)
    for rest, characters in alike.items():
        yield from (_any(characters) + each for each in _alternatives(rest))


def _any(characters: Iterable[str]) -> str:
    """A character class, as ranges of code points."""
    codes = np.array(sorted(map(ord, characters)))
    ranges = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1)
    return "[" + "".join(rf"\x{{{r[0]:x}}}-\x{{{r[-1]:x}}}" for r in ranges) + "]"
