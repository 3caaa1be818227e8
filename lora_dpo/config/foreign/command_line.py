"""A command line, alone in a file or in a shell script, as names and values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from lora_dpo.config.yaml import typed_value
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

_ASSIGNED = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def commands(text: str, *, where: str) -> Iterator[list[str]]:
    """The words of each command of a text; `NAME=value` of earlier lines is put in for `$NAME`.

    Raises:
        ConfigError: a quote that is not closed.
    """
    known: dict[str, str] = {}
    for number, line in enumerate(_joined(text), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(
                f"{where}, command {number}: {error} ({shown(line, 60)}). Write it as a shell takes it."
            ) from None
        assigned = _ASSIGNED.fullmatch(line)
        if assigned and len(words) <= 2:
            known[assigned[1]] = words[-1].partition("=")[2]
        elif words:
            yield [_VARIABLE.sub(lambda found: known.get(found[1] or found[2], found[0]), word) for word in words]


def _joined(text: str) -> Iterator[str]:
    """Lines, with those that a backslash continues as one."""
    return (line for line in re.sub(r"\\\r?\n", " ", text).splitlines() if line.strip())


def flags(words: list[str], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """`--name value`, `--name=value`, `--name a b` and `--switch`; and the words before the first.

    Values are what they look like; hyphens in names are underscores, `--no_name` switches `name` off.
    """
    found: dict[str, list[str]] = {}
    before: list[str] = []
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name is None:
            before.append(word)
        else:
            found[name].append(word)
    values = {name: [_typed(word, where) for word in given] for name, given in found.items()}
    return dict(_named(name, given) for name, given in values.items()), before


def _named(name: str, given: list[Any]) -> tuple[str, Any]:
    if not given:
        return (name.removeprefix("no_"), False) if name.startswith("no_") else (name, True)
    return name, given[0] if len(given) == 1 else given


def _typed(word: str, where: str) -> Any:
    if word == "None":
        return None
    return typed_value(word, Any, where=where)
