"""Another tool's settings on their way to a recipe: taken, changed in their meaning, or without a counterpart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import shown

ORDER = ("model", "method", "data", "trainer", "lora")
"""Sections as a person reads them."""
_STAND_IN = {"model": {"name": "x"}, "data": {"train": "x.jsonl"}}
"""For a check of the other sections."""


@dataclass(frozen=True)
class Remark:
    """What became of one of their settings that could not simply be taken."""

    name: str
    """Theirs, with its value where that says more."""
    text: str
    """Why, or what to do, in one line."""
    loud: bool = False
    """It changes what is trained, and nothing here does the same."""


class Translation:
    """Settings of another tool, taken one by one; what nobody takes is named in the end.

    Args:
        tool: its name.
        given: plain settings; those that are null or an empty text are none.
    """

    def __init__(self, tool: str, given: Mapping[str, Any]) -> None:
        self.tool = tool
        self.left = {name: value for name, value in given.items() if value is not None and value != ""}
        """What nobody has taken yet."""
        self.settings: dict[str, Any] = {}
        """Those of the recipe so far."""
        self.origins: dict[str, str] = {}
        """By dotted key of the recipe: the setting of theirs that it comes from."""
        self.changed: list[Remark] = []
        self.missing: list[Remark] = []
        self._names: dict[str, str] = {}

    def rename(self, names: Mapping[str, str]) -> None:
        """Call settings by other names from here on; remarks name them as they were."""
        for theirs, name in names.items():
            if theirs in self.left:
                self.left[name] = self.left.pop(theirs)
                self._names[name] = theirs

    def origin(self, name: str) -> str:
        """A setting's name as they wrote it."""
        return self._names.get(name, name)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a setting, which is not left any more."""
        return self.left.pop(name, default)

    def number(self, name: str) -> int | float | None:
        """As `take`, for a number. Raises `ConfigError` for anything else."""
        value = self.take(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)):
            return value
        raise ConfigError(f"{self.origin(name)} is {shown(value)} in the settings: {self.tool} takes a number there.")

    def whole(self, name: str) -> int | None:
        """As `number`, for a whole one."""
        value = self.number(name)
        if value is None or value == int(value):
            return None if value is None else int(value)
        raise ConfigError(f"{self.origin(name)} is {value} in the settings: {self.tool} takes a whole number there.")

    def switch(self, name: str) -> bool:
        """As `take`, for what is on or off."""
        return _is_on(self.take(name))

    def names(self, name: str) -> list[str]:
        """As `take`, for a list of names, which may be written as one text with commas."""
        value = self.take(name)
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
        return [str(part).strip() for part in parts if str(part).strip()]

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key of the recipe."""
        section, _, name = key.partition(".")
        if name:
            self.settings.setdefault(section, {})[name] = value
        else:
            self.settings[section] = value
        self.origins[key] = origin

    def has(self, key: str) -> bool:
        """Whether a dotted key of the recipe is set."""
        return key in self.origins

    def offer(self, name: str, value: Any, origin: str | None = None) -> str | None:
        """Put a field under `trainer:` if the recipe's own check takes it there; else why it does not."""
        from lora_dpo.config.trl_dpo import trainer_settings

        tried = {**_STAND_IN, **self.settings, "trainer": {**self.settings.get("trainer", {}), name: value}}
        try:
            with quiet_libraries():
                trainer_settings(check_recipe(tried))
        except ConfigError as error:
            return re.sub(rf"^trainer\.{re.escape(name)} has no effect here: ", "", str(error)).rstrip(".")
        self.put(f"trainer.{name}", value, origin or self.origin(name))
        return None

    def change(self, name: str, text: str) -> None:
        """Remark on a setting that was taken and means something else here."""
        self.changed.append(Remark(name, text))

    def miss(self, name: str, text: str, *, value: Any = None, loud: bool = False) -> None:
        """Remark on a setting that has no counterpart."""
        named = self.origin(name)
        self.missing.append(Remark(named if value is None else f"{named}: {written(value)}", text, loud))

    def leftovers(self, quiet: Mapping[str, str], loud: Mapping[str, str]) -> None:
        """Name everything that is left: with its reason, as a field that TRL takes, or as unknown.

        Args:
            quiet, loud: reasons by name; a name that ends in `*` is the beginning of others.
        """
        for name in list(self.left):
            value = self.take(name)
            reason, matters = _reason(name, loud), True
            if reason is None:
                reason, matters = _reason(name, quiet), False
            if reason is not None:
                if _is_on(value):
                    self.miss(name, reason, value=value, loud=matters)
                continue
            refused = self.offer(name, value)
            if refused is None or not _is_on(value):
                continue
            if "is not a field of TRL" in refused:
                refused = f"it is not known here as a setting of {self.tool}, and nothing was taken from it"
            # What has another place, or no use here, is said without the field's own name.
            self.miss(name, refused, value=value, loud=refused.startswith(("it is not", "trainer.")))

    def ordered(self) -> dict[str, Any]:
        """The recipe's settings, in the order in which a person reads them."""
        names = [*(name for name in ORDER if name in self.settings), *(n for n in self.settings if n not in ORDER)]
        return {name: self.settings[name] for name in names}


def written(value: Any) -> str:
    """A value of theirs as a person would type it, short."""
    if isinstance(value, bool):
        return str(value).lower()
    short = isinstance(value, int | float) or (isinstance(value, str) and len(value) < 60)
    return str(value) if short else shown(value, 60)


def _is_on(value: Any) -> bool:
    """False for what asks for nothing: off, none, 0 and the like."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "no", "none", "off", "false", "0")
    return bool(value)


def _reason(name: str, reasons: Mapping[str, str]) -> str | None:
    if name in reasons:
        return reasons[name]
    return next((why for start, why in reasons.items() if start.endswith("*") and name.startswith(start[:-1])), None)
