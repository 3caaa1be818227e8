"""What a row means: from the forms people write preferences in to a `PreferencePair`.

One function a form; a form is recognised by the row itself. Another form is one more function here.
"""

from __future__ import annotations

import json
from typing import Any

from lora_dpo.data.files import Row
from lora_dpo.data.pairs import Origin, PreferencePair
from lora_dpo.data.template import Message

Messages = tuple[Message, ...]
ROLES = ("system", "user", "assistant", "tool")


class BadRow(Exception):
    """A row that cannot become a pair; the text is the reason, the same for all rows of its kind."""


def pair_from_row(row: Row, origin: Origin) -> PreferencePair:
    """TRL's preference form: text or messages, explicit or implicit prompt.

    Raises:
        BadRow: a part is missing, empty or malformed, or both answers are the same.
    """
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise BadRow(f"without '{side}' (columns: {', '.join(sorted(map(str, row))) or 'none'})")
    chosen, rejected = (_answer(row[side], side) for side in ("chosen", "rejected"))
    if row.get("prompt") is None:
        prompt, chosen, rejected = _split_shared_prefix(chosen, rejected)
    else:
        prompt = _prompt(row["prompt"])
        chosen, rejected = (_without_prompt(answer, prompt) for answer in (chosen, rejected))
    _check_prompt(prompt)
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or not messages[-1]["content"].strip():
            raise BadRow(f"empty {side} answer")
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"{side} does not end with the assistant")
        if messages[0]["role"] not in ("assistant", "tool"):
            raise BadRow(f"{side} starts with the {messages[0]['role']} and not with the prompt's messages")
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    return PreferencePair(prompt, chosen, rejected, origin)


def _prompt(value: Any) -> Messages:
    if isinstance(value, str):
        listed = _json_list(value)
        return _messages(listed, "prompt") if listed else (_message("user", value, "prompt"),)
    return _messages(value, "prompt")


def _check_prompt(messages: Messages) -> None:
    if not messages or not messages[-1]["content"].strip():
        raise BadRow("empty prompt")
    if messages[-1]["role"] == "assistant":
        raise BadRow("prompt ends with the assistant")


def _answer(value: Any, side: str) -> Messages:
    if isinstance(value, str):
        listed = _json_list(value)
        return _messages(listed, side) if listed else (_message("assistant", value, side),)
    if isinstance(value, dict):
        value = [value]
    return _messages(value, side)


def _without_prompt(answer: Messages, prompt: Messages) -> Messages:
    """Some data sets repeat the prompt at the start of both answers: it is the prompt only once."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _json_list(text: str) -> list[Any] | None:
    """CSV can hold messages only as JSON text: a JSON list of objects with a role, else None."""
    if not text.lstrip().startswith('[{"'):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if all(isinstance(item, dict) and "role" in item for item in parsed) else None


def _messages(value: Any, part: str) -> Messages:
    if not isinstance(value, list):
        raise BadRow(f"{part} is neither text nor a list of messages")
    found = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise BadRow(f"{part} has a message without text content")
        if item.get("role") not in ROLES:
            raise BadRow(f"{part} has a message with an unknown role ({item.get('role')!r})")
        found.append(_message(item["role"], item["content"], part))
    return tuple(found)


def _message(role: str, content: str, part: str) -> Message:
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        # JSON's "\ud83d" is half of an emoji, from a text that was cut within it: no tokenizer can read that.
        raise BadRow(f"{part} holds half of a character (a lone surrogate)") from None
    return Message(role=role, content=content)


def _split_shared_prefix(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Both sides hold the whole conversation: the messages they share are the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    if shared == 0:
        raise BadRow("without 'prompt', and chosen and rejected share no first message")
    return chosen[:shared], chosen[shared:], rejected[shared:]
