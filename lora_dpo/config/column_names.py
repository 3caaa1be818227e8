"""What columns of a data file can be named as, and names of columns as an option of the command line has them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping

from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

COLUMN_NAMES = (
    "prompt",
    "chosen",
    "rejected",
    "chosen_score",
    "rejected_score",
    "system",
    "history",
    "completion",
    "label",
    "accepted",
)
"""What a column can be. `completion` and `label` are of single answers, `accepted` of prompts."""
_ALSO = {"score_chosen": "chosen_score", "score_rejected": "rejected_score", "turns": "history"}
"""Other words for some of them."""
_PART = re.compile(r"(?:\A|,)\s*([A-Za-z_]+)\s*=")


def checked_columns(named: Mapping[str, str]) -> dict[str, str]:
    """Columns by what they are to be.

    Raises:
        ValueError: there is no such thing to be, or one column is to be two things; the text is a sentence's end.
    """
    found: dict[str, str] = {}
    for name, column in named.items():
        role = _ALSO.get(name, name)
        if role not in COLUMN_NAMES:
            close = difflib.get_close_matches(role, COLUMN_NAMES, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            known = ", ".join(COLUMN_NAMES)
            raise ValueError(f"{shown(name)} is nothing that a column can be: known are {known}.{hint}")
        if role in found:
            raise ValueError(f"{role} is named twice")
        if not column.strip():
            raise ValueError(f"the column of {role} has no name")
        if column in found.values():
            other = next(first for first, taken in found.items() if taken == column)
            raise ValueError(f"{shown(column)} cannot be both {other} and {role}")
        found[role] = column
    return found


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=Question,chosen=Good answer` as columns by what they are to be; a name may have commas in it.

    Raises:
        ConfigError: it is written otherwise, or as `checked_columns` does.
    """
    parts = list(_PART.finditer(text))
    if not parts or parts[0].start() != 0:
        raise ConfigError(
            f"--columns is {shown(text)}: write WHAT=COLUMN with commas between, such as prompt=Question,chosen=Good."
        )
    ends = [part.start() for part in parts[1:]] + [len(text)]
    pairs = [(part[1], _bare(text[part.end() : end])) for part, end in zip(parts, ends, strict=True)]
    try:
        named = checked_columns(dict(pairs))
    except ValueError as error:
        said = str(error)
        raise ConfigError(f"--columns is {shown(text)}: {said}{'' if said.endswith(('.', '?')) else '.'}") from None
    if len(named) < len(pairs):
        raise ConfigError(f"--columns is {shown(text)}: something is named twice.")
    return named


def as_option(columns: Mapping[str, str]) -> str:
    """`--columns 'prompt=Question,chosen=Good answer'`, and the same as a recipe has it."""
    option = ",".join(f"{role}={name}" for role, name in columns.items())
    recipe = ", ".join(f"{role}: {_yaml(name)}" for role, name in columns.items())
    return f"--columns {_quoted(option)} (in a recipe data.columns: {{{recipe}}})"


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w=,.-]+", text) else f'"{text}"' if '"' not in text else f"'{text}'"


def _yaml(name: str) -> str:
    return name if re.fullmatch(r"[^\W\d][\w ]*", name) else json.dumps(name, ensure_ascii=False)


def _bare(name: str) -> str:
    """A name without the quotes that a shell would have taken off."""
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name
