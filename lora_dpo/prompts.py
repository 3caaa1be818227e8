"""Prompts to sample answers to: text, JSONL, or the prompts of preference data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.data import Message, Origin
from lora_dpo.data.files import Row, files_of, near_file, read_rows
from lora_dpo.data.forms import check_prompt
from lora_dpo.data.messages import BadRow, asked_in_transcript, is_transcript, prompt_of, tools_of, with_system
from lora_dpo.data.table import form_of
from lora_dpo.errors import DataError
from lora_dpo.evaluate import evenly


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
    - preference data and votes in any form that training reads: their prompts. Rows that are no pair and have no
      `prompt` of their own are left out, as in training.
    - other rows with `prompt` (text or messages) or `messages`, and perhaps `system`.

    Rows come from any file that preference data may have, a folder, or a hub data set. They may have `accepted` (a text
    or a list of them).

    Args:
        limit: keep this many prompts, spread evenly over the source.

    Raises:
        DataError: the source cannot be read or has no prompt, or a row has one that cannot be asked.
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


def accepted_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of the known answers, in order."""
    return hashlib.sha256(json.dumps([prompt.accepted for prompt in prompts]).encode()).hexdigest()


def _text_prompts(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give a file of prompts.{near_file(path)}") from None
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
    found, no_pairs = [], []
    for file in files_of(source):
        for number, row in read_rows(file):
            try:
                messages = _prompt_of(row, Origin(file, number))
            except _NoPair as bad:
                no_pairs.append(f"{file}, row {number}: {bad}")
            except BadRow as bad:
                raise DataError(
                    f"{file}, row {number}: {bad}. A prompt is text, or messages that end where an answer is to follow."
                ) from None
            else:
                found.append(Prompt(messages, file, number, _accepted(row.get("accepted"), file, number)))
    if not found and no_pairs:
        raise DataError(f"{source} holds no prompt: {no_pairs[0]}. See docs/data.md for the forms that are read.")
    return found


class _NoPair(Exception):
    """A row of preference data that training would leave out, too, and without a column of its own for the prompt."""


def _prompt_of(row: Row, origin: Origin) -> tuple[Message, ...]:
    """The prompt of a row, as the reader of its form makes it; else of its column `prompt` or `messages`.

    Raises:
        BadRow: there is none, or it cannot be asked.
    """
    if tools_of(row):
        raise BadRow("it has tools, which are not offered to the model while sampling: remove the column 'tools'")
    form = form_of(row)
    value = row.get("prompt") if row.get("prompt") is not None else row.get("messages")
    if form.name:
        try:
            made = form.read(row, origin)
        except BadRow as bad:
            if value is None:
                raise _NoPair(str(bad)) from bad
        else:  # several pairs of one row follow one prompt
            return (made[0] if isinstance(made, list) else made).prompt
    if value is None:
        raise BadRow("without 'prompt'", "missing")
    messages = asked_in_transcript(value) if is_transcript(value) else prompt_of(value)
    messages = with_system(row, messages, "system", "system_prompt")
    check_prompt(messages)
    return messages


def _accepted(value: Any, source: str, number: int) -> tuple[str, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in listed):
        raise DataError(f"{source}, row {number}: 'accepted' must be a text or a list of texts.")
    return tuple(map(str, listed))
