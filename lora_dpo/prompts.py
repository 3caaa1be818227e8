"""Prompts to sample answers to: text, JSONL, or the prompts of preference data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.data import Message, read_pairs
from lora_dpo.data.files import read_rows
from lora_dpo.errors import DataError
from lora_dpo.evaluate import evenly

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends where the assistant is to write."""

    messages: tuple[Message, ...]
    source: str
    """File or hub id."""
    row: int
    """Row in the source, from 1 (the line, in text and JSONL)."""
    accepted: tuple[str, ...] = ()
    """Known answers, for judges that compare with them."""

    @property
    def text(self) -> str:
        """The last message's text: what is asked."""
        return self.messages[-1]["content"]


def read_prompts(source: str, *, limit: int | None = None) -> list[Prompt]:
    """Read prompts in order, each once.

    - `.txt`: one prompt a line; empty lines are skipped.
    - rows with `prompt` (text or messages) or `messages`, and perhaps `accepted` (a text or a list of them);
      row by row in any file that preference data may have, or a hub data set.
    - preference data in any form that training reads: its prompts.

    Args:
        limit: keep this many prompts, spread evenly over the source.

    Raises:
        DataError: the source cannot be read, or has no prompt.
    """
    found = _text_prompts(Path(source)) if source.lower().endswith(".txt") else _row_prompts(source)
    first: dict[str, Prompt] = {}
    for prompt in found:
        first.setdefault(json.dumps(prompt.messages), prompt)
    unique = list(first.values())
    if not unique:
        raise DataError(f"{source} holds no prompt. Write one prompt a line, or rows with 'prompt'.")
    return [unique[index] for index in evenly(len(unique), limit)] if limit else unique


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of what is asked, in order."""
    return hashlib.sha256(json.dumps([prompt.messages for prompt in prompts]).encode()).hexdigest()


def _text_prompts(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give a file of prompts.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return [
        Prompt((Message(role="user", content=line.strip()),), str(path), number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _row_prompts(source: str) -> list[Prompt]:
    found = []
    for number, row in read_rows(source):
        value = row.get("prompt") if row.get("prompt") is not None else row.get("messages")
        if value is None:
            if number == 1:  # another form of preference data: its own reader knows where the prompt is
                pairs, _ = read_pairs(source)
                return [Prompt(pair.prompt, pair.origin.source, pair.origin.row) for pair in pairs]
            raise DataError(f"{source}, row {number}: without 'prompt'. Each row needs one.")
        accepted = _accepted(row.get("accepted"), source, number)
        found.append(Prompt(_messages(value, source, number), source, number, accepted))
    return found


def _messages(value: Any, source: str, number: int) -> tuple[Message, ...]:
    where = f"{source}, row {number}"
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'prompt' is neither text nor a list of messages.")
    found = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str) or item.get("role") not in ROLES:
            raise DataError(f"{where}: a message needs a 'role' ({', '.join(ROLES)}) and a 'content' of text.")
        found.append(Message(role=item["role"], content=item["content"]))
    if found[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with the assistant. It must end where an answer is to follow.")
    if not found[-1]["content"].strip():
        raise DataError(f"{where}: the prompt is empty. Remove the row.")
    return tuple(found)


def _accepted(value: Any, source: str, number: int) -> tuple[str, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in listed):
        raise DataError(f"{source}, row {number}: 'accepted' must be a text or a list of texts.")
    return tuple(map(str, listed))
