"""How counts, reasons and foreign text are written for a terminal and for programs."""

from __future__ import annotations

import json
import re
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
