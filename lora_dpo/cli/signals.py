"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signals(stop: Any, say: Callable[[str], object]) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: set `stop.requested`. Second: KeyboardInterrupt, at once.

    Args:
        say: shows a line to the user.
    """

    def handle(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        say("\nStopping after this step (again to stop at once).")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
