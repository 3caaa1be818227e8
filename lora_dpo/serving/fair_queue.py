"""Whose work is done next: clients take turns in a circle, and each client's own requests keep their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from lora_dpo.errors import Busy

INTERNAL = ""
"""The client name of the host's own work, such as training: it has its turns, but is not counted or refused."""


Result = TypeVar("Result")


class Work(Protocol):
    """Something that takes one turn."""

    def run(self) -> None:
        """Do it; called by the one thread that computes."""


class Task(Generic[Result]):
    """A function as a piece of work."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._results: list[Result] = []
        self._error: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        """Call it."""
        try:
            self._results.append(self._work())
        except Exception as error:  # for the one who waits
            self._error = error
        finally:
            self.done.set()

    def outcome(self) -> Result:
        """Wait for its turn; what it returned, or raise what it raised. Raises `Busy` if there are no more turns."""
        self.done.wait()
        if self._error is not None:
            raise self._error
        if not self._results:
            raise Busy("The model is being shut down.")
        return self._results[0]


class FairQueue:
    """The queue between the threads that ask and the one thread that computes.

    A client is `PLACE` or `PLACE/NAME`, such as an address and whom it speaks for. Places take turns, and so do the
    names of a place: who comes under many names has no more turns for it.

    Args:
        max_waiting: requests that may wait. One more is refused, unless another place, or another name of its place,
            has at least two more than the one that comes: then the newest of those that have most gives way.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._places: dict[str, dict[str, deque[Work]]] = {}  # both in the order of the circle
        self._closed = False

    def put(self, client: str, work: Work) -> Work | None:
        """Wait in the client's line. Raises `Busy` when too many wait, or after `close`.

        Returns:
            The work that gave way and will have no turn, if one did: whoever waits for it must be told.
        """
        place, name = _parts(client)
        with self._changed:
            if self._closed:
                raise Busy("The model is being shut down.")
            gone = None
            if client != INTERNAL and self._count() >= self.max_waiting:
                gone = self._make_room(place, name)
                if gone is None:
                    raise Busy(f"{self.max_waiting} requests are waiting already. Try again in a moment.")
            self._places.setdefault(place, {}).setdefault(name, deque()).append(work)
            self._changed.notify_all()
            return gone

    def take(self) -> Work | None:
        """The next work, as soon as there is some; its client goes to the end of the circle. None after `close`."""
        with self._changed:
            while not self._places and not self._closed:
                self._changed.wait()
            if not self._places:
                return None
            place, names = next(iter(self._places.items()))
            name, line = next(iter(names.items()))
            work = line.popleft()
            del self._places[place], names[name]
            if line:
                names[name] = line
            if names:
                self._places[place] = names
            return work

    def withdraw(self, client: str, work: Work) -> bool:
        """Leave the line; False if the work has been taken already."""
        place, name = _parts(client)
        with self._changed:
            line = self._places.get(place, {}).get(name)
            if line is None or work not in line:
                return False
            line.remove(work)
            self._tidy(place, name)
            return True

    def waiting(self) -> int:
        """Requests that wait."""
        with self._changed:
            return self._count()

    def close(self) -> list[Work]:
        """Take nothing more; returns what was still waiting."""
        with self._changed:
            self._closed = True
            left = [work for names in self._places.values() for line in names.values() for work in line]
            self._places.clear()
            self._changed.notify_all()
            return left

    def _make_room(self, place: str, name: str) -> Work | None:
        """Take the newest out of the line of whoever has most; None if nobody has two more than the one that comes."""
        most = max((one for one in self._places if one != INTERNAL), key=self._of)
        if self._of(most) < self._of(place) + 2:
            most = place  # its own names share what it has
        names = self._places.get(most, {})
        longest = max(names, key=lambda one: len(names[one]), default=None)
        if longest is None or (most == place and len(names[longest]) < len(names.get(name, ())) + 2):
            return None
        gone = names[longest].pop()
        self._tidy(most, longest)
        return gone

    def _tidy(self, place: str, name: str) -> None:
        if not self._places[place][name]:
            del self._places[place][name]
        if not self._places[place]:
            del self._places[place]

    def _of(self, place: str) -> int:
        return sum(map(len, self._places.get(place, {}).values()))

    def _count(self) -> int:
        return sum(self._of(place) for place in self._places if place != INTERNAL)


def _parts(client: str) -> tuple[str, str]:
    """Place and name; a place without a name of its own is not the host itself."""
    place, _, name = client.partition("/")
    return (place or (INTERNAL if client == INTERNAL else "?")), name
