"""A web server that nobody can hold up by opening connections and sending nothing.

uvicorn waits without end for the rest of a request, and takes connections until the process has no file descriptors
left. Here a request must come within a time, an answer must be read within a time, and of too many connections those
go first that have sent no whole request.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

HEADER_TIME = 10.0
"""Seconds in which the head of a request must have come, from the connection or from its first byte on."""
SILENCE = 30.0
"""Seconds without a byte in the middle of a body, or without a byte taken of an answer, after which nobody is there."""
MOST = 1024
"""Connections at once, where the process may open twice as many files; else half of those."""
SAID_AGAIN = 60.0
"""Seconds between two lines of the log about connections that could not be taken."""


def server_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """uvicorn's settings for an app behind `Connection`; run them with a `Server` on a socket that listens."""
    backlog = min(128, max(8, most_connections() // 4))  # so many are taken at once, before any can be closed
    common: dict[str, Any] = {"http": Connection, "loop": "asyncio", "ws": "none", "access_log": False}
    # "error": a line for each request that is none would let anybody fill the log
    return uvicorn.Config(app, log_level="error", backlog=backlog, **common, **settings)


def most_connections() -> int:
    """Connections that this process may have: half of the files that it may open, the rest is for everything else."""
    if sys.platform == "win32":
        return MOST  # no such limit there
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else min(MOST, max(8, files // 2))


class Server(uvicorn.Server):
    """Says once a minute, not at every try, that a connection could not be taken."""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, as uvicorn does."""
        asyncio.get_running_loop().set_exception_handler(_Complaints())
        await super().startup(sockets)


class Connection(H11Protocol):
    """One connection, with an end to every wait for its other side."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; where there are too many, one that has sent none gives way."""
        super().connection_made(transport)
        self._since = time.monotonic()
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._expect(HEADER_TIME)
        if len(self.connections) > (most := most_connections()):
            alive = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
            if len(alive) > most:
                waiting = (one for one in alive if one.is_half_open())
                min(waiting, key=lambda one: one._since, default=self).drop()

    def data_received(self, data: bytes) -> None:
        """Take some bytes in."""
        super().data_received(data)
        if not self.is_half_open():
            self._expect(None)
        elif self._in_body():
            self._expect(SILENCE)
        elif self._reading is None:
            self._expect(HEADER_TIME)  # the beginning of the next request; more of it gives it no more time

    def on_response_complete(self) -> None:
        """uvicorn's own time for the next request begins, unless a part of it is here."""
        self._expect(None)
        super().on_response_complete()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing() and self.is_half_open():
            self._expect(HEADER_TIME)

    def pause_writing(self) -> None:
        """The other side does not read."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(SILENCE, self.drop)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._expect(None)
        if self._writing is not None:
            self._writing.cancel()
        super().connection_lost(exc)

    def is_half_open(self) -> bool:
        """Whether no whole request is here that waits for its answer."""
        return self.cycle is None or self.cycle.response_complete or self._in_body()

    def drop(self) -> None:
        """End it at once."""
        self.transport.abort()

    def _in_body(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body

    def _expect(self, seconds: float | None) -> None:
        """Drop the connection if nothing has come in that time; None: nothing is expected."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None if seconds is None else self.loop.call_later(seconds, self._waited)

    def _waited(self) -> None:
        if self._in_body() and self.flow.read_paused:  # it is the app that does not read
            self._expect(SILENCE)
        else:
            self.drop()


class _Complaints:
    """asyncio's handler of errors that nobody awaits."""

    def __init__(self) -> None:
        self._said = -SAID_AGAIN

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _EXHAUSTED):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said > SAID_AGAIN:
            self._said = time.monotonic()
            logger.error("A connection could not be taken: %s. Raise the limit of open files (ulimit -n).", error)


_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
