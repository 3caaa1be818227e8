"""Whose work is done next: clients take turns in a circle, and each client's own requests keep their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from lora_dpo.errors import Busy

OWN = ""
"""The client name of the house's own work, such as training: it has its turns, but is not counted or refused."""


class Work(Protocol):
    """Something that takes one turn."""

    def run(self) -> None:
        """Do it; called by the one thread that computes."""


class Chore:
    """A function as a piece of work."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done = threading.Event()

    def run(self) -> None:
        """Call it."""
        try:
            self._work()
        finally:
            self.done.set()

    def wait(self) -> None:
        """Wait until it has had its turn, or there are no more."""
        self.done.wait()


class Turns:
    """The queue between the threads that ask and the one thread that computes.

    Args:
        max_waiting: requests that may wait; one more is refused.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._lines: dict[str, deque[Work]] = {}  # in the order of the circle
        self._closed = False

    def put(self, client: str, work: Work) -> None:
        """Wait in the client's line. Raises `Busy` when too many wait, or after `close`."""
        with self._changed:
            if self._closed:
                raise Busy("The model is being shut down.")
            if client != OWN and self._count() >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests are waiting already. Try again in a moment.")
            self._lines.setdefault(client, deque()).append(work)
            self._changed.notify_all()

    def take(self) -> Work | None:
        """The next work, as soon as there is some; its client goes to the end of the circle. None after `close`."""
        with self._changed:
            while not self._lines and not self._closed:
                self._changed.wait()
            if not self._lines:
                return None
            client, line = next(iter(self._lines.items()))
            work = line.popleft()
            del self._lines[client]
            if line:
                self._lines[client] = line
            return work

    def withdraw(self, client: str, work: Work) -> bool:
        """Leave the line; False if the work has been taken already."""
        with self._changed:
            line = self._lines.get(client)
            if line is None or work not in line:
                return False
            line.remove(work)
            if not line:
                del self._lines[client]
            return True

    def waiting(self) -> int:
        """Requests that wait."""
        with self._changed:
            return self._count()

    def close(self) -> list[Work]:
        """Take nothing more; returns what was still waiting."""
        with self._changed:
            self._closed = True
            left = [work for line in self._lines.values() for work in line]
            self._lines.clear()
            self._changed.notify_all()
            return left

    def _count(self) -> int:
        return sum(len(line) for client, line in self._lines.items() if client != OWN)
