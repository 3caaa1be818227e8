"""Two answers side by side and a column that says which is better: `response_a`, `response_b`, `winner`.

Arenas, labelling tools and hand-made tables have many spellings of this. A winner that is neither of both, nor a tie,
is no pair: nothing is assigned that the row does not say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    flags: Mapping[str, str]
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


def _columns(row: Row) -> _Named | None:
    spelt: dict[str, str] = {}
    for name in map(str, row):
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
    said = _flagged(row, named) if named.winner is None else row.get(named.winner)
    if said is None or said == "":
        raise BadRow("without a winner", "missing")
    if isinstance(said, str) and (same := [row.get(name) == said for name in named.answers]).count(True) == 1:
        return named.sides[same.index(True)]
    words = _spelling(str(int(said) if isinstance(said, float) and said.is_integer() else said))
    if words in _TIES:
        raise BadRow("tie: both answers are bad" if words in _BAD_TIES else "tie: neither answer is preferred", "tie")
    left = [word for word in words.split() if word not in _BESIDE]
    if len(left) == 1 and left[0] in named.sides and not isinstance(said, bool):
        return left[0]
    raise BadRow(f"the winner is neither {' nor '.join(named.sides)} nor a tie", "vote")


def _flagged(row: Row, named: _Named) -> str | None:
    """The one outcome that is marked with a 1."""
    marked = [side for side, name in named.flags.items() if str(row.get(name)).strip().lower() in ("1", "1.0", "true")]
    return marked[0] if len(marked) == 1 else None


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
