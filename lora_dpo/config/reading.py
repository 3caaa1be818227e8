"""Recipes read from files and options, with an error for whatever is not one; and written back.

Also hints for mistyped names, and the table of settings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lora_dpo.config.recipe import Recipe, Section
from lora_dpo.config.yaml import dump_yaml, parse_yaml, typed_value
from lora_dpo.errors import ConfigError
from lora_dpo.text import SHOWN, one_line, shown


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides with dotted keys.

    Raises:
        ConfigError: missing file, broken YAML, unknown key, or a value of the wrong kind.
    """
    return check_recipe(read_settings(path, overrides), where=str(path))


def read_settings(path: str | Path, overrides: Sequence[str] = (), kind: type[Section] = Recipe) -> dict[str, Any]:
    """The plain settings of a YAML file, `key=value` overrides applied; they are not checked yet.

    Args:
        kind: what they are settings of: values of overrides are read as what their keys take.

    Raises:
        ConfigError: missing file, broken YAML, or no settings in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe at {path}.{_nearby(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"The recipe {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}") from error
    settings = parse_settings(text, where=str(path))
    for override in overrides:
        set_override(settings, override, kind)
    return settings


def set_override(settings: dict[str, Any], override: str, kind: type[Section] = Recipe) -> str:
    """Put `key=value` into plain settings; returns the dotted key. Raises `ConfigError` for what is no setting."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown(override)} is not a setting. Write key=value, such as trainer.beta=0.2.")
    _set_dotted(settings, key, typed_value(value, _kind_of(key, kind), where=override))
    return key


def check_recipe(settings: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate plain settings. Raises `ConfigError` that names the key, the value and what is allowed."""
    if "improve" in settings:
        raise ConfigError(f"{where} is a recipe for lora-dpo improve: it has a section improve. Use that command.")
    return check_settings(Recipe, settings, where=where)


AnySection = TypeVar("AnySection", bound=Section)


def check_settings(kind: type[AnySection], settings: dict[str, Any], *, where: str) -> AnySection:
    """Validate plain settings as a section of this kind. Raises `ConfigError` as `check_recipe` does."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + " ".join(_sentences(error, kind))) from None


def parse_settings(text: str, *, where: str) -> dict[str, Any]:
    """The plain settings in a text of YAML; they are not checked yet. Raises `ConfigError` if there are none."""
    settings = parse_yaml(text, where=where)
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} is not a recipe: expected settings such as 'model:' and 'data:'.")
    return settings


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every setting written out."""
    # A reference adapter brings its own LoRA settings: written out they would be refused when read again.
    return dump_settings(recipe, hidden=set() if recipe.reference_adapter is None else {"lora"})


def dump_settings(section: Section, *, hidden: set[str]) -> str:
    """A section as YAML, every setting written out but the hidden ones."""
    settings = section.model_dump(mode="json", exclude=hidden)
    return dump_yaml(settings)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint ` Did you mean …?` for a mistyped name, or the empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless a command-line option has one of its allowed values."""
    if value not in allowed:
        raise ConfigError(f"{option} is {shown(value)}: allowed are {', '.join(allowed)}.{nearest(value, allowed)}")


def describe_fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield `(dotted key, default, description)` for every setting, in the recipe's order."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe_fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else dump_yaml(info.default).split("\n")[0]
            yield f"{prefix}{name}", default, info.description or ""


def _kind_of(dotted: str, section: type[Section]) -> Any:
    """What a setting takes; `Any` for one that is none, and for the fields of TRL under `trainer`."""
    first, _, rest = dotted.partition(".")
    found = section.model_fields.get(first)
    kind: Any = Any if found is None else found.annotation
    inside = isinstance(kind, type) and issubclass(kind, Section)
    if rest:
        return _kind_of(rest, kind) if inside else Any
    return dict if inside else kind


def _set_dotted(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise ConfigError(f"{dotted}: {parent} is a single value, it has no settings inside.")
    settings[last] = value


def _sentences(error: ValidationError, kind: type[Section]) -> Iterator[str]:
    known = [key for key, _, _ in describe_fields(kind)]
    for problem in error.errors()[:3]:
        key = one_line(".".join(str(part) for part in problem["loc"] if not _is_type_tag(part)), SHOWN)
        if problem["type"] == "extra_forbidden":
            hint = _ABSENT.get(key) or _meant(key, problem["input"], known)
            yield f"{key} is not a setting.{hint or ' Fields of TRL go under trainer:.'}"
        elif problem["type"] == "missing":
            yield f"{key} is missing; it has no default."
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{key} is {shown(problem['input'])}: {message[0].lower()}{message[1:]}."


_ABSENT = {
    "lora.trainable_tokens": " Rows of the embeddings are not trained alone here: train all of them with "
    "lora.modules_to_save: [embed_tokens] (lora-dpo docs decisions)."
}
"""What is said of settings that were decided against."""


def _meant(key: str, value: Any, known: list[str]) -> str:
    """A hint for a key that does not exist."""
    if isinstance(value, dict):  # a section: `train: {max_steps: 2}`
        return nearest(key, [*{name.partition(".")[0] for name in known if "." in name}, "trainer"])
    # The same last part anywhere, so that `rank` finds `lora.rank`; then what looks alike.
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    return f" Did you mean {same_name[0]}?" if same_name else nearest(key, [*known, "trainer"])


def _is_type_tag(part: str | int) -> bool:
    """pydantic appends the tried type of a union to the location: `str`, `list[str]`, `literal[…]`."""
    return isinstance(part, str) and bool(re.match(r"(str|bool|int|float|list\[.*|literal\[.*)$", part))


def _nearby(path: Path) -> str:
    recipes = [str(found) for found in sorted(path.parent.glob("*.yaml")) or sorted(Path("configs").glob("*.yaml"))]
    return nearest(str(path), recipes) or (f" There is {', '.join(recipes)}." if recipes else "")
