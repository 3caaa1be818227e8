"""The app: five tabs around one state, and the server that shows them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection
from html import escape
from typing import Any, NamedTuple

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_dpo.demo import api, tab_adapters, tab_chat, tab_data, tab_train, tab_vote
from lora_dpo.demo.html import win_table
from lora_dpo.demo.server import serving_on
from lora_dpo.demo.session import AppState
from lora_dpo.demo.theme import TITLE, css, head, theme
from lora_dpo.leftovers import give_up
from lora_dpo.serving.address import is_cross_site, is_local_name, listen

MAX_UPLOAD = "1gb"
"""Largest file that a browser may send: an adapter's package. Files of pairs have a limit of their own."""
MOST_QUEUED = 256
LOOK_EVERY = 2.0
"""Seconds between two looks for adapters and pairs that are new."""

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


def build(app_state: AppState, *, public: bool = False) -> gr.Blocks:
    """The page, ready to launch.

    Args:
        public: for visitors whom nobody knows: they chat and vote. Training, data and adapters are not there, their
            endpoints neither.
    """
    base = app_state.host.base
    held = "as stored" if base.quantize == "none" else base.quantize.upper()
    page = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400))
    with page:
        gr.HTML(
            f'<div id="head"><h1>{TITLE}</h1><span>chat, vote, train and swap on one loaded base: '
            f"{escape(base.name)} ({escape(held)}, {escape(base.dtype)})</span></div>"
        )
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Chat", id="chat"):
                pickers = tab_chat.build(app_state)
            with gr.Tab("Vote", id="vote") as vote:
                players, wins = tab_vote.build(app_state, vote, public=public)
            if not public:
                rest = _private_tabs(app_state, page)
        if not public:
            known = gr.State(None)
            outputs = [*(picker for picker, _ in pickers), players, wins, *rest, known]
            follow = _follower(app_state, [nobody for _, nobody in pickers])
            quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            run_name = rest[2]
            gr.Timer(LOOK_EVERY).tick(follow, [known, run_name], outputs, **quiet)
            page.load(follow, [known, run_name], outputs, **quiet)
        api.add(app_state, public=public)
    return page


def _private_tabs(app_state: AppState, page: gr.Blocks) -> list[Any]:
    """The tabs that public visitors do not see; returns what is to be refreshed, in `_follower`'s order."""
    with gr.Tab("Data", id="data") as data:
        files = tab_data.build(app_state, data)
    with gr.Tab("Train", id="train"):
        sources, run_name, row, left = tab_train.build(app_state)
    with gr.Tab("Adapters", id="adapters"):
        adapter, listed = tab_adapters.build(app_state, page)
    return [files, sources, run_name, row, left, adapter, listed]


class Shown(NamedTuple):
    """What the pickers and tables of a page were last made from."""

    names: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    votes: Any = None


def _follower(app_state: AppState, with_nobody: list[bool]) -> Callable[[Any, str], tuple[Any, ...]]:
    """A handler that puts what is new into every picker."""

    def follow(known: Any, run_name: str) -> tuple[Any, ...]:
        names, pairs, adapters, left = (
            app_state.names(),
            app_state.pairs.names(),
            app_state.adapters(),
            app_state.interrupted(),
        )
        now = Shown(tuple(names), tuple(pairs), tuple(adapters), tuple(left), app_state.pairs.book.state())
        before = Shown(*known) if known else Shown()
        if now == before:
            return (*[gr.skip()] * (len(with_nobody) + 9), known)
        chats = [gr.update(choices=[tab_chat.NOBODY, *names] if nobody else names) for nobody in with_nobody]
        moved = set(adapters) != set(before.adapters)
        # Where there was nothing to choose, the first of what there is now is chosen.
        pair: dict[str, Any] = {"value": pairs[0]} if pairs and not before.pairs else {}
        trained: dict[str, Any] = {"value": pairs[:1]} if pairs and not before.pairs else {}
        shown: dict[str, Any] = {"value": adapters[0]} if adapters and not before.adapters else {}
        return (
            *chats,
            gr.update(choices=names),
            win_table(app_state.pairs.book.records()) if now.votes != before.votes else gr.skip(),
            gr.update(choices=pairs, **pair),
            gr.update(choices=pairs, **trained),
            gr.update(value=app_state.free_name()) if moved and run_name.strip() in (*adapters, "") else gr.skip(),
            *(tab_train.interrupted_update(left) if now.left != before.left else (gr.skip(), gr.skip())),
            gr.update(choices=adapters, **shown),
            tab_adapters.adapters_table(app_state) if moved else gr.skip(),
            now,
        )

    return follow


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
    """Remove what was on its way to browsers."""
    give_up(app_state.scratch)
