"""Two answers side by side and a column that says which is better: `response_a`, `response_b`, `winner`.

Arenas, labelling tools and hand-made tables have many spellings of this. A winner that is neither of both, nor a tie,
is no pair: nothing is assigned that the row does not say. Nor is it where two readings are possible: of numbers all of
a file decide, since 1 is the second answer of those that are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lora_dpo.data.column_words import role_of, words_of
from lora_dpo.data.formats.trl import checked_pair, columns_of
from lora_dpo.data.messages import (
    BadRow,
    Messages,
    answer_of,
    conversation,
    from_json,
    message,
    prompt_of,
    split_shared_prefix,
    tools_of,
    with_system,
)
from lora_dpo.data.pairs import Origin, PreferencePair
from lora_dpo.data.row_reading import Row
from lora_dpo.errors import DataError
from lora_dpo.text import shown

_ANSWERS = frozenset(("response", "answer", "completion", "output", "reply", "generation"))
_WHOLE = "conversation"
_BESIDE = _ANSWERS | {
    *("model", "assistant", "option", "candidate", _WHOLE, "id", "the", "is", "was"),
    *("better", "best", "wins", "won", "winner", "preferred"),
}
"""Words beside the letter or number of an answer, in names of columns and in what stands for the winner."""
_SIDES = (("a", "b"), ("1", "2"), ("0", "1"))
_WINNERS = (
    *("winner", "preferred", "preference", "better", "choice", "best"),
    *("preferred response", "preferred answer", "better response", "better answer", "better response id"),
    *("winner id", "winner model", "human preference", "chosen response", "chosen answer", "selected response"),
)
"""Columns that name the better answer."""
_BAD_TIES = frozenset(("tie bothbad", "tie both bad", "both bad", "bothbad", "neither", "none", "equally bad"))
_TIES = _BAD_TIES | {
    *("tie", "tied", "draw", "equal", "same", "both", "both good", "equally good"),
    *("no preference", "no winner"),
}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_MARKED = re.compile(r"[^\w\s\[\](){}\"'.,:*#-]|(?<!\w)-|-(?!\w)")
"""What turns a winner's words round or compares them, such as `!A`, `-A` and `A>B`: the words alone tell no winner."""
_FLAG = re.compile(r"winner (?:model )?(a|b|1|2|0|tie)")


@dataclass(frozen=True)
class _Named:
    """The columns of a row by what they are."""

    sides: tuple[str, str]
    """The letter or number of each answer, as its column has it."""
    answers: tuple[str, str]
    whole: bool
    """Whether they are conversations, with the prompt in them."""
    winner: str | None
    flags: Mapping[str, str] = field(hash=False)
    """In place of a winner: a column of 0 or 1 for each outcome."""


def names_a_winner(row: Row) -> bool:
    """True for a row with two answers side by side and a column for the better one."""
    return "chosen" not in row and "rejected" not in row and _columns(row) is not None


def winner(row: Row, origin: Origin) -> PreferencePair:
    """Two answers, `response_a` and `response_b` or the like, and which of them a person or a judge preferred.

    Raises:
        BadRow: a tie, a winner that is neither, or a part that is missing.
    """
    named = _columns(row)
    if named is None:
        raise BadRow(f"without two answers and a winner {columns_of(row)}", "missing")
    better = _better(row, named)
    both = named.answers if better == named.sides[0] else named.answers[::-1]
    for name in both:
        if row.get(name) is None:
            raise BadRow(f"without '{name}' {columns_of(row)}", "missing")
    if named.whole:
        parts = split_shared_prefix(*(conversation(row[name], name) for name in both))
    else:
        parts = _answered(row, both)
    prompt, chosen, rejected = parts
    prompt = with_system(row, prompt, "system", "system_prompt")
    return checked_pair(prompt, chosen, rejected, origin, tools=tools_of(row))


class Winners:
    """The winners of one file, held against each other row by row."""

    def __init__(self, source: str, on_note: Callable[[str], None]) -> None:
        self._source, self._on_note = source, on_note
        self._numbers: dict[_Named, set[float]] = {}
        self._readings: set[str] = set()

    def see(self, row: Row) -> None:
        """Look at a row of this format before it is read; whoever listens is told, once, of winners in two forms.

        Raises:
            DataError: the winners are numbers, and not only the answers' own: they may be signs, ranks or positions.
        """
        named = _columns(row)
        if named is None or named.winner is None or (said := row.get(named.winner)) in (None, ""):
            return
        if (number := _number(said)) is not None:
            seen = self._numbers.setdefault(named, set())
            seen.add(number)
            own = {float(side) for side in named.sides if side.isdigit()}
            if seen & own and seen - own:
                raise DataError(self._two_ways(named, seen))
        try:
            _, reading = _read(said, row, named)
        except BadRow:
            return
        known = len(self._readings)
        self._readings.add(reading)
        if known < len(self._readings) == 2:
            self._on_note(f"its column {shown(named.winner)} names answers {' and '.join(sorted(self._readings))}")

    def _two_ways(self, named: _Named, seen: set[float]) -> str:
        written = ", ".join(f"{number:g}" for number in sorted(seen)[:5])
        return (
            f"{self._source}: the column {shown(named.winner)} has the numbers {written}, and the answers are "
            f"{' and '.join(map(shown, named.answers))}: which of them a number means can be read in two ways. Write "
            "the name of the better answer's column there."
        )


def _columns(row: Row) -> _Named | None:
    return _columns_named(tuple(map(str, row)))


@lru_cache(maxsize=256)
def _columns_named(names: tuple[str, ...]) -> _Named | None:
    spelt: dict[str, str] = {}
    for name in names:
        spelt.setdefault(_spelling(name), name)
    at = next((spelt[name] for name in _WINNERS if name in spelt), None)
    flags = {match[1]: name for words, name in spelt.items() if (match := _FLAG.fullmatch(words))}
    answers = [found for words, name in spelt.items() if (found := _answer_column(words, name))]
    if len(answers) != 2:
        return None
    (first, one, name), (second, other, beside) = sorted(answers)
    if (first, second) not in _SIDES or one != other or not (at or {first, second} <= flags.keys()):
        return None
    return _Named((first, second), (name, beside), one == _WHOLE, at, {} if at else flags)


def _spelling(name: str) -> str:
    """`responseA`, `response_a` and `Response A` are `response a`; `response1` is `response 1`."""
    return re.sub(r"(?<=[a-z])(?=\d\b)", " ", " ".join(words_of(name)))


def _answer_column(words: str, name: str) -> tuple[str, str, str] | None:
    """`(side, word, name)` of a column that holds one of several answers: its letter or number, and the word for it."""
    said = words.split()
    sides = [word for word in said if len(word) == 1]
    kinds = [word for word in said if word in _ANSWERS or word == _WHOLE]
    if len(sides) == len(kinds) == 1 and set(said) <= {sides[0], kinds[0], "model", "assistant"}:
        return sides[0], kinds[0], name
    return None


def _better(row: Row, named: _Named) -> str:
    """The letter or number of the better answer. Raises `BadRow` for none."""
    if named.winner is None:
        return _flagged(row, named)
    return _read(row.get(named.winner), row, named)[0]


def _read(said: Any, row: Row, named: _Named) -> tuple[str, str]:
    """The better answer of what stands for the winner, and how it is named. Raises `BadRow` for none."""
    if said is None or said == "":
        raise BadRow("without a winner", "missing")
    side = _side_of(said, named)
    texts = [one for one, name in zip(named.sides, named.answers, strict=True) if row.get(name) == said]
    if isinstance(said, str) and len(texts) == 1:
        if side is not None and texts != [side]:
            raise BadRow("the winner is the letter or number of one answer and the text of the other", "vote")
        return texts[0], "by their texts" if side is None else "by their letters or numbers"
    if side is None:
        raise BadRow(f"the winner is neither {' nor '.join(named.sides)} nor a tie", "vote")
    return side, "by their letters or numbers"


def _side_of(said: Any, named: _Named) -> str | None:
    """The answer that a winner's words or number name. Raises `BadRow` for a tie."""
    if isinstance(said, bool):
        return None
    if (number := _number(said)) is not None:
        return next((side for side in named.sides if side.isdigit() and float(side) == number), None)
    words = _spelling(str(said))
    if words in _TIES:
        raise BadRow("tie: both answers are bad" if words in _BAD_TIES else "tie: neither answer is preferred", "tie")
    left = [word for word in words.split() if word not in _BESIDE]
    return left[0] if len(left) == 1 and left[0] in named.sides and not _MARKED.search(str(said)) else None


def _number(said: Any) -> float | None:
    """The number that a winner is, with its sign."""
    if isinstance(said, int | float) and not isinstance(said, bool):
        return float(said)
    text = said.strip() if isinstance(said, str) else ""
    return float(text) if _NUMBER.fullmatch(text) else None


def _flagged(row: Row, named: _Named) -> str:
    """The one outcome that is marked with a 1. Raises `BadRow` for a tie, and for none."""
    marked = [side for side, name in named.flags.items() if str(row.get(name)).strip().lower() in ("1", "1.0", "true")]
    if len(marked) != 1:
        raise BadRow("without a winner", "missing")
    if marked[0] == "tie":
        raise BadRow("tie: neither answer is preferred", "tie")
    if marked[0] not in named.sides:
        raise BadRow(f"the winner is neither {' nor '.join(named.sides)} nor a tie", "vote")
    return marked[0]


def _answered(row: Row, both: tuple[str, str]) -> tuple[Messages, Messages, Messages]:
    """The prompt of its own column, and the two answers. Lists of texts are the turns of two conversations."""
    column = _asked(row)
    questions = _texts(row[column])
    if questions is not None:
        sides = [_interleaved(questions, _texts(row[name]), name) for name in both]
        return split_shared_prefix(sides[0], sides[1])
    prompt = prompt_of(row[column], column)
    return prompt, answer_of(row[both[0]], both[0]), answer_of(row[both[1]], both[1])


def _asked(row: Row) -> str:
    """The column that holds what was asked. Raises `BadRow`."""
    names = [str(name) for name, cell in row.items() if cell is not None and role_of(str(name))[0] == "prompt"]
    others = [name for name in ("messages", "conversations", "context") if row.get(name) is not None]
    exact = [name for name in ("prompt", "question", "instruction", "query") if name in names]
    found = next(iter([*exact, *names, *others]), None)
    if found is None:
        raise BadRow(f"without 'prompt' {columns_of(row)}", "missing")
    return found


def _texts(cell: Any) -> list[str] | None:
    """A list of texts, as an arena writes the turns of each side; None for anything else."""
    value = from_json(cell) if isinstance(cell, str) and cell.lstrip().startswith("[") else cell
    listed = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    return value if listed else None


def _interleaved(questions: list[str], answers: list[str] | None, name: str) -> Messages:
    if answers is None or len(answers) != len(questions):
        raise BadRow("the two answers have not as many turns as the prompt")
    turns = zip(questions, answers, strict=True)
    return tuple(
        message(role, text, name) for two in turns for role, text in zip(("user", "assistant"), two, strict=True)
    )
