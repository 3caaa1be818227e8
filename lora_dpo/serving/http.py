"""`lora-dpo serve`: a host behind OpenAI's chat API.

The event loop only passes on: a request goes to the host's queue, and the thread that computes hands each piece of
text back to the loop. No thread waits for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config

from lora_dpo.adapters.package import BASE
from lora_dpo.errors import AdapterError, Busy, LoraDPOError, ModelError, PromptTooLong, RequestRefused
from lora_dpo.serving.address import is_cross_site, is_local_name
from lora_dpo.serving.connections import Server, server_config
from lora_dpo.serving.host import Host
from lora_dpo.serving.openai_schema import (
    DONE,
    ChatRequest,
    Deltas,
    Envelope,
    check_keywords,
    error_body,
    event,
    finish_reason,
    model_entry,
    read_request,
)
from lora_dpo.serving.request import Completion, PendingRequest, StreamItem
from lora_dpo.text import shown

Awaited = TypeVar("Awaited", bound=StreamItem)

MAX_BODY = 4 << 20
"""Bytes of a request. A prompt of 4,096 tokens has some ten thousand."""

HEARTBEAT = 15.0
"""Seconds without a piece of text after which a stream says that it is alive: proxies cut silent ones."""


def build_app(host: Host, *, api_key: str | None = None, max_new_tokens: int = 1024) -> ASGIApp:
    """The API over a host.

    Args:
        api_key: what a request must carry as `Authorization: Bearer …`; None lets everyone in who says that they
            are talking to this machine (so that a web page cannot, by a name that it made point here).
        max_new_tokens: longest answer, and the length of those that name none.
    """
    api = _Api(host, max_new_tokens)
    app = Starlette(
        routes=[
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
        ],
        exception_handlers={
            LoraDPOError: _refused,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Exception: _broken,
        },
    )
    return _Door(app, api_key)


def run(app: ASGIApp, sock: socket.socket, host: Host) -> None:
    """Serve on a listening socket until Ctrl-C or SIGTERM; then answers end at their next token."""
    config = server_config(app, lifespan="off", timeout_graceful_shutdown=5)
    _Server(config, host).run(sockets=[sock])


class _Server(Server):
    """Ends the answers before it waits for the connections to end."""

    def __init__(self, config: Config, host: Host) -> None:
        super().__init__(config)
        self._host = host

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._host.stop_answering()
        await super().shutdown(sockets)


class _Api:
    """The endpoints."""

    def __init__(self, host: Host, max_new_tokens: int) -> None:
        self.host, self.max_new_tokens = host, max_new_tokens
        self.began = int(time.time())
        self.fingerprint = f"fp_{(host.base.fingerprint or 'unknown')[:12]}"

    async def models(self, request: Request) -> Response:
        names = await anyio.to_thread.run_sync(self.host.names)
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in await anyio.to_thread.run_sync(self.host.names):
            raise AdapterError(f"There is no model {shown(name)} here. GET /v1/models lists them.")
        return JSONResponse(self._entry(name))

    async def chat(self, request: Request) -> Response:
        content = await _body(request)
        asked = await anyio.to_thread.run_sync(lambda: read_request(content, max_new_tokens=self.max_new_tokens))
        outbox = _Outbox()
        try:
            await outbox.ask(self.host, asked, client=f"{request.client.host if request.client else ''}/{asked.user}")
        except ModelError as error:  # before its turn, that is the chat template's
            raise RequestRefused(str(error), param="messages") from error
        except BaseException:
            outbox.close()
            raise
        envelope, deltas = Envelope(asked.model, self.fingerprint), outbox.deltas(asked)
        if asked.stream:
            try:
                first = await _unless_gone(request, outbox.first())
                if isinstance(first, Busy):  # it gave way to another client's: not a stream that ends at once, but 429
                    raise first
            except BaseException:
                outbox.close()
                raise
            return _EventStream(outbox, _events(outbox, first, asked, envelope, deltas))
        try:
            reply = await _unless_gone(request, outbox.reply())
        finally:
            outbox.close()
        if reply is None:
            raise ClientDisconnect
        return JSONResponse(envelope.completion(reply, deltas))

    def _entry(self, name: str) -> dict[str, Any]:
        created = self.began
        if name != BASE:
            with contextlib.suppress(OSError):  # removed since it was listed
                created = int((self.host.adapters_dir / name).stat().st_mtime)
        return model_entry(name, created)


# --- one answer on its way ------------------------------------------------------------------------


class _Outbox:
    """Pieces of one answer, from the thread that computes to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[StreamItem] = asyncio.Queue()
        self._request: PendingRequest | None = None

    async def ask(self, host: Host, asked: ChatRequest, *, client: str) -> None:
        """Join the host's queue. In a thread: a long prompt takes a while to read."""

        def submit() -> None:
            check_keywords(host.base.tokenizer, asked.chat_template_kwargs)
            self._request = host.submit(
                asked.model,
                asked.messages,
                asked.sampling,
                stop=asked.stop,
                client=client,
                deliver=self._deliver,
                chat_template_kwargs=asked.chat_template_kwargs,
            )

        await anyio.to_thread.run_sync(submit)

    def deltas(self, asked: ChatRequest) -> Deltas:
        """What makes deltas of the pieces, once it is asked."""
        opened = self._request is not None and bool(self._request.asked.thought)
        return Deltas(opened=opened, apart=asked.thoughts_apart)

    def close(self) -> None:
        """Nobody wants more: free the turn."""
        if self._request is not None:
            self._request.cancel()

    async def next(self) -> StreamItem:
        """The next piece, or the end."""
        return await self._pieces.get()

    async def first(self) -> StreamItem:
        """The first piece; an empty one if it takes long: then the stream begins, and says that it is alive."""
        try:
            return await asyncio.wait_for(self.next(), HEARTBEAT)
        except TimeoutError:
            return ""

    async def reply(self) -> Completion:
        """The end. Raises what ended it instead."""
        while True:
            outcome = await self.next()
            if isinstance(outcome, Completion):
                return outcome
            if isinstance(outcome, LoraDPOError):
                raise _late(outcome)

    def _deliver(self, outcome: StreamItem) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, outcome)


async def _events(
    outbox: _Outbox, first: StreamItem | None, asked: ChatRequest, envelope: Envelope, deltas: Deltas
) -> AsyncIterator[str]:
    yield event(envelope.chunk({"role": "assistant", "content": ""}))
    outcome = first
    while True:
        if outcome is None:
            try:
                outcome = await asyncio.wait_for(outbox.next(), HEARTBEAT)
            except TimeoutError:
                yield ": waiting\n\n"  # a comment, which clients pass over
                continue
        if isinstance(outcome, str):
            for delta in deltas.feed(outcome):
                yield event(envelope.chunk(delta))
            outcome = None
            continue
        if isinstance(outcome, Completion):
            for delta in deltas.end():
                yield event(envelope.chunk(delta))
            yield event(envelope.chunk({}, finish_reason(outcome)))
            if asked.include_usage:
                yield event(envelope.usage_chunk(outcome))
            yield DONE
        else:
            yield event(_described(_late(outcome))[1])
        return


class _EventStream(StreamingResponse):
    """A stream that frees its turn however it ends, also if the client left before its first piece."""

    def __init__(self, outbox: _Outbox, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._outbox = outbox

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outbox.close()


async def _unless_gone(request: Request, reply: Coroutine[Any, Any, Awaited]) -> Awaited | None:
    """Wait for the answer; None if the client has left before it came."""
    coming, leaving = asyncio.ensure_future(reply), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The body of a request, if it is JSON and not too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may post anything else here without asking
        raise RequestRefused(f"The content type is {kind or 'not given'}: send application/json.", status=415)
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY:
            raise RequestRefused(f"The request has more than {MAX_BODY >> 20} MB.", status=413)
    return bytes(content)


# --- who may come in ------------------------------------------------------------------------------


class _Door:
    """Lets a request in that carries the key; without a key, one that is addressed to this machine by a local name.

    None that the page of another site sent: a browser adds what it knows of this one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        headers = request.headers
        if is_cross_site(request.method, headers):
            text = "A page of another site sent this request. Send it from a program, or from a page of this server."
            return JSONResponse(error_body(text, code="cross_site"), status_code=403)
        if self._key is None:
            if is_local_name(headers.get("host", "")):
                return None
            text = "Without --api-key this server answers to localhost, 127.0.0.1 and [::1] alone, not to other names."
            return JSONResponse(error_body(text, code="unknown_host"), status_code=403)
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key.encode()):
            return None
        text = "The API key is wrong or missing. Send the key that the server was started with, as a bearer token."
        body = error_body(text, code="invalid_api_key")
        return JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})


# --- errors ---------------------------------------------------------------------------------------


def _described(error: LoraDPOError) -> tuple[int, dict[str, Any]]:
    """HTTP's status and OpenAI's form of an error."""
    text = str(error)
    if isinstance(error, RequestRefused):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        return error.status, error_body(text, kind=kind, param=error.param, code=error.code)
    if isinstance(error, PromptTooLong):
        return 400, error_body(text, param="messages", code="context_length_exceeded")
    if isinstance(error, Busy):
        return 429, error_body(text, kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, AdapterError):
        return 404, error_body(text, param="model", code="model_not_found")
    return 500, error_body(text, kind="server_error")


def _late(error: LoraDPOError) -> LoraDPOError:
    """What went wrong after the request was taken is the server's fault, not the request's."""
    return error if isinstance(error, Busy) else RequestRefused(str(error), code="answer_failed", status=500)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraDPOError)  # noqa: S101 - it is registered for these
    status, body = _described(error)
    headers = {"Retry-After": "1"} if status == 429 else {}
    return JSONResponse(body, status_code=status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these
    hints = {404: "There is no such path; the API is under /v1.", 405: "This path takes another method."}
    text = hints.get(error.status_code, error.detail)
    return JSONResponse(error_body(text), status_code=error.status_code, headers=error.headers)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # to nobody


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("The server failed. Its log says why.", kind="server_error"), status_code=500)
