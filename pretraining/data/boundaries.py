"""Where words and sentences start.

Words. A piece starts a word when it begins with white space (the space before a word belongs to it)
or with a letter of a script that writes no spaces (Han, kana, Thai, Lao, Khmer, Burmese), where
every piece is a word. So does what follows such a letter, a newline or a tab, and the first piece
of a document. Of the bytes of a character without a piece of its own the first one counts as the
character; other characters in bytes continue the word that they stand in.

Sentences. One starts at the first visible character of a document and of a line, and after a
terminal mark with its closing quotes and brackets: always after one of 。！？｡, and after one of
. ! ? … ؟ ۔ । where white space follows and then, past opening brackets, a digit, a quote, or a
letter that is not lower case. There is no list of abbreviations: "Dr. No" is cut. The token is
marked that holds the character, or the space before it where that is a token of its own.
"""

import re

UNSPACED = (  # Thai, Lao, Burmese, Khmer; CJK marks and kana; Han; compatibility forms; Han again
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
QUOTES = "\"'“”‘’«»„‹›「」『』《》〈〉"
_STARTS_WORD = re.compile(rf"[\s{UNSPACED}]")
_WORDS = re.compile(rf"[\s{UNSPACED}][\s{UNSPACED}]*(?:(?<=\s).|\w)?")  # a set first is fast
_CLOSING = rf"[{QUOTES})\]）】]*"
_FULL, _MARKS = "。！？｡", ".!?…؟۔।"
_SENTENCE = re.compile(
    rf"[\n{_FULL}{_MARKS}](?:"  # a set first is fast
    r"(?<=\n)\s*(?=\S)"
    rf"|(?<=[{_FULL}])[{_FULL}]*{_CLOSING}[^\S\n]*(?=\S)"
    rf"|(?<=[{_MARKS}])[{_MARKS}]*{_CLOSING}[^\S\n]+(?=[(\[¿¡]*(\S)))"
)


def starts_word(text: str) -> bool:
    """Whether a piece that stands for `text` starts a word wherever it stands."""
    return _STARTS_WORD.match(text) is not None


def word_starts(text: str) -> list[int]:
    """Places in normalised text that start words whatever its pieces; a space is U+2581 in it."""
    return [i for match in _WORDS.finditer(text) for i in range(match.start(), match.end())]


def sentence_starts(text: str) -> list[int]:
    """Places [S] of the first characters of the sentences of `text` but the first, ascending."""
    return [match.end() for match in _SENTENCE.finditer(text) if _opens(match[1])]


def _opens(character: str | None) -> bool:
    """What may follow a terminal mark and a space; None = the mark needs nothing to follow."""
    if character is None or character in QUOTES or character.isdigit():
        return True
    return character.isalpha() and not character.islower()
