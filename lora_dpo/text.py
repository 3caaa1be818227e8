"""How counts, reasons and foreign text are written for a terminal and for programs, and what text alone tells."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

# C0 but tab and line feed, DEL and C1; line separators; and the marks that reorder text (Trojan Source, CVE-2021-42574)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")

REASONS_SHOWN = 6
SHOWN = 200
"""Characters of a value from outside that a message repeats."""
LONGEST = 1500
"""Characters of a message. The longest that names what there is, with paths of usual length, has about 900."""


def counted(number: int, word: str) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def harmless(text: str) -> str:
    r"""Text of a data set for a terminal: characters that could repaint or reorder it are written as `\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(value: object, limit: int = SHOWN) -> str:
    """A value from outside as Python writes it: on one line, and no more of it than `limit` characters."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # such as a number of more digits than Python writes
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str, limit: int = LONGEST) -> str:
    """A message as one line that no text in it can repaint or lengthen: cut in the middle, so that its end stays."""
    if len(text) > limit:
        end = limit // 3
        text = f"{text[: limit - end - 3]} … {text[-end:]}"
    text = _BREAK.sub(" ", text.strip()).replace("\t", " ")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def json_text(value: Any) -> str:
    r"""JSON for people and programs: letters as they are, and what could repaint a terminal as `\u009b`."""
    # json.dumps leaves DEL and C1 as they are; outside of its strings there is no such character
    return _CONTROL.sub(_escaped, json.dumps(value, indent=2, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def reasons_text(counts: Iterable[tuple[str, int]]) -> str:
    """`2 empty prompt, 1 broken JSON`: the most frequent first, without the details in brackets."""
    kinds: Counter[str] = Counter()
    for reason, count in counts:
        kinds[reason.partition(" (")[0]] += count
    shown = [f"{count} {kind}" for kind, count in kinds.most_common(REASONS_SHOWN)]
    rest = len(kinds) - len(shown)
    return ", ".join(shown) + (f", … {counted(rest, 'more reason')}" if rest > 0 else "")


def plain(value: object, limit: int = 90) -> str:
    """Text from outside, on one line and short: all but letters and digits in ASCII, so that nothing in it paints."""
    text = "".join(letter if _is_seen(letter) else ascii(letter)[1:-1] for letter in str(value).strip())
    return text if len(text) <= limit else text[: limit - 1] + "~"


def revealed(value: object) -> str:
    """`plain` in ASCII alone: for names that may look like another one."""
    text = str(value).strip()[:90]
    return "".join(letter if letter.isascii() and letter.isalnum() else ascii(letter)[1:-1] for letter in text)


def _is_seen(letter: str) -> bool:
    """Whether a letter or digit shows, and as itself: some letters of Hangul have no shape."""
    return letter.isalnum() and (letter.isascii() or unicodedata.normalize("NFKC", letter) == letter)


REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am) (?:very |so |truly |really )?sorry\b|sorry\b|i apologi[sz]e\b|unfortunately,? i\b|as an ai\b|"
    r"(?:i(?:'m| am)|while i(?:'m| am)) (?:not able|unable|not equipped|not allowed|not programmed)\b|"
    r"i (?:can(?:not|'t| not)|won't|will not|must decline|do not have the ability|don't have the ability)\b)",
    re.IGNORECASE,
)
"""How English refusals begin. Other languages, and refusals further on, are not seen."""


def repetition(text: str) -> float:
    """Share of three-word sequences that stood there before (seq-rep-3, Welleck et al. 2020, arXiv 1908.04319)."""
    words = re.findall(r"\w+", text.lower())
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(threes)) / len(threes) if threes else 0.0


def refuses(text: str) -> bool:
    """True if the answer begins as an English refusal does."""
    return REFUSAL.match(text.replace("\u2019", "'")) is not None
