"""Which fields TRL's config classes have: by the table if it was made from the installed versions, else by TRL itself.

TRL brings torch and transformers in, which takes seconds on a fast machine and a minute on a slow one: too long to be
told of a mistyped word.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from enum import Enum
from importlib.metadata import version
from typing import Any, Literal, Union, get_args, get_origin

from lora_dpo.config import trl_fields
from lora_dpo.quiet import quiet_libraries

KINDS = ("DPOConfig", "SFTConfig", "KTOConfig")


def installed() -> dict[str, str]:
    """The versions that decide which fields there are."""
    return {name: version(name) for name in ("trl", "transformers")}


def fields_of(kind: str) -> dict[str, Any]:
    """Each field that the constructor of a config class takes, with its type; an enumeration as its words."""
    return trl_fields.FIELDS[kind] if installed() == trl_fields.VERSIONS else live_fields(kind)


def known_trackers() -> tuple[str, ...]:
    """What `report_to` can name beside all and none."""
    return trl_fields.TRACKERS if installed() == trl_fields.VERSIONS else live_trackers()


@functools.cache
def live_fields(kind: str) -> dict[str, Any]:
    """`fields_of` from the class itself."""
    with quiet_libraries():  # TRL brings bitsandbytes in, which has advice to give
        import trl

        found = getattr(trl, kind)
        hints = typing.get_type_hints(found)
    return {field.name: _plain(hints[field.name]) for field in dataclasses.fields(found) if field.init}


def live_trackers() -> tuple[str, ...]:
    """`known_trackers` from transformers itself."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return tuple(INTEGRATION_TO_CALLBACK)


def _plain(hint: Any) -> Any:
    """A type in words of Python alone.

    An enumeration is its words, also where a text may stand for one: TRL takes no other. A class of a library is
    `Any`: YAML can write none.
    """
    if get_origin(hint) in (Union, types.UnionType):
        parts = get_args(hint)
        enumerated = any(map(_is_enum, parts))
        return Union[tuple(_plain(part) for part in parts if not (enumerated and part is str))]  # noqa: UP007
    if _is_enum(hint):
        return Literal[tuple(member.value for member in hint)]
    if get_origin(hint) in (list, dict):
        return get_origin(hint)[tuple(map(_plain, get_args(hint)))]
    foreign = isinstance(hint, type) and hint.__module__ != "builtins"
    return Any if foreign and hint is not type(None) else hint


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)
