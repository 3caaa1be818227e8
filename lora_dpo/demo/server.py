"""Gradio on a socket of ours.

Gradio looks for a port, lets it go, and opens it again; it gives its server five seconds to start, and then asks
itself for the page with three seconds' patience. Each is an error on a busy machine. And its server waits without end
for a request (`connections`).
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradio import http_server

from lora_dpo.errors import ConfigError
from lora_dpo.serving.connections import Server, server_config


class _Thread(Server):
    """A server in a thread, with the two methods that Gradio calls."""

    def __init__(self, app: Any, listening: socket.socket) -> None:
        super().__init__(server_config(app))
        self.running_app = app
        self._socket = listening
        self._thread = threading.Thread(target=self.run, args=([listening],), name="demo server", daemon=True)

    def start(self) -> None:
        """Return when it answers, however long a busy machine takes for that. Raises `ConfigError`."""
        self._thread.start()
        while not self.started:
            if not self._thread.is_alive():
                raise ConfigError("The demo's server did not start; its log says why. Try again.")
            time.sleep(0.005)

    def install_signal_handlers(self) -> None:
        """Signals are for the main thread."""

    def close(self) -> None:
        """End it."""
        self.should_exit = True
        self._thread.join(timeout=5)
        self._socket.close()


@contextmanager
def serving_on(listening: socket.socket, name: str) -> Iterator[None]:
    """Inside, `launch` of a page serves on a socket that listens already, as the host `name`."""

    def start_server(app: Any, **_: Any) -> tuple[str, int, str, _Thread]:
        server = _Thread(app, listening)
        server.start()
        port = listening.getsockname()[1]
        where = "localhost" if name == "0.0.0.0" else name  # noqa: S104 - Gradio asks itself for its first page
        return name, port, f"http://{where}:{port}/", server

    gradios: Any = http_server
    theirs = gradios.start_server
    gradios.start_server = start_server
    try:
        yield
    finally:
        gradios.start_server = theirs
