"""The adapters that a host can answer with: which are on the disk and fit, and those that are in memory.

Each adapter in memory is on a tree of modules of its own over the same weights (`model.share_weights`): to switch
is to take another tree. Nothing is reloaded, switched on or off, or merged.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.adapters import PASSPORT, check_adapter, put_adapter
from lora_dpo.config import nearest
from lora_dpo.errors import AdapterError, BaseDiffers
from lora_dpo.lora_files import CONFIG, WEIGHTS, plain
from lora_dpo.model import Base, share_weights
from lora_dpo.package import BASE

logger = logging.getLogger(__name__)

KEPT = 8
"""Adapters that stay in memory; the one that was used longest ago goes first."""

AHEAD = 256 << 20
"""Bytes of adapters that are put into memory before anyone asks for them."""

SETTLED = 2.0
"""Seconds that its files must have been left alone before an adapter is read ahead: weights are mapped into memory,
and a process that reads what another one cuts short is killed."""

State = tuple[tuple[int, int, int] | None, ...]
"""Of the files of an adapter: another state, another adapter."""


@dataclass(frozen=True)
class _Seen:
    state: State
    reason: str | None
    """Why it does not go onto the base."""
    differs: str | None = None
    """What is not quite the base that it was made on."""


class Shelf:
    """The adapters of one folder, by their names, for one base.

    Args:
        base: without an adapter on it; it stays so.
        folder: adapters are the folders in it.
    """

    def __init__(self, base: Base, folder: Path) -> None:
        self.base, self.folder = base, folder
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._trees: dict[str, tuple[State, Any]] = {}
        self._not_ahead: dict[str, State] = {}
        """Adapters that could not be put into memory ahead; whoever asks for one is told why."""

    def names(self) -> list[str]:
        """`base`, then every adapter that fits it, as they are on the disk now. From any thread."""
        return [BASE, *(name for name, seen in self._look().items() if seen.reason is None)]

    def check(self, name: str) -> None:
        """Raise `AdapterError` unless `name` is one of `names`. From any thread."""
        if name == BASE:
            return
        seen = self._look()
        if name not in seen:
            names = [BASE, *(known for known, found in seen.items() if found.reason is None)]
            hint = nearest(name, names) or f" There is {', '.join(names)}."
            raise AdapterError(f"There is no model {plain(name)} here.{hint}")
        if reason := seen[name].reason:
            raise AdapterError(reason)

    def doubt(self, name: str) -> str | None:
        """Why an adapter is not among `names`, or what of its base differs from this one. From any thread."""
        seen = self._look().get(name)
        return (seen.reason or seen.differs) if seen else None

    def tree(self, name: str) -> Any:
        """The modules that answer as `name`. From one thread alone. Raises `AdapterError`."""
        if name == BASE:
            return self.base.model
        folder = self.folder / name
        state = _state(folder)
        known = self._trees.pop(name, None)
        if known is None or known[0] != state:
            check_adapter(self.base, folder)
            known = (state, put_adapter(share_weights(self.base), folder))
        self._trees[name] = known  # at the end: the last one is the one that was used last
        while len(self._trees) > KEPT:
            del self._trees[next(iter(self._trees))]
        return known[1]

    def cold(self) -> list[str]:
        """Adapters that fit and are not in memory, newest first, as long as all are few and small. From any thread."""
        held = {name: state for name, (state, _) in list(self._trees.items())}
        fit = {name: seen.state for name, seen in self._look().items() if seen.reason is None}
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

    def warm_up(self) -> bool:
        """Put one more adapter into memory; False if `cold` has none. From one thread alone."""
        for name in self.cold()[:1]:
            try:
                self.tree(name)
            except AdapterError as error:  # it passed the checks, and still peft cannot take it
                with self._lock:
                    self._seen[name] = _Seen(_state(self.folder / name), str(error))
            except Exception:  # such as memory that a training holds: nobody has asked for it yet
                logger.warning("%s is not put into memory ahead.", name, exc_info=True)
                self._not_ahead[name] = _state(self.folder / name)
            return True
        return False

    def _look(self) -> dict[str, _Seen]:
        """The adapter folders on the disk; one that has not changed is not checked again."""
        with self._lock:
            found = {}
            for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
                if folder.name.startswith(".") or folder.name == BASE or not (folder / CONFIG).is_file():
                    continue
                known, state = self._seen.get(folder.name), _state(folder)
                found[folder.name] = known if known and known.state == state else self._see(folder, state)
            self._seen = found
            return found

    def _see(self, folder: Path, state: State) -> _Seen:
        try:
            with warnings.catch_warnings(record=True) as caught:
                check_adapter(self.base, folder)
        except AdapterError as error:
            return _Seen(state, str(error))
        said = [str(one.message) for one in caught if issubclass(one.category, BaseDiffers)]
        return _Seen(state, None, " ".join(said) or None)


def _state(folder: Path) -> State:
    found: list[tuple[int, int, int] | None] = []
    for name in (WEIGHTS, CONFIG, PASSPORT):
        try:
            stat = (folder / name).stat()
        except OSError:
            found.append(None)  # removed, perhaps while we look
        else:
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def _is_settled(folder: Path) -> bool:
    try:
        return time.time() - max(path.stat().st_ctime for path in folder.iterdir()) >= SETTLED
    except (OSError, ValueError):  # removed, perhaps while we look
        return False


def _written(state: State) -> int:
    return state[0][0] if state[0] else 0


def _bytes(state: State) -> int:
    return state[0][1] if state[0] else 0
