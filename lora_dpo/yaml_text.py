"""YAML as recipes write it: PyYAML's safe loader and dumper with two repairs."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lora_dpo.errors import ConfigError


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text. Raises `ConfigError` that names `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)}).") from None
    except (ValueError, RecursionError) as error:  # such as the date 2020-99-99
        raise ConfigError(f"{where}: a value is not valid YAML ({error}). Quote it if it is meant as text.") from None


def dump_yaml(value: Any) -> str:
    """The value as YAML that `parse_yaml` reads back."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """YAML with two repairs: `5e-7` is a number (YAML 1.1 reads text), a repeated key is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where values are made: by then `<<` has mixed in the keys of another mapping.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"A key on line {line} is a list or a mapping. Write a name before the colon.")
            if key.value in seen:
                raise ConfigError(f"The key {key.value!r} appears twice (line {line}). Keep one of them.")
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|[-+]?\.\d+[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
