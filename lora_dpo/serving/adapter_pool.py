"""The adapters that a host can answer with: which are on the disk and fit, and those that are in memory.

Each adapter in memory is on a tree of modules of its own over the same weights (`model.share_weights`): to switch
is to take another tree. Nothing is reloaded, switched on or off, or merged.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.folder import check_adapter, put_adapter
from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS
from lora_dpo.adapters.package import BASE
from lora_dpo.adapters.passport import PASSPORT
from lora_dpo.config.reading import nearest
from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.errors import AdapterError
from lora_dpo.model.base import Base
from lora_dpo.model.lora import share_weights
from lora_dpo.model.tensor_file import State as FileState
from lora_dpo.model.tensor_file import state_of
from lora_dpo.text import plain

logger = logging.getLogger(__name__)

KEPT = 8
"""Adapters that stay in memory; the one that was used longest ago goes first."""

AHEAD = 256 << 20
"""Bytes of adapters that are put into memory before anyone asks for them."""

PATIENCE = 3.0
"""Seconds that a look at all adapters waits for one that another thread is reading."""

KEPT_BYTES = 2 << 30
"""Bytes of adapters' files that stay in memory; the newest stays, however large."""

SETTLED = 2.0
"""Seconds that its files must have been left alone before an adapter is read ahead: one that is still being written
would be read again and again."""

TICK = 0.05
"""Seconds after a write in which another one may leave the same time behind: what was read then is read again."""

State = tuple[FileState | None, ...]
"""Of the files of an adapter: another state, another adapter."""


@dataclass(frozen=True)
class _Seen:
    state: State
    reason: str | None
    """Why it does not go onto the base."""
    differs: str | None = None
    """What is not quite the base that it was made on."""
    template: TemplateKwargs = field(default_factory=dict)
    """Keywords for the chat template that it was trained with."""


class AdapterPool:
    """The adapters of one folder, by their names, for one base.

    Args:
        base: without an adapter on it; it stays so.
        folder: adapters are the folders in it.
        strict: leave out what is not quite as its passport says.
    """

    def __init__(self, base: Base, folder: Path, *, strict: bool = False) -> None:
        self.base, self.folder, self.strict = base, folder, strict
        self._lock = threading.Lock()
        """Held for moments alone: whoever asks needs it, so nothing is read from an adapter's files under it."""
        self._seen: dict[str, _Seen] = {}
        self._checking: dict[str, threading.Event] = {}
        """Adapters that some thread is reading now."""
        self._trees: dict[str, tuple[State, Any]] = {}
        self._not_ahead: dict[str, State] = {}
        """Adapters that could not be put into memory ahead; whoever asks for one is told why."""

    def names(self) -> list[str]:
        """`base`, then every adapter that fits it, as they are on the disk now. From any thread.

        One that another thread is reading for long is not among them yet.
        """
        return [BASE, *(name for name, seen in self._look().items() if seen.reason is None)]

    def check(self, name: str) -> None:
        """Raise `AdapterError` unless `name` is one of `names`. From any thread; waits for that adapter alone."""
        if name == BASE:
            return
        if name not in self._folders():
            names = self.names()
            hint = nearest(name, names) or f" There is {', '.join(names)}."
            raise AdapterError(f"There is no model {plain(name)} here.{hint}")
        if reason := self._one(name).reason:
            raise AdapterError(reason)

    def incompatibility(self, name: str) -> str | None:
        """Why an adapter is not among `names`, or what of its base differs from this one. From any thread."""
        if name not in self._folders():
            return None
        seen = self._one(name)
        return seen.reason or seen.differs

    def chat_template_kwargs(self, name: str) -> TemplateKwargs:
        """Keywords for the chat template that one of `names` was trained with. From any thread."""
        return NO_KWARGS if name == BASE else self._one(name).template

    def keywords_compared(self, players: Sequence[str]) -> list[TemplateKwargs]:
        """Keywords for the chat template, for each of those whose answers are compared. From any thread.

        Adapters have their own; the base is asked with those of the adapter beside it, so that models are compared and
        not prompts.

        Raises:
            AdapterError: one is none of `names`.
        """
        for name in players:
            self.check(name)
        own = [self.chat_template_kwargs(name) for name in players]
        beside = next((kwargs for name, kwargs in zip(players, own, strict=True) if name != BASE), NO_KWARGS)
        return [beside if name == BASE else kwargs for name, kwargs in zip(players, own, strict=True)]

    def resident(self, name: str) -> Any:
        """The modules that answer as `name`. From one thread alone. Raises `AdapterError`."""
        if name == BASE:
            return self.base.model
        folder = self.folder / name
        state = _state(folder)
        known = self._trees.pop(name, None)
        if known is None or known[0] != state:
            seen = self._one(name)
            if seen.reason:
                raise AdapterError(seen.reason)
            state = seen.state
            self._make_room(_bytes(state))
            known = (state, put_adapter(share_weights(self.base), folder))
            if _state(folder) != state:
                raise AdapterError(f"The adapter {plain(name)} was written to while it was read. Ask again.")
        self._trees[name] = known  # at the end: the last one is the one that was used last
        return known[1]

    def held(self) -> list[str]:
        """Adapters in memory, the last used last. From any thread."""
        return list(self._trees)

    def not_loaded(self, *, wait: float = PATIENCE) -> list[str]:
        """Adapters that fit and are not in memory, newest first, as long as all are few and small. From any thread.

        Args:
            wait: seconds at most for those that another thread is reading.
        """
        held = {name: state for name, (state, _) in list(self._trees.items())}
        fit = {name: seen.state for name, seen in self._look(wait=wait).items() if seen.reason is None}
        size = sum(_bytes(state) for state in held.values())
        room = KEPT - len(held)
        found: list[str] = []
        for name in sorted(fit, key=lambda name: _written(fit[name]), reverse=True):
            size += 0 if held.get(name) == fit[name] else _bytes(fit[name])
            if fit[name] in (held.get(name), self._not_ahead.get(name)) or not _is_settled(self.folder / name):
                continue
            if len(found) < room and size <= AHEAD:
                found.append(name)
        return found

    def preload(self, name: str) -> None:
        """Put an adapter of `not_loaded` into memory; whoever asks for one that cannot be is told why. From one thread
        alone."""
        state = _state(self.folder / name)
        try:
            self.resident(name)
        except AdapterError as error:  # it passed the checks, and still peft cannot take it
            if _state(self.folder / name) == state:  # not that it was replaced meanwhile
                with self._lock:
                    self._seen[name] = _Seen(state, str(error))
        except Exception:  # such as memory that a training holds: nobody has asked for it yet
            logger.warning("%s is not put into memory ahead.", name, exc_info=True)
            self._not_ahead[name] = _state(self.folder / name)

    def _make_room(self, size: int) -> None:
        """Let go of those that were used longest ago until one more of `size` bytes may come."""
        while self._trees and (
            len(self._trees) >= KEPT or size + sum(_bytes(state) for state, _ in self._trees.values()) > KEPT_BYTES
        ):
            del self._trees[next(iter(self._trees))]

    def _folders(self) -> list[str]:
        try:
            return sorted(
                folder.name
                for folder in self.folder.iterdir()
                if not folder.name.startswith(".") and folder.name != BASE and (folder / CONFIG).is_file()
            )
        except OSError:  # no folder yet, or removed while we look
            return []

    def _look(self, *, wait: float = PATIENCE) -> dict[str, _Seen]:
        """The adapters on the disk, but for those that another thread has not read within `wait` seconds. One that has
        not changed is not read again."""
        names = self._folders()
        with self._lock:
            for gone in self._seen.keys() - set(names):
                del self._seen[gone]
        until = time.monotonic() + wait
        return {name: seen for name in names if (seen := self._find(name, until=until)) is not None}

    def _one(self, name: str) -> _Seen:
        seen = self._find(name, until=math.inf)
        assert seen is not None  # noqa: S101 - it was waited for
        return seen

    def _find(self, name: str, *, until: float) -> _Seen | None:
        """What is known of an adapter as it is on the disk now; None if another thread reads it beyond `until`."""
        while True:
            state = _state(self.folder / name)
            now = time.time()
            with self._lock:
                known = self._seen.get(name)
                if known is not None and known.state == state:
                    return known
                going = self._checking.get(name)
                if going is None:
                    mine = self._checking[name] = threading.Event()
            if going is None:
                break
            left = until - time.monotonic()
            if not going.wait(None if left == math.inf else max(0.0, left)):
                return None
        try:
            seen = self._see(self.folder / name, state)
            # a clock that was set back is no reason to read again and again
            if abs(now - max((file[1] for file in state if file), default=0) / 1e9) > TICK:
                with self._lock:
                    self._seen[name] = seen
            return seen
        finally:
            with self._lock:
                del self._checking[name]
            mine.set()

    def _see(self, folder: Path, state: State) -> _Seen:
        try:
            differs = " ".join(check_adapter(self.base, folder)) or None
            template = open_adapter(folder).chat_template_kwargs
        except AdapterError as error:
            return _Seen(state, str(error))
        return _Seen(state, differs if self.strict else None, differs, template)


def _state(folder: Path) -> State:
    found: list[FileState | None] = []
    for name in (WEIGHTS, CONFIG, PASSPORT):
        try:
            found.append(state_of(folder / name))
        except OSError:
            found.append(None)  # removed, perhaps while we look
    return tuple(found)


def _is_settled(folder: Path) -> bool:
    try:
        return time.time() - max(path.stat().st_ctime for path in folder.iterdir()) >= SETTLED
    except (OSError, ValueError):  # removed, perhaps while we look
        return False


def _written(state: State) -> int:
    return state[0][0] if state[0] else 0


def _bytes(state: State) -> int:
    return state[0][2] if state[0] else 0
