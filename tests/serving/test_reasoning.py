"""A thinking model's answer in OpenAI's form: the thought beside the content, and back again in the next request."""

import contextlib
import json
from dataclasses import replace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import ALWAYS_THINKS, CHANNELS, THINKING, with_template
from test_http import ask, running

from lora_dpo.data.chat_template import encode
from lora_dpo.errors import PromptTooLong, RequestRefused
from lora_dpo.model.base import load_base
from lora_dpo.serving.host import Host
from lora_dpo.serving.openai_schema import Deltas, read_request
from lora_dpo.serving.request import refuse_long

NEXT = "<|end|><|start|>assistant"
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
KINDS = {
    "in the text": (THINKING, (), {}, "<think>\nHm,\nhm.\n</think>\n\nTwo."),
    "opened by the prompt": (ALWAYS_THINKS, (), {}, "Hm,\nhm.\n</think>\n\nTwo."),
    "special tokens": (THINKING, ("[THINK]", "[/THINK]"), {}, "[THINK]Hm,\nhm.[/THINK]Two."),
    "channels": (
        CHANNELS, HARMONY, {"eos": "<|return|>"},
        f"<|channel|>analysis<|message|>Hm,\nhm.{NEXT}<|channel|>final<|message|>Two.",
    ),
}  # fmt: skip


@pytest.fixture
def served(tokenizer, tiny_model_folder, monkeypatch, tmp_path):
    """Serve a model that writes a text, and note what it is asked."""
    asked = []

    @contextlib.contextmanager
    def serve(text, template=THINKING, tokens=(), **ends):
        special = with_template(tokenizer, template, tokens=tokens, **ends)

        def decode(model, prompts, stops, sampling):
            asked.extend(special.decode(prompt) for prompt in prompts)
            yield from ((0, token) for token in [*encode(special, text), special.eos_token_id])

        monkeypatch.setattr("lora_dpo.model.decoding.decode", decode)
        base = replace(load_base(str(tiny_model_folder), quantize="none"), tokenizer=special)
        with Host(base, tmp_path / "none") as host, running(host) as port:

            def post(**more):
                body = {"model": "base", "messages": ask("How many?"), **more}
                url = f"http://127.0.0.1:{port}/v1/chat/completions"
                return httpx.post(url, json=body, timeout=60)

            yield post, asked

    return serve


def message_of(reply):
    return reply.json()["choices"][0]["message"]


def chunks_of(reply):
    lines = reply.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def streamed(reply):
    """What the deltas of a stream add up to, and their order."""
    found, order = {}, []
    for chunk in chunks_of(reply):
        delta = chunk["choices"][0]["delta"]
        for name, text in delta.items():
            found[name] = found.get(name, "") + text
            order += [name] if text and name not in ("role", *order[-1:]) else []
    return found, order


@pytest.mark.parametrize("kind", KINDS)
def test_a_thought_is_beside_the_content_whole_and_streamed(served, kind):
    template, tokens, ends, text = KINDS[kind]
    with served(text, template, tokens, **ends) as (post, _):
        message = message_of(post())
        assert message == {"role": "assistant", "content": "Two.", "reasoning_content": "Hm,\nhm.", "refusal": None}
        found, order = streamed(post(stream=True))
        assert found == {"role": "assistant", "content": "Two.", "reasoning_content": "Hm,\nhm."}
        assert order == ["reasoning_content", "content"]
        assert message_of(post(reasoning_format="deepseek")) == message
        assert message_of(post(reasoning_format="auto")) == message
        assert message_of(post(reasoning_format="none")) == {"role": "assistant", "content": text, "refusal": None}
        assert streamed(post(reasoning_format="none", stream=True))[0] == {"role": "assistant", "content": text}


@pytest.mark.parametrize("kind", KINDS)
def test_a_thoughts_tokens_are_counted_as_openai_counts_them(served, kind, tokenizer):
    template, tokens, ends, text = KINDS[kind]
    special = with_template(tokenizer, template, tokens=tokens, **ends)
    said = text.rpartition("]" if kind == "special tokens" else ">")[2]
    whole, beside = len(encode(special, text)), len(encode(special, said))
    with served(text, template, tokens, **ends) as (post, _):
        usage = post().json()["usage"]
        assert usage["completion_tokens"] == whole
        assert usage["completion_tokens_details"] == {"reasoning_tokens": whole - beside}
        assert post(reasoning_format="none").json()["usage"] == usage
        assert chunks_of(post(stream=True, stream_options={"include_usage": True}))[-1]["usage"] == usage
    with served("Two.") as (post, _):
        assert post().json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_preamble_is_said_and_is_no_reasoning(served):
    told = f"<|channel|>commentary<|message|>I look it up.{NEXT}<|channel|>final<|message|>Two."
    with served(f"<|channel|>analysis<|message|>Hm.{NEXT}{told}", CHANNELS, HARMONY, eos="<|return|>") as (post, _):
        wanted = {"role": "assistant", "content": "I look it up.\n\nTwo.", "reasoning_content": "Hm."}
        assert message_of(post()) == {**wanted, "refusal": None}
        assert streamed(post(stream=True))[0] == wanted


def test_an_answer_without_a_thought_is_as_it_was(served):
    with served(" Write <think> first.") as (post, _):
        assert message_of(post()) == {"role": "assistant", "content": " Write <think> first.", "refusal": None}
        assert streamed(post(stream=True))[0]["content"] == " Write <think> first."


def test_a_thought_that_was_cut_says_nothing(served):
    with served("<think>\nHm") as (post, _):
        reply = post()
        assert message_of(reply) == {
            "role": "assistant", "content": "", "reasoning_content": "Hm", "refusal": None,
        }  # fmt: skip
        refused = post(reasoning_format="hidden")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "reasoning_format"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_an_earlier_thought_is_the_chat_templates_to_write(served, name):
    turns = [{"role": "assistant", "content": "Two.", name: "Hm."}]
    with served("Yes.", CHANNELS, HARMONY, eos="<|return|>") as (post, asked):
        assert post(messages=[*ask("How many?"), *turns]).status_code == 200
        assert "<|channel|>analysis<|message|>Hm.<|end|>" in asked[-1]
        assert post(messages=[*ask("How many?"), {**turns[0], name: {"odd": 1}}]).status_code == 200
        assert "analysis" not in asked[-1]
        user = {**ask("How many?")[0], name: "Hm."}
        assert post(messages=[user]).status_code == 200
        assert "Hm." not in asked[-1]
    with served("Yes.", ALWAYS_THINKS) as (post, asked):  # does not read it
        assert post(messages=[*ask("How many?"), *turns, *ask("Sure?")]).status_code == 200
        assert "Hm." not in asked[-1]


def test_raw_channels_in_a_history_are_taken_apart():
    raw = f"<|channel|>analysis<|message|>Hm.{NEXT}<|channel|>final<|message|>Two."
    body = {"model": "base", "messages": [*ask("How many?"), {"role": "assistant", "content": raw}]}
    read = read_request(json.dumps(body).encode(), max_new_tokens=9)
    assert read.messages[1] == {"role": "assistant", "content": "Two.", "reasoning_content": "Hm."}


def test_a_long_thought_counts_as_a_part_of_the_prompt():
    turns = [{"role": "assistant", "content": "Two.", "reasoning_content": "x" * 10_000}]
    with pytest.raises(PromptTooLong, match="10,004 characters"):
        refuse_long(turns, most=100)


def test_tools_are_refused_as_before():
    body = {"model": "base", "messages": ask("How many?"), "tools": [{"type": "function"}]}
    with pytest.raises(RequestRefused, match="tools is not supported"):
        read_request(json.dumps(body).encode(), max_new_tokens=9)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<", "th"]), max_size=12), st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_whole(pieces, opened):
    def added(parts):
        deltas, found = Deltas(opened=opened, apart=True), {}
        for delta in [delta for part in parts for delta in deltas.feed(part)] + [*deltas.end()]:
            for name, text in delta.items():
                found[name] = found.get(name, "") + text
        return found

    whole = added(["".join(pieces)])
    assert added(pieces) == whole
    assert whole.get("reasoning_content", "x").strip() == whole.get("reasoning_content", "x")


def test_only_an_answer_has_a_thought():
    body = {"model": "base", "messages": [{"role": "user", "content": "Two?", "reasoning_content": "Hm."}]}
    assert read_request(json.dumps(body).encode(), max_new_tokens=9).messages == [{"role": "user", "content": "Two?"}]


def test_an_effort_is_the_chat_templates_to_read():
    body = {"model": "base", "messages": [{"role": "user", "content": "Two?"}], "reasoning_effort": "low"}
    with pytest.raises(RequestRefused, match="takes it in chat_template_kwargs"):
        read_request(json.dumps(body).encode(), max_new_tokens=9)
