"""YAML as recipes write it: PyYAML's safe loader and dumper with two repairs, and limits on what is read."""

from __future__ import annotations

import json
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

MAX_TEXT = 64 << 10
"""Characters of a text; the longest recipe of this repository has 3,000. PyYAML reads about 100,000 a second."""
MAX_VALUES = 10_000
"""Values in it, each counted as often as aliases repeat it."""
MAX_DEPTH = 50


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text. Raises `ConfigError` that names `where` and the line."""
    where = shown(where)[1:-1]
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{where} has {len(text):,} characters; at most {MAX_TEXT:,} are read as settings.")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error))
        hint = " In double quotes \\ begins an escape: write paths with /." if "escape" in problem else ""
        raise ConfigError(f"{where}{line}: not valid YAML ({problem}).{hint}") from None
    except (ValueError, RecursionError) as error:  # such as the date 2020-99-99
        raise ConfigError(f"{where}: a value is not valid YAML ({error}). Quote it if it is meant as text.") from None


_QUOTED = re.compile(r"""\s*('(?:[^']|'')*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)
_COMMENT = re.compile(r"(?:^|\s)#")
_SWITCHES = {"true": True, "false": False, "True": True, "False": False}


def typed_value(text: str, kind: Any, *, where: str) -> Any:
    """The value of a setting as it is typed on a command line, where nothing is a comment and quotes are optional.

    Args:
        kind: what the setting takes, as its annotation says. A text is taken letter by letter; where it takes
            something else, too (null, a number, true, a list in square brackets), that is what it says. `Any`: a
            number, true, false, null, a list or a mapping in brackets, else a text.

    Raises:
        ConfigError: a list or mapping, or quotes, that are not whole.
    """
    kinds, words = _kinds(kind)
    if not text.strip():
        return None
    if _QUOTED.fullmatch(text):
        return parse_yaml(text, where=where)
    if text in words:
        return text
    if ((list in kinds or Any in kinds) and _is_in(text, "[]")) or (({dict, Any} & kinds) and _is_in(text, "{}")):
        return parse_yaml(text, where=where)
    if type(None) in kinds and text == "null":
        return None
    if bool in kinds and text in _SWITCHES:
        return _SWITCHES[text]
    if not ({str, Any} & kinds or words):
        return text if _COMMENT.search(text) else parse_yaml(text, where=where)
    numbers = {int, float, *({bool, type(None)} if Any in kinds else ())}
    return _scalar(text, numbers if Any in kinds else numbers & kinds)


def _kinds(kind: Any) -> tuple[set[Any], set[str]]:
    """The plain types among what an annotation allows, and its words."""
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_kinds(one) for one in get_args(kind)]
        return set().union(*(one for one, _ in parts)), set().union(*(one for _, one in parts))
    if get_origin(kind) is Literal:
        return set(), {word for word in get_args(kind) if isinstance(word, str)}
    return {get_origin(kind) or kind}, set()


def _is_in(text: str, brackets: str) -> bool:
    """True for a list or mapping, also for one that is not closed; `[draft] pairs.jsonl` is a text."""
    text = text.strip()
    return text.startswith(brackets[0]) and (text.endswith(brackets[1]) or brackets[1] not in text)


def _scalar(text: str, kinds: set[Any]) -> Any:
    """A number, true, false or null of these types, if the text is one and nothing else; else the text."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ConfigError, ValueError, RecursionError):
        return text
    # YAML 1.1 reads more as numbers than people do: 12:30 is 750. And no, off and the like are words.
    plain = re.fullmatch(r"[-+.\w]+|true|false|null", text.strip()) and not isinstance(value, bool | None)
    return value if type(value) in kinds and (plain or text.strip() in (*_SWITCHES, "null")) else text


def dump_yaml(value: Any) -> str:
    """The value as YAML that `parse_yaml` reads back."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def dump_entry(key: str, value: Any) -> str:
    """One setting as one line of YAML that `parse_yaml` reads back, lists and mappings in brackets."""
    written = (_flat({key: 0}).removeprefix("{").removesuffix(": 0}"), _flat(value))
    return ": ".join(written)


def _flat(value: Any) -> str:
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)  # as JSON it is one line, and YAML, too
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=1 << 30)
    return str(text).removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    """YAML with two repairs: `5e-7` is a number (YAML 1.1 reads text), a repeated key is an error."""

    depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) not in (None, "!", "tag:yaml.org,2002:str"):
            raise ConfigError(f"The tag {shown(event.tag)} on line {line} means nothing in settings. Leave it out.")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"The value on line {line} is more than {MAX_DEPTH} deep. Settings are flatter.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where values are made: by then `<<` has mixed in the keys of another mapping.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"A key on line {line} is a list or a mapping. Write a name before the colon.")
            if key.value in seen:
                raise ConfigError(f"The key {shown(key.value)} appears twice (line {line}). Keep one of them.")
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node) if len(node.value) <= 100 else 1 << 64
        if abs(value) >= 1 << 63:
            raise ValueError(f"a number of {len(node.value)} digits, line {node.start_mark.line + 1}")
        return value


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values are in a node and how deep, aliases followed. Raises `ConfigError` if it is too much."""
    if not isinstance(node, yaml.CollectionNode):
        return 1, 0
    line = node.start_mark.line + 1
    if id(node) not in known:
        known[id(node)] = None
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = [_measure(part, known) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
    found = known[id(node)]
    if found is None:
        raise ConfigError(f"The value on line {line} holds itself. Write it out.")
    if found[0] > MAX_VALUES or found[1] > MAX_DEPTH:
        raise ConfigError(
            f"The value on line {line} has too much in it, aliases counted: at most {MAX_VALUES:,} values, {MAX_DEPTH} "
            "deep, are read as settings."
        )
    return found


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|[-+]?\.\d+[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
