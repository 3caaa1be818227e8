"""Questions with known answers: read from a file, and compared with what a model says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_dpo.data.rows import read_rows
from lora_dpo.errors import DataError


@dataclass(frozen=True)
class Question:
    """A prompt with its accepted answers."""

    prompt: str
    accepted: tuple[str, ...]


def is_correct(text: str, accepted: Sequence[str]) -> bool:
    """True if one of the accepted answers stands in the text as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in accepted)


def read_questions(path: str) -> list[Question]:
    """Read JSONL rows `{"prompt": …, "accepted": [ … ]}`. Raises `DataError` with file and line."""
    found = []
    for number, row in read_rows(path):
        prompt, accepted = row.get("prompt"), row.get("accepted")
        if not isinstance(prompt, str) or not isinstance(accepted, list) or not accepted:
            raise DataError(f"{path}, line {number}: a question needs 'prompt' (text) and 'accepted' (a list).")
        found.append(Question(prompt, tuple(map(str, accepted))))
    return found
