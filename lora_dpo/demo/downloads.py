"""What leaves the demo: packages and exports, each in a free place. Work that takes long says how far it is."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_dpo.adapters.exchange import pack
from lora_dpo.demo.session import AppState
from lora_dpo.errors import ConfigError
from lora_dpo.files import numbered
from lora_dpo.text import plain

EXPORTS = {"merge": "-merged", "gguf": ".gguf", "gguf-adapter": "-lora.gguf", "ollama": "-ollama"}
"""Kinds of an export, with the end of the name that is written: a merged model folder, files for llama.cpp, Ollama."""

FETCHED = 3600.0
"""Seconds after which a file on its way has been fetched."""

OUT = "out-"

Tick = Callable[[int, int], None]


def packed(app_state: AppState, name: str) -> Path:
    """An adapter as one file, on its way to a browser. Raises as `exchange.pack`."""
    return pack(app_state.find(name), on_the_way(app_state))


def exported_pairs(app_state: AppState, name: str) -> Path:
    """A file of pairs in the canonical format, on its way to a browser. Raises `DataError`."""
    return app_state.pairs.export([name], on_the_way(app_state) / f"{name}.jsonl")


def exported(app_state: AppState, name: str, kind: str) -> Iterator[tuple[int, int, Path]]:
    """Write an adapter as one of `EXPORTS`: yields how much is done, of how much, and the place; at last all of it.

    A file is on its way to a browser; a folder stays in `exports/` of the demo's folder. One is written at a time; it
    ends, and nothing of it stays, when the iterator is closed.

    Raises:
        ConfigError: there is no such kind.
        LoraDPOError: as `merge` and `export`.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"There is no export of the kind {plain(kind)}: there is {', '.join(EXPORTS)}.")
    adapter = app_state.find(name)
    target = _free(app_state, adapter.name, EXPORTS[kind])
    total = 1
    for done, total in _in_thread(_work(app_state, adapter, target, kind), app_state.exporting):
        yield done, total, target
    yield total, total, target


def on_the_way(app_state: AppState) -> Path:
    """A new empty folder for a file that a browser will fetch; older ones, of files long fetched, are removed."""
    for folder in app_state.outbox.glob(f"{OUT}*"):
        if time.time() - folder.stat().st_mtime > FETCHED:
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=OUT, dir=app_state.outbox))


def _free(app_state: AppState, name: str, end: str) -> Path:
    folder = on_the_way(app_state) if end.endswith(".gguf") else app_state.pairs.folder / "exports"
    return next(path for path in map(folder.joinpath, numbered(name, end)) if not path.exists())


def _work(app_state: AppState, adapter: Path, target: Path, kind: str) -> Callable[[Tick], object]:
    from lora_dpo.release.exports.export_adapter import export
    from lora_dpo.release.merge_base import trained_into
    from lora_dpo.release.merged_folder import merge

    model = app_state.host.base.name  # the base is here: the passport may name another place
    if kind == "merge":
        return lambda tick: merge(adapter, target, into=trained_into(adapter, model), model=model, on_tensor=tick)
    return lambda tick: export(adapter, target, to=kind, model=model, on_tensor=tick)  # type: ignore[arg-type]


class _Unwanted(Exception):
    """Nobody waits for an export any more."""


def _in_thread(work: Callable[[Tick], object], one_at_a_time: threading.Lock) -> Iterator[tuple[int, int]]:
    """Run `work` in a thread and yield the newest state of how far it is; raises what it raised.

    It waits for the lock first, and ends at its next tick when the iterator is closed: then the page has gone.
    """
    states: queue.SimpleQueue[tuple[int, int] | Exception | None] = queue.SimpleQueue()
    unwanted = threading.Event()

    def tick(done: int, total: int) -> None:
        if unwanted.is_set():
            raise _Unwanted
        states.put((done, total))

    def run() -> None:
        try:
            while not one_at_a_time.acquire(timeout=0.2):
                tick(0, 1)
            try:
                work(tick)
            finally:
                one_at_a_time.release()
        except Exception as error:  # raised again below, for the one who asked
            states.put(error)
        else:
            states.put(None)

    threading.Thread(target=run, name="export", daemon=True).start()
    try:
        while (state := states.get()) is not None:
            while isinstance(state, tuple) and not states.empty():
                state = states.get()
                if state is None:
                    return
            if isinstance(state, Exception):
                raise state
            yield state
    finally:
        unwanted.set()
