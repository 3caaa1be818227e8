"""Conversations that survive a reload: written for the browser that had them, and read again with care.

What comes back from a browser is from outside. Nothing of it is believed but texts, numbers and a form.
"""

from __future__ import annotations

from typing import Any

from lora_dpo.demo.conversation import Conversation, StreamedAnswer, Turn

MOST_TURNS = 40
MOST_CHARACTERS = 200_000
"""Of all texts together: browsers keep some five million for a page."""


def remembered(conversation: Conversation, left: str, right: str, system: str) -> dict[str, Any]:
    """A conversation as plain values: the last of its turns, as many as there is room for."""
    turns: list[dict[str, Any]] = []
    room = MOST_CHARACTERS - len(system)
    for turn in reversed(conversation.exchanges[-MOST_TURNS:]):
        room -= len(turn.user) + sum(len(said.text) for said in turn.answers if said)
        if room < 0:
            break
        turns.insert(0, {"user": turn.user, "answers": [_row(said) for said in turn.answers]})
    return {"left": left, "right": right, "system": system, "turns": turns}


def recalled(found: Any) -> tuple[Conversation, str, str, str]:
    """The conversation, both names and the system prompt of `remembered`; empty ones for anything else."""
    if not isinstance(found, dict) or not isinstance(found.get("turns"), list):
        return Conversation(), "", "", ""
    turns = [_turn(row) for row in found["turns"][-MOST_TURNS:]]
    left, right, system = (value if isinstance(value := found.get(key), str) else "" for key in _NAMES)
    size = len(system) + sum(len(turn.user) + sum(len(a.text) for a in turn.answers if a) for turn in turns if turn)
    if None in turns or size > MOST_CHARACTERS:
        return Conversation(), "", "", ""
    return Conversation([turn for turn in turns if turn]), left, right, system


_NAMES = ("left", "right", "system")


def _row(said: StreamedAnswer | None) -> dict[str, Any] | None:
    return {"who": said.who, "text": said.text, "cut": said.cut} if said else None


def _turn(row: Any) -> Turn | None:
    if not isinstance(row, dict) or not isinstance(row.get("user"), str) or not row["user"].strip():
        return None
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) != 2:
        return None
    said = [_answer(answer) for answer in answers]
    return Turn(row["user"], said) if any(answer and answer.text.strip() for answer in said) else None


def _answer(row: Any) -> StreamedAnswer | None:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("who", "text")):
        return None
    return StreamedAnswer(row["who"], row["text"], cut=row.get("cut") is True)
