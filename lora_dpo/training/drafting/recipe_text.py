"""A recipe as a text that teaches: each setting with a line on why it is so, in the order in which a person reads."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_dpo.config.reading import check_recipe, parse_settings
from lora_dpo.config.yaml import dump_entry
from lora_dpo.text import harmless

WIDTH = 110


def recipe_text(
    settings: Mapping[str, Any],
    *,
    head: Iterable[str],
    above: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
    foot: Iterable[str] = (),
) -> str:
    """YAML of plain settings, with comments.

    Args:
        head, foot: lines before and after the settings, as they are; longer ones are not wrapped.
        above: by dotted key, what stands over a setting, wrapped.
        beside: by dotted key, what stands behind it on its line.

    Raises:
        ConfigError: the settings are no recipe.
    """
    lines = [*_as_comments(head), ""]
    for section, value in settings.items():
        lines += _explained(section, above or {})
        if isinstance(value, dict):
            lines.append(f"{section}:")
            for key, inner in value.items():
                name = f"{section}.{key}"
                lines += [f"  {line}" for line in (*_explained(name, above or {}), _entry(name, key, inner, beside))]
        else:
            lines.append(_entry(section, section, value, beside))
        lines.append("")
    text = "\n".join((*lines, *_as_comments(foot))).rstrip("\n") + "\n"
    written = parse_settings(text, where="the recipe")
    check_recipe(written, where="the recipe")
    if written != settings:
        raise AssertionError("a recipe that is not read as it was written")
    return text


def _entry(name: str, key: str, value: Any, beside: Mapping[str, str] | None) -> str:
    comment = (beside or {}).get(name)
    return dump_entry(key, value) + (f" # {_on_one_line(comment)}" if comment else "")


def _explained(name: str, above: Mapping[str, str]) -> Iterator[str]:
    if name in above:
        for line in textwrap.wrap(_on_one_line(above[name]), WIDTH, break_long_words=False, break_on_hyphens=False):
            yield f"# {line}"


def _as_comments(lines: Iterable[str]) -> Iterator[str]:
    return (f"# {_on_one_line(line)}".rstrip() for line in lines)


def _on_one_line(text: str) -> str:
    return " ".join(harmless(text).splitlines())
