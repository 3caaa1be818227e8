"""The text of `--help` as terminals show it: paragraphs that flow, commands that can be copied."""

from __future__ import annotations

import inspect
import re

import typer

WIDTH = 72
"""Characters of a line of an example: 80 less the margins."""

_WORDS = re.compile(r"""(?:--?[a-z-]+ (?!-))?(?:"[^"]*"|'[^']*'|\S)+""")
"""Words of a command; an option keeps its value."""


def make_readable(app: typer.Typer, pages: dict[str, str], page: str | None = None) -> None:
    """Set the help of every command from its docstring, in groups too.

    Args:
        pages: by command or group, the page of `lora-dpo docs` that tells more.
        page: that of the group which `app` is.
    """
    if app.registered_callback is not None:
        app.registered_callback.help = readable(inspect.getdoc(app.registered_callback.callback) or "")
    for command in app.registered_commands:
        text = command.help or inspect.getdoc(command.callback) or ""
        command.help = readable(text, page or pages.get(command.name or ""))
    for group in app.registered_groups:
        inside = group.typer_instance
        if inside is not None:
            make_readable(inside, pages, pages.get(group.name or ""))
            group.help = readable(str(inside.info.help or ""), pages.get(group.name or ""))


def readable(text: str, page: str | None = None) -> str:
    """A docstring with its paragraphs on one line each, and indented lines, which are examples, below each other.

    An example that is too long for a terminal goes on behind a backslash, as a shell takes it.
    """
    parts: list[str] = []
    for part in inspect.cleandoc(text).split("\n\n"):
        if not part.startswith(" "):
            parts.append(" ".join(part.split("\n")))
        elif parts and parts[-1].startswith(" "):
            parts[-1] += f"\n{_example(part)}"
        else:
            parts.append(_example(part))
    return "\n\n".join([*parts, *([f"More: lora-dpo docs {page}"] if page else [])])


def _example(text: str) -> str:
    """An indented line, in several if it is long."""
    if len(text) <= WIDTH or "  " in text.strip():  # columns of their own
        return text
    lines = [" " * (len(text) - len(text.lstrip()) - 1)]
    for word in _WORDS.findall(text):
        if len(lines[-1]) + 1 + len(word) > WIDTH - 2:
            lines.append(" " * 7)
        lines[-1] += f" {word}"
    return " \\\n".join(lines)
