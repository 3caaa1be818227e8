"""The API as OpenAI's own client sees it, over a real socket, and as those see it who mean no good."""

import asyncio
import contextlib
import functools
import http.client
import json
import shutil
import socket
import threading
import time

import httpx
import httpx2
import openai
import psutil
import pytest
import uvicorn
from templates import THINKING
from typer.testing import CliRunner

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.cli.commands import app, main
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError, RequestRefused
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling, generate
from lora_dpo.serving.address import is_local_name, is_loopback, listen
from lora_dpo.serving.host import Host
from lora_dpo.serving.http import build_app
from lora_dpo.serving.openai_schema import read_request


@pytest.fixture(scope="module")
def adapters(make_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_adapter(folder / "alpha", seed=1)
    make_adapter(folder / "beta", seed=2)
    return folder


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return load_base(str(tiny_model_folder), quantize="none")


@pytest.fixture(scope="module")
def alone(tiny_model_folder, adapters):
    """The model of a name, with nothing else in memory beside it."""

    @functools.cache
    def load(who):
        lonely = load_base(str(tiny_model_folder), quantize="none")
        return attach_adapter(lonely, adapters / who) if who != "base" else lonely.model

    return load


@contextlib.contextmanager
def running(host, **options):
    """The server in a thread of its own; yields its port."""
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        build_app(host, **options), log_level="warning", lifespan="off", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def host(base, adapters):
    with Host(base, adapters, max_waiting=8) as opened:
        yield opened


@pytest.fixture(scope="module")
def port(host):
    with running(host, max_new_tokens=400) as found:
        yield found


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=60) as found:
        yield found


def ask(text):
    return [{"role": "user", "content": text}]


# --- what a client sees ---------------------------------------------------------------------------


def test_models_are_the_base_and_the_adapters(client, adapters):
    assert [model.id for model in client.models.list()] == ["base", "alpha", "beta"]
    one = client.models.retrieve("alpha")
    assert (one.object, one.owned_by, one.created) == ("model", "lora-dpo", int((adapters / "alpha").stat().st_mtime))
    with pytest.raises(openai.NotFoundError, match="There is no model 'gamma' here"):
        client.models.retrieve("gamma")


def test_a_request_may_switch_a_thought_off(tiny_model_folder, tmp_path):
    folder = tmp_path / "thinking"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    thinking = load_base(str(folder), quantize="none")
    with (
        Host(thinking, tmp_path / "none") as host,
        running(host) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client,
    ):
        counts = []
        for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            extra = {"chat_template_kwargs": kwargs}
            reply = client.chat.completions.create(model="base", messages=ask("Hi"), max_tokens=2, extra_body=extra)
            wanted = thinking.tokenizer.apply_chat_template(
                ask("Hi"), add_generation_prompt=True, return_dict=False, **kwargs
            )
            counts.append(reply.usage.prompt_tokens - len(wanted))
        assert counts == [0, 0, 0]
        extra = {"chat_template_kwargs": {"enable_thinkng": False}}
        with pytest.raises(openai.BadRequestError, match="Did you mean enable_thinking"):
            client.chat.completions.create(model="base", messages=ask("Hi"), max_tokens=2, extra_body=extra)


def test_a_thought_switched_off_in_a_model_that_has_none_changes_nothing(client):
    extra = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
    replies = [
        client.chat.completions.create(model="base", messages=ask("Hi"), max_tokens=4, temperature=0, extra_body=body)
        for body in (extra, {})
    ]
    assert replies[0].choices[0].message.content == replies[1].choices[0].message.content


@pytest.mark.parametrize("who", ["base", "alpha", "beta"])
def test_an_answer_is_the_models_own(client, who, base, alone):
    got = client.chat.completions.create(model=who, messages=ask("Say it."), temperature=0, max_tokens=20)
    model = alone(who)
    own = generate(model, base.tokenizer, [ask("Say it.")], sampling=Sampling(max_new_tokens=20))[0]
    choice = got.choices[0]
    assert (choice.message.content.strip(), choice.message.role) == (own.text, "assistant")
    assert choice.finish_reason == ("stop" if own.finished else "length")
    assert got.usage.completion_tokens == own.tokens
    assert got.usage.total_tokens == got.usage.prompt_tokens + own.tokens
    assert (got.model, got.object) == (who, "chat.completion")
    assert got.system_fingerprint == f"fp_{base.fingerprint[:12]}"


def test_a_stream_gives_the_same_in_pieces(client):
    wanted = dict(model="alpha", messages=ask("Tell me."), temperature=0.9, top_p=0.9, seed=7, max_tokens=40)
    whole = client.chat.completions.create(**wanted)
    chunks = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 10
    plain = list(client.chat.completions.create(**wanted, stream=True))
    assert plain[-1].choices[0].finish_reason
    assert all(chunk.usage is None for chunk in plain)


def test_seed_and_temperature_decide_the_draws(client):
    def text(**options):
        got = client.chat.completions.create(model="base", messages=ask("hm"), max_completion_tokens=20, **options)
        return got.choices[0].message.content

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=-5) == text(seed=-5)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2)
    assert text() != text()  # without a seed each request has its own
    assert text(seed=3, top_p=1e-9) == text(temperature=0)


def test_stop_ends_the_answer_before_the_text(client):
    wanted = dict(model="base", messages=ask("hm"), temperature=0.9, seed=3, max_tokens=60)
    whole = client.chat.completions.create(**wanted).choices[0].message.content
    at = next(at for at in range(5, len(whole)) if "\ufffd" not in whole[at : at + 3])
    word = whole[at : at + 3]
    got = client.chat.completions.create(**wanted, stop=["never there", word])
    assert got.choices[0].message.content == whole[: whole.index(word)]
    assert got.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**wanted, stop=word, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(word)]


def test_a_conversation_goes_on_with_the_answer_as_it_came(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    first = client.chat.completions.create(model="alpha", messages=messages, max_tokens=8)
    messages += [first.choices[0].message, {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(model="alpha", messages=messages, max_tokens=8)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_new_adapter_can_be_asked_for_at_once(client, adapters):
    shutil.copytree(adapters / "beta", adapters / "gamma")
    try:
        assert "gamma" in [model.id for model in client.models.list()]
        got = [
            client.chat.completions.create(model=who, messages=ask("hi"), temperature=0, max_tokens=9)
            .choices[0]
            .message
            for who in ("beta", "gamma")
        ]
        assert got[0].content == got[1].content
    finally:
        shutil.rmtree(adapters / "gamma")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gamma", messages=ask("hi"))


# --- what is refused ------------------------------------------------------------------------------

CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    ("options", "status", "param", "said"),
    [
        (dict(model="alfa"), 404, "model", "There is no model alfa here. Did you mean alpha?"),
        (dict(max_tokens=401), 400, "max_tokens", "401 tokens is asked for; at most 400"),
        (dict(max_completion_tokens=401), 400, "max_completion_tokens", "at most 400"),
        (dict(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
        (dict(temperature=3), 400, "temperature", "less than or equal to 2"),
        (dict(top_p=0), 400, "top_p", "greater than 0"),
        (dict(n=2), 400, "n", "n is not supported here"),
        (dict(logprobs=True), 400, "logprobs", "not supported"),
        (dict(frequency_penalty=0.5), 400, "frequency_penalty", "not supported"),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools", "not supported"),
        (dict(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
        (dict(extra_body={"temprature": 1}), 400, "temprature", "Did you mean temperature?"),
        (dict(extra_body={"top_k": 5}), 400, "top_k", "top_k is not supported here: leave it out."),
        (dict(extra_body={"min_p": 0.05}), 400, "min_p", "min_p is not supported here"),
        (dict(extra_body={"repetition_penalty": 1.1}), 400, "repetition_penalty", "not supported here"),
        (dict(extra_body={"chat_template_kwargs": {"enable_thinking": True}}), 400, "chat_template_kwargs", "not"),
        (dict(extra_body={"chat_template_kwargs": {"tokenize": True}}), 400, "chat_template_kwargs", "not for"),
        (dict(extra_body={"chat_template_kwargs": {"a": "x" * 5000}}), 400, "chat_template_kwargs", "5,009"),
        (dict(extra_body={"chat_template_kwargs": [1]}), 400, "chat_template_kwargs", "dictionary"),
        (dict(extra_body={"odd": 5}), 400, "odd", "There is no parameter odd."),
        (dict(stop=["a"] * 5), 400, "stop", "at most 4"),
        (dict(stop=""), 400, "stop", "stop text is empty"),
        (dict(messages=[]), 400, "messages", "at least 1"),
        (dict(messages=[{"role": "robot", "content": "hi"}]), 400, "messages", "messages.0.role"),
        (dict(messages=[{"role": "tool", "content": "hi", "tool_call_id": "1"}]), 400, "messages", "messages.0"),
        (dict(messages=[{"role": "user"}]), 400, "messages", "messages.0.content is missing"),
        (dict(messages=[{"role": "user", "content": None}]), 400, "messages", "messages.0.content is missing"),
        (dict(messages=[*ask("4?"), CALLS]), 400, "messages", "messages.1.tool_calls is not supported here: only text"),
        (
            dict(messages=[*ask("4?"), {"role": "tool", "tool_call_id": "1", "content": "4"}]),
            400, "messages", "messages.1 answers a tool call",
        ),
        (
            dict(messages=[{"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}]),
            400, "messages", "messages.0.annotations is not supported here",
        ),
        (
            dict(messages=[{"role": "assistant", "content": None, "refusal": "No."}]),
            400, "messages", "messages.0.refusal is not supported here",
        ),
        (dict(messages=[{"role": "user", "content": "x", "odd": 1}]), 400, "messages", "messages.0.odd"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            400, "messages", "only text is understood",
        ),
        (dict(messages=ask("long " * 200)), 400, "messages", "tokens; at most 384"),
        (dict(extra_body={"stream_options": {"include_usage": True}}), 400, "stream_options", "needs stream"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_openais_form(client, options, status, param, said):
    wanted = {"model": "alpha", "messages": ask("hi"), **options}
    for stream in (False, True):
        if stream and param == "stream_options":
            continue
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**wanted, stream=stream)
        assert error.value.status_code == status
        assert error.value.param == param
        assert error.value.type == "invalid_request_error"
        assert said in error.value.body["message"]


def test_values_that_ask_for_nothing_are_taken(client):
    nothing = dict(
        n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, tools=[], store=False,
        response_format={"type": "text"}, user="me", metadata={"a": "b"}, service_tier="auto", stop=None, seed=None,
    )  # fmt: skip
    assert client.chat.completions.create(model="base", messages=ask("hi"), max_tokens=3, **nothing).choices


def test_keys_that_clients_add_ask_for_nothing(client):
    plain = [*ask("hi"), {"role": "assistant", "content": "Yo"}, *ask("and?")]
    more = [
        {"id": 12, "metadata": {"a": 1}, "created_at": "now"},
        {"id": "x", "annotations": [], "refusal": None, "tool_calls": [], "audio": None, "function_call": None,
         "reasoning_content": "Hm.", "reasoning": None},
        {"id": None, "name": None, "timestamp": 3.5},
    ]  # fmt: skip
    nothing = {
        "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "repeat_penalty": 1, "typical_p": 1.0, "best_of": 1,
        "echo": False, "ignore_eos": False, "skip_special_tokens": True, "chat_template_kwargs": {}, "odd": None,
        "n": 1, "logprobs": False, "audio": None, "prediction": None, "reasoning_effort": None, "min_tokens": 0,
    }  # fmt: skip
    answers = [
        client.chat.completions.create(model="alpha", messages=messages, temperature=0, max_tokens=6, extra_body=extra)
        for messages, extra in (
            (plain, {}),
            ([{**one, **added} for one, added in zip(plain, more, strict=True)], nothing),
            (plain, {"top_k": 0}),
        )
    ]
    assert len({(one.choices[0].message.content, one.usage.prompt_tokens) for one in answers}) == 1


def raw(port, method="POST", path="/v1/chat/completions", body=b"", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content.startswith(b"{") else content


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "model is missing"),
        (b'{"model": 5, "messages": []}', "model: "),
        (b'{"model": "base", "messages": "hi"}', "messages: "),
        (b'{"model": "base", "temperature": NaN, "messages": [{"role": "user", "content": "hi"}]}', "temperature: "),
        (b'{"model": "base", "max_tokens": "9", "messages": [{"role": "user", "content": "hi"}]}', "max_tokens: "),
        (b'{"model": "base", "seed": 1e400, "messages": [{"role": "user", "content": "hi"}]}', "seed: "),
        (b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', "half of a character"),
    ],
)
def test_a_broken_body_is_refused(port, body, said):
    status, answer = raw(port, body=body)
    assert status == 400
    assert said in answer["error"]["message"]


def test_other_paths_methods_kinds_and_sizes_are_refused_in_openais_form(port):
    assert raw(port, path="/v1/embeddings")[0] == 404
    assert "under /v1" in raw(port, "GET", "/")[1]["error"]["message"]
    assert raw(port, "GET")[0] == 405
    status, answer = raw(port, body=b"{}", content_type="text/plain")  # what a web page can send unasked
    assert status == 415
    assert "application/json" in answer["error"]["message"]
    assert raw(port, body=b" " * ((4 << 20) + 1))[0] == 413
    assert raw(port, "GET", "/v1/models/..%2F..%2Fetc%2Fpasswd")[0] == 404


def test_a_page_that_points_its_own_name_here_gets_nothing(port):
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "2130706433"):
        status, answer = raw(port, "GET", "/v1/models", host=name)
        assert status == 403, name
        assert answer["error"]["code"] == "unknown_host"
    for name in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}", "127.9.9.9"):
        assert raw(port, "GET", "/v1/models", host=name)[0] == 200, name
    assert not is_local_name("[evil]")


def test_with_a_key_only_its_bearers_come_in(host):
    with running(host, api_key="secret-1") as port:
        url = f"http://127.0.0.1:{port}/v1"
        assert openai.OpenAI(base_url=url, api_key="secret-1").models.list().data
        for key in ("secret-2", "secret-11", "secret-", "Bearer"):
            with pytest.raises(openai.AuthenticationError) as error:
                openai.OpenAI(base_url=url, api_key=key).models.list()
            assert error.value.code == "invalid_api_key"
            assert "secret" not in error.value.message
        assert raw(port, "GET", "/v1/models")[0] == 401
        assert raw(port, "GET", "/v1/models", authorization="Basic secret-1")[0] == 401
        assert raw(port, "GET", "/v1/models", authorization="Bearer sécret")[0] == 401
        assert raw(port, "GET", "/nowhere")[0] == 401  # a stranger does not learn what there is
        assert raw(port, "GET", "/v1/models", authorization="bearer secret-1", host="box.example")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),  # another port of this machine
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Origin": "http://127.0.0.1:1"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_have_nothing_to_ask(port, headers, status):
    body = json.dumps({"model": "base", "messages": ask("hi"), "max_tokens": 1}).encode()
    assert raw(port, body=body, **headers)[0] == status
    assert raw(port, "GET", "/v1/models", **headers)[0] == 200  # a browser shows nobody else the answer


def test_messages_without_end_are_refused_before_they_are_tokenised(port, host, monkeypatch):
    from lora_dpo.serving import host as module

    monkeypatch.setattr(module, "prompt_ids", lambda *nothing: pytest.fail("it was tokenised"))
    many = {"model": "base", "messages": [{"role": "user", "content": ""}] * 60_000}
    status, answer = raw(port, body=json.dumps(many).encode())
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "60,000 messages" in answer["error"]["message"]
    many["messages"] = [{"role": "nobody"}] * 60_000
    assert "messages.0" in raw(port, body=json.dumps(many).encode())[1]["error"]["message"]
    many = {"model": "base", "messages": ask("hi"), "stop": "x" * 100_000}
    assert raw(port, body=json.dumps(many).encode())[0] == 400
    many = {"model": "base", "messages": ask("hi"), "tools": [{"type": "function"}] * 60_000}
    assert "tools is not supported" in raw(port, body=json.dumps(many).encode())[1]["error"]["message"]


def test_an_answer_that_breaks_is_a_server_error(client, host, monkeypatch):
    def broken(*asked, **settings):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(host, "stream_from", broken)
    with pytest.raises(openai.InternalServerError, match="failed unexpectedly"):
        client.chat.completions.create(model="base", messages=ask("hi"))
    with pytest.raises(openai.APIError, match="failed unexpectedly"):
        list(client.chat.completions.create(model="base", messages=ask("hi"), stream=True))


# --- many at once ---------------------------------------------------------------------------------


class Gate:
    """Holds the thread that computes until it is opened."""

    def __init__(self, host, monkeypatch):
        self.reached, self.open, stream = threading.Event(), threading.Event(), host.stream_from

        def wait(*asked, **settings):
            self.reached.set()
            assert self.open.wait(30)
            return stream(*asked, **settings)

        monkeypatch.setattr(host, "stream_from", wait)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(port, host, monkeypatch, stream):
    gate = Gate(host, monkeypatch)
    body = json.dumps({"model": "base", "messages": ask("hi"), "stream": stream, "max_tokens": 300, "temperature": 2})
    sockets = []
    for number in range(9):  # one computes, eight wait: full
        connection = socket.create_connection(("127.0.0.1", port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        sockets.append(connection)
        if number == 0:
            assert gate.reached.wait(20)
        else:
            until(lambda number=number: host.waiting() == number)
    status, answer = raw(port, body=body.encode())
    assert status == 429
    assert answer["error"]["type"] == "rate_limit_error"
    assert "Try again in a moment" in answer["error"]["message"]
    assert raw(port, "GET", "/v1/models")[0] == 200  # the loop is free
    for connection in sockets[1:]:
        connection.close()
    until(lambda: host.waiting() == 0)
    sockets[0].close()
    began = time.monotonic()
    gate.open.set()
    assert host.answer("base", ask("hi"), Sampling(max_new_tokens=1), client="next").prompt_tokens
    assert time.monotonic() - began < 10


def test_silence_is_filled_so_that_proxies_keep_the_stream(port, host, monkeypatch):
    monkeypatch.setattr("lora_dpo.serving.http.HEARTBEAT", 0.05)
    gate = Gate(host, monkeypatch)
    threading.Timer(0.4, gate.open.set).start()
    body = json.dumps({"model": "base", "messages": ask("hi"), "stream": True, "max_tokens": 5}).encode()
    _, content = raw(port, body=body)
    assert content.count(b": waiting\n\n") >= 3
    assert content.endswith(b"data: [DONE]\n\n")


def load(port, seconds, *, clients=20):
    """Simultaneous clients, each with questions of its own; returns their answers and the refusals."""

    async def one(number, client, end):
        answers, refused, failed = [], 0, []
        # on a machine that is busy elsewhere the last of them waits longer for its first answer
        while time.monotonic() < end or not (answers or failed or time.monotonic() > end + 60):
            who = ("base", "alpha", "beta")[number % 3]
            text = f"client {number} question {len(answers) % 4}"
            wanted = dict(model=who, messages=ask(text), temperature=0, max_tokens=8)
            try:
                if number % 2:
                    pieces = await client.chat.completions.create(**wanted, stream=True)
                    got = "".join([chunk.choices[0].delta.content or "" async for chunk in pieces])
                else:
                    got = (await client.chat.completions.create(**wanted)).choices[0].message.content
                answers.append((who, text, got))
            except openai.RateLimitError:
                refused += 1
                await asyncio.sleep(0.05)
            except openai.OpenAIError as error:
                failed.append(error)
        return answers, refused, failed

    async def all_of_them():
        end = time.monotonic() + seconds
        options = dict(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=120)
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(openai.AsyncOpenAI(**options)) for _ in range(clients)]
            return await asyncio.gather(*(one(number, client, end) for number, client in enumerate(opened)))

    return asyncio.run(all_of_them())


def crowd(port, questions, *, polite, greedy):
    """Clients with so many questions, one at a time, and one with many at once until those are answered; by who asked:
    answers, refusals, failures."""
    found = {}

    async def one(client, user, done):
        answered, refused, failed = found.setdefault(user, [[], [], []])
        while not done(answered):
            stream = bool(len(answered) % 2)
            try:
                got = await client.chat.completions.create(
                    model="base", messages=ask(user), max_tokens=4, user=user, stream=stream
                )
                answered.append([piece async for piece in got] if stream else got)
            except openai.RateLimitError as error:
                refused.append(error)
                await asyncio.sleep(0.05)
            except openai.OpenAIError as error:
                failed.append(error)

    async def all_of_them():
        options = dict(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=120)
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)  # the server ends idle ones after 5 s
        async with openai.AsyncOpenAI(**options, http_client=httpx.AsyncClient(limits=limits, timeout=120)) as client:
            users = [one(client, f"polite {n}", lambda answered: len(answered) >= questions) for n in range(polite)]
            over = asyncio.Event()
            many = asyncio.gather(*(one(client, "greedy", lambda _: over.is_set()) for _ in range(greedy)))
            await asyncio.wait_for(asyncio.gather(*users), 300)
            over.set()
            await many

    asyncio.run(all_of_them())
    return found


@pytest.mark.parametrize(
    ("polite", "greedy", "questions"), [(3, 20, 3), pytest.param(50, 40, 4, marks=pytest.mark.slow)]
)
def test_one_who_asks_for_much_has_no_more_than_the_others(base, adapters, polite, greedy, questions):
    with Host(base, adapters, max_waiting=32 if polite > 8 else 8) as host, running(host) as port:
        found = crowd(port, questions, polite=polite, greedy=greedy)
    assert [failed for *_, failed in found.values() if failed] == []
    answers, refusals, _ = found.pop("greedy")
    for user, (answered, refused, _) in found.items():
        assert answered, f"{user} was never answered"
        # as a share of what was asked
        assert len(refused) * (len(answers) + len(refusals)) <= len(refusals) * (len(answered) + len(refused)), user
    if polite < 8:  # places in the queue
        assert not any(refused for _, refused, _ in found.values())


def test_twenty_clients_at_once_each_get_their_own_answers(port, host, base, alone):
    load(port, 2)
    process = psutil.Process()
    before = process.memory_info().rss
    found = load(port, 8)
    grown = process.memory_info().rss - before
    answered = [answer for answers, _, _ in found for answer in answers]
    assert [failed for *_, failed in found if failed] == []
    assert all(answers for answers, *_ in found), "a client was never answered"
    assert sum(refused for _, refused, _ in found) > 0, "20 clients for 8 places: some are refused"
    asked = sorted({(who, text) for who, text, _ in answered})
    own = {
        (who, text): generate(alone(who), base.tokenizer, [ask(text)], sampling=Sampling(max_new_tokens=8))[0].text
        for who, text in asked
    }
    assert len(set(own.values())) > 10
    assert [answer for answer in answered if answer[2].strip() != own[answer[:2]]] == []
    assert grown < 30e6, f"memory grew by {grown / 1e6:.0f} MB"
    assert host.waiting() == 0


def test_clients_are_answered_while_a_training_goes_on(port, client, host, recipe_dict, adapters, monkeypatch):
    monkeypatch.setattr("lora_dpo.serving.training_job.SLICE", 0.05)
    job = host.start_training(check_recipe(recipe_dict(trainer={"max_steps": 8})), "fresh")
    answers = 0
    while job.running:
        client.chat.completions.create(model="alpha", messages=ask("hi"), max_tokens=4)
        answers += 1
    assert job.state == "done", job.error
    assert answers > 2
    assert client.chat.completions.create(model="fresh", messages=ask("hi"), max_tokens=4).choices
    shutil.rmtree(adapters / "fresh")


# --- the door and the command ---------------------------------------------------------------------


def test_what_counts_as_this_machine():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.5", "8.8.8.8"))
    for host in ("", " ", "no such host.invalid"):
        with pytest.raises(ConfigError):
            is_loopback(host)


def test_a_taken_port_and_a_foreign_address_say_what_to_do():
    with listen("127.0.0.1", 0) as sock, pytest.raises(ConfigError, match=r"is taken\. Choose another with --port"):
        listen("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(ConfigError, match="no such address"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "lets other machines in, and there is no --api-key"),
        (["--host", "::"], "no --api-key"),
        (["--api-key", ""], "API key is empty"),
        (["--api-key", " a"], "spaces around it"),
        (["--quantize", "int8"], "allowed are auto, nf4, none"),
        (["--host", "no such host.invalid"], "is not known here"),
        (["--model", "./nowhere"], "is no model folder"),
    ],
)
def test_the_command_refuses_in_one_line(options, said, capsys, monkeypatch):
    monkeypatch.delenv("LORA_DPO_API_KEY", raising=False)
    assert main(["serve", "--port", "0", *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_help_teaches():
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    assert "OpenAI-compatible" in text
    assert "lora-dpo serve --model" in text


@pytest.mark.posix
def test_the_command_serves_until_it_is_interrupted(tiny_model_folder, adapters, tmp_path):
    import os
    import re
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "lora_dpo", "serve", "--model", str(tiny_model_folder), "--quantize", "none",
               "--adapters-dir", str(adapters), "--port", "0"]  # fmt: skip
    environment = {**os.environ, "LORA_DPO_API_KEY": "from-the-environment", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Tests that run in the background of a shell hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        first = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", first)[0]
        assert process.stdout.readline().split() == ["models", "base,", "alpha,", "beta"]
        assert httpx2.get(f"{url}/models").status_code == 401
        client = openai.OpenAI(base_url=url, api_key="from-the-environment")
        stream = client.chat.completions.create(model="alpha", messages=ask("hi"), stream=True, temperature=2)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert output.strip() == "Stopped."
    assert "Traceback" not in errors


def test_a_request_is_read_without_a_server():
    asked = read_request(
        b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, '
        b'{"type": "text", "text": "b"}]}], "stop": "x", "seed": 3}',
        max_new_tokens=50,
    )
    assert asked.messages == [{"role": "user", "content": "ab"}]
    assert asked.sampling == Sampling(max_new_tokens=50, temperature=1.0, top_p=1.0, seed=3)
    assert (asked.stop, asked.stream, asked.include_usage) == (("x",), False, False)
    with pytest.raises(RequestRefused) as error:
        read_request(b"{}", max_new_tokens=5)
    assert error.value.status == 400
