"""Make `lora_dpo/config/trl_fields.py` from the TRL and transformers that are installed.

    python scripts/make_trl_fields.py            # write the table
    python scripts/make_trl_fields.py --check    # exit 1 if the committed table is another one

The table is what a mistyped field of `trainer:` is told from without loading torch. Make it again whenever
`constraints.txt` names another TRL or transformers; a test fails until it is.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lora_dpo.config.trl_kinds import KINDS, installed, live_fields, live_trackers

TABLE = Path(__file__).resolve().parent.parent / "lora_dpo" / "config" / "trl_fields.py"
WIDTH = 120

HEAD = '''\
"""The fields of TRL's config classes with what each takes: a mistyped one is told without loading torch.

Made by scripts/make_trl_fields.py from the versions below. `trl_kinds.fields_of` asks TRL itself where others are
installed.
"""

from __future__ import annotations

from typing import Any, Literal

'''


def table() -> str:
    """The whole text of the module."""
    return HEAD + "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "VERSIONS = {" + ", ".join(f'"{name}": "{version}"' for name, version in installed().items()) + "}"
    yield ""
    fields = {kind: live_fields(kind) for kind in KINDS}
    yield from _wrapped("TRACKERS: tuple[str, ...] = (", live_trackers(), ")")
    yield '"""What `report_to` can name."""'
    yield ""
    names: dict[tuple[str, ...], str] = {}
    for each in fields.values():
        for name, hint in each.items():
            if word := _words(hint):
                names.setdefault(word, f"_{name.upper()}")
    for word, name in names.items():
        yield from _wrapped(f"{name} = Literal[", word, "]")
    yield ""
    first, *others = fields
    shared = (name for name, hint in fields[first].items() if all(fields[one].get(name) == hint for one in others))
    common = {name: fields[first][name] for name in shared}
    yield "_COMMON: dict[str, Any] = {"
    yield from (f'    "{name}": {_source(hint, names)},' for name, hint in common.items())
    yield "}"
    yield ""
    yield "FIELDS: dict[str, dict[str, Any]] = {"
    for kind, each in fields.items():
        yield f'    "{kind}": {{'
        yield "        **_COMMON,"
        yield from (f'        "{name}": {_source(hint, names)},' for name, hint in each.items() if name not in common)
        yield "    },"
    yield "}"
    yield '"""By config class: each field that its constructor takes, and its type; an enumeration is its words."""'


def _words(hint: Any) -> tuple[str, ...]:
    """The words of an enumeration; empty for anything else."""
    return get_args(hint) if get_origin(hint) is Literal and len(get_args(hint)) > 1 else ()


def _source(hint: Any, names: dict[tuple[str, ...], str]) -> str:
    """A type as code, a long enumeration by its name."""
    if _words(hint) in names:
        return names[_words(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_source(one, names) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(_quoted, get_args(hint)))}]"
    if get_args(hint):
        return f"{get_origin(hint).__name__}[{', '.join(_source(one, names) for one in get_args(hint))}]"
    if hint is type(None):
        return "None"
    return "Any" if hint is Any else hint.__name__


def _wrapped(start: str, words: tuple[str, ...], end: str) -> Iterator[str]:
    """A list of words as the formatter writes it: on one line if it fits, else one a line."""
    line = start + ", ".join(map(_quoted, words)) + end
    if len(line) <= WIDTH:
        yield line
        return
    yield start
    yield from (f"    {_quoted(word)}," for word in words)
    yield end


def _quoted(word: object) -> str:
    return f'"{word}"' if isinstance(word, str) else repr(word)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    made, old = table(), TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    if parser.parse_args(arguments).check:
        if made != old:
            print("lora_dpo/config/trl_fields.py is stale: run python scripts/make_trl_fields.py", file=sys.stderr)
        return int(made != old)
    TABLE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
