"""Keep the libraries quiet: towards others from the start, towards the user while `quiet_libraries` says so.

Nothing is counted or reported anywhere unless its user asks for it: importing this module switches it off. TRL's
trainers tell the hub of the model's architecture, the GPU's name and the data's source whenever one is made; Gradio and
datasets count, too. Each of them can be switched on again with its own variable, set before Python starts.

Progress bars and advice are in the way of faces that draw their own. Bars, log levels and warning filters belong to
the whole process, and several threads may be inside at once. So the first one in sets them, the last one out puts them
back, and filters are set once, narrow, and stay.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL, transformers, and whatever else asks huggingface_hub to tell
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def switch_off() -> None:
    """Set each variable that its user did not set, also for libraries that read theirs when they were imported."""
    ours = {name for name, value in OFF.items() if os.environ.setdefault(name, value) == value}
    hub, datasets = sys.modules.get("huggingface_hub.constants"), sys.modules.get("datasets.config")
    if hub is not None and "HF_HUB_DISABLE_TELEMETRY" in ours:
        setattr(hub, "HF_HUB_DISABLE_TELEMETRY", True)  # noqa: B010 - a script imported trl first
    if datasets is not None and "HF_UPDATE_DOWNLOAD_COUNTS" in ours:
        setattr(datasets, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # noqa: B010


switch_off()


LIBRARIES = (
    r"(accelerate|bitsandbytes|datasets|huggingface_hub|lora_dpo|peft|safetensors|torch|transformers|trl)(\.|\Z)"
)
"""Modules whose `FutureWarning` is about what the libraries will rename; ours, where it is said of who called."""

_lock = threading.Lock()
_inside: Counter[str] = Counter()
_undo: dict[str, Callable[[], None]] = {}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of transformers and datasets, and no advice that a user cannot act on. In any thread."""
    never_warn(FutureWarning, LIBRARIES)
    # bitsandbytes asks to install an optional CPU kernel that is not used
    with _while_inside("bars", _hide_bars), errors_only("bitsandbytes"):
        yield


@contextlib.contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Nothing below an error from the logger of that name and those under it. In any thread."""

    def set_level() -> Callable[[], None]:
        logger = logging.getLogger(name)
        level = logger.level
        logger.setLevel(logging.ERROR)
        return lambda: logger.setLevel(level)

    with _while_inside(f"logger {name}", set_level):
        yield


def never_warn(category: type[Warning], module: str) -> None:
    """Ignore a kind of warning of the modules that a pattern names, from now on.

    Not for a while: `warnings.catch_warnings` puts back what it found, whatever other threads have set since.
    """
    wanted = ("ignore", None, category, re.compile(module), 0)
    if wanted not in warnings.filters:  # another filter makes every warning new again
        warnings.filterwarnings("ignore", category=category, module=module)


@contextlib.contextmanager
def _while_inside(what: str, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Change something of the process while any thread is inside; `change` returns how to put it back."""
    with _lock:
        if not _inside[what]:
            _undo[what] = change()
        _inside[what] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[what] -= 1
            if not _inside[what]:
                _undo.pop(what)()


def _hide_bars() -> Callable[[], None]:
    import datasets
    from transformers.utils import logging as transformers_logging

    ours, theirs = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()

    def put_back() -> None:
        if ours:
            transformers_logging.enable_progress_bar()
        if theirs:
            datasets.enable_progress_bars()

    return put_back
