"""The app: five tabs around one state, and the server that shows them."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from typing import Any

import gradio as gr
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_dpo.demo import api, page_head, tab_adapters, tab_chat, tab_data, tab_train, tab_vote
from lora_dpo.demo.follow import Followed, follow, lead_to_chat
from lora_dpo.demo.handlers import refusal
from lora_dpo.demo.server import serving_on
from lora_dpo.demo.session import AppState
from lora_dpo.demo.steering import trained_last
from lora_dpo.demo.theme import TITLE, css, head, theme
from lora_dpo.errors import ConfigError
from lora_dpo.leftovers import give_up
from lora_dpo.serving.address import is_cross_site, is_local_name, listen
from lora_dpo.text import SHOWN, one_line

MAX_UPLOAD = "1gb"
"""Largest file that a browser may send: an adapter's package. Files of pairs have a limit of their own."""
MOST_QUEUED = 256

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # Gradio's own page has inline scripts
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "frame-ancestors 'self'",
    )
)
"""Content-Security-Policy of every response: whatever a text says, the page talks to this server alone."""


class Page(gr.Blocks):
    """Gradio's page, which says to whoever calls it what it cannot read; Gradio alone logs a traceback for that."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        """The values of a call as its parts take them. Raises `gr.Error`."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except Exception as error:  # too few values, no upload where one belongs, a choice that is none
            raise refusal(ConfigError(f"What was sent cannot be read: {_reason(error)}")) from None


def _reason(error: Exception) -> str:
    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else getattr(error, "message", str(error))
    return one_line(str(said).strip().partition("\n")[0], SHOWN)


def build(app_state: AppState, *, public: bool = False) -> gr.Blocks:
    """The page, ready to launch.

    Args:
        public: for visitors whom nobody knows: they chat and vote. Training, data and adapters are not there, their
            endpoints neither.
    """
    page = Page(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400))
    with page:
        header = page_head.build(app_state, public=public)
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Chat", id="chat"):
                chat = tab_chat.build(app_state, page, public=public)
            with gr.Tab("Vote", id="vote") as item:
                vote = tab_vote.build(app_state, item, tabs, chat.to_vote, public=public)
            if not public:
                rest = _private_tabs(app_state, page)
        if not public:
            _, train, adapters = rest
            lead_to_chat(app_state, train.compare, tabs, chat, None, lambda _: trained_last(app_state))
            lead_to_chat(app_state, adapters.chat, tabs, chat, adapters.name, lambda picked: picked)
            follow(app_state, page, Followed(header, chat, vote, *rest))
        api.add(app_state, public=public)
    return page


def _private_tabs(app_state: AppState, page: gr.Blocks) -> tuple[gr.Dropdown, tab_train.Parts, tab_adapters.Parts]:
    """The tabs that public visitors do not see."""
    with gr.Tab("Data", id="data") as data:
        files = tab_data.build(app_state, data)
    with gr.Tab("Train", id="train") as train:
        training = tab_train.build(app_state, train)
    with gr.Tab("Adapters", id="adapters"):
        adapters = tab_adapters.build(app_state, page)
    return files, training, adapters


class Guard:
    """ASGI middleware: the headers of `POLICY` on every response, and who is let in.

    Args:
        local: only requests that name this machine as it names itself. Another site's name that leads here (DNS
            rebinding) would make this page part of that site.
        names: further names that lead here rightly, in small letters, such as a Space's own.
    """

    def __init__(self, app: ASGIApp, *, local: bool, names: Collection[str] = ()) -> None:
        self.app, self.local, self.names = app, local, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its response back with the headers."""
        if self.local and scope["type"] == "http" and not self._is_ours(Headers(scope=scope).get("host", "")):
            text = "Without --auth this demo answers to localhost, 127.0.0.1 and [::1] alone, not to other names."
            await PlainTextResponse(text, status_code=403)(scope, receive, send)
            return
        if scope["type"] == "http" and is_cross_site(scope["method"], Headers(scope=scope)):
            text = "A page of another site sent this request: the demo takes files and calls from its own page alone."
            await PlainTextResponse(text, status_code=403)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", [])]
                headers += [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message["headers"] = headers
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)

    def _is_ours(self, name: str) -> bool:
        return is_local_name(name) or name.lower() in self.names


def launch(
    app_state: AppState,
    *,
    host: str,
    port: int | None = None,
    listening: socket.socket | None = None,
    auth: tuple[str, str] | None,
    share: bool = False,
    block: bool = True,
) -> str:
    """Show the page at `host:port`; returns its address (with `block`, when it ends).

    Args:
        port: None takes a free one.
        listening: a socket that listens at `host` already, in the place of a port.

    Raises:
        ConfigError: nobody can listen there.
    """
    page = queued(app_state)
    with serving_on(listening or listen(host, port or 0), host):
        # Without `_frontend` it asks itself for the page, with three seconds' patience.
        _, address, _ = page.launch(**launch_options(auth=auth, share=share), prevent_thread_lock=True, _frontend=False)
    if block:
        page.block_thread()
    return str(address)


def queued(app_state: AppState, *, public: bool = False) -> gr.Blocks:
    """The page of `build` with its queue, and Gradio told where uploads go."""
    os.environ["GRADIO_TEMP_DIR"] = str(app_state.outbox)  # uploads stay in a folder of ours, and go with it
    # Gradio keeps ten thousand events for a dashboard that is not shown, and makes a table of them after each one:
    # 50 KB and some milliseconds for every answer (measured with 20 clients and 1,500 answers).
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")
    page = build(app_state, public=public)
    page.queue(max_size=MOST_QUEUED, default_concurrency_limit=None)
    return page


def launch_options(
    *, auth: tuple[str, str] | None = None, share: bool = False, names: Collection[str] = ()
) -> dict[str, Any]:
    """What `launch` of a page of `build` is given, wherever it is shown.

    Args:
        auth: user and password that a visitor must give.
        share: a public address through Gradio's servers.
        names: host names, beside this machine's own, under which it is shown without `auth`.
    """
    return dict(
        auth=auth,
        share=share,
        quiet=True,
        show_error=False,
        max_threads=80,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api", "settings"],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard, local=auth is None, names=frozenset(map(str.lower, names)))]},
        theme=theme(),
        css=css(),
        head=head(),
    )


def close(app_state: AppState) -> None:
    """End what is computed, and remove what was on its way to browsers."""
    try:
        app_state.close()
    finally:
        give_up(app_state.scratch)
