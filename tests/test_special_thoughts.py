"""Thoughts between tags that are special tokens, from the ids to every place that shows an answer."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from templates import BARS, CHANNELS, with_template

from lora_dpo.cli.chat_loop import say_once, speak
from lora_dpo.data.chat_template import assistant_turn, encode, prompt_ids, render
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.thoughts import (
    ThoughtSplitter,
    answer_decoder,
    opened_thought,
    said_length,
    split_thought,
    thought_tokens,
)
from lora_dpo.demo.conversation import Conversation, ask
from lora_dpo.demo.handlers import folded
from lora_dpo.demo.html import answer_html
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling, generate, note_of_thoughts, stream_from
from lora_dpo.serving.chat import Chat
from lora_dpo.serving.host import Host

QUESTION = [{"role": "user", "content": "How many?"}]
NEXT = "<|end|><|start|>assistant"
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
KINDS = {
    "special <think>": (None, ("<think>", "</think>"), "<think>Hm, hm.</think>", {}),
    "only the end": (None, ("</think>",), "<think>Hm, hm.</think>", {}),
    "Magistral": (None, ("[THINK]", "[/THINK]"), "[THINK]Hm, hm.[/THINK]", {}),
    "Command A": (
        None,
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"),
        "<|START_THINKING|>Hm, hm.<|END_THINKING|><|START_RESPONSE|>",
        {},
    ),
    "Gemma 4": (None, ("<|channel>", "<channel|>"), "<|channel>thought\nHm, hm.\n<channel|>", {}),
    "gpt-oss": (
        CHANNELS,
        HARMONY,
        f"<|channel|>analysis<|message|>Hm, hm.{NEXT}<|channel|>final<|message|>",
        {"eos": "<|return|>"},
    ),
}
TWICE = f"<|channel|>analysis<|message|>Hm,{NEXT}<|channel|>analysis<|message|>hm.{NEXT}<|channel|>final<|message|>Two."


@pytest.fixture(params=KINDS)
def kind(request, tokenizer):
    """A tokenizer that has a thought's tags as special tokens, and ids of a thought."""
    template, tokens, thought, ends = KINDS[request.param]
    special = with_template(tokenizer, template or tokenizer.chat_template, tokens=tokens, **ends)
    return special, encode(special, thought)


@pytest.fixture
def gpt(tokenizer):
    return with_template(tokenizer, CHANNELS, tokens=HARMONY, eos="<|return|>")


@pytest.fixture
def say(monkeypatch):
    """Have every model write these ids."""

    def arrange(ids):
        def decode(model, prompts, stops, sampling):
            yield from ((row, token) for row in range(len(prompts)) for token in ids)

        monkeypatch.setattr("lora_dpo.model.decoding.decode", decode)

    return arrange


@pytest.fixture
def base(kind, tiny_model_folder):
    return replace(load_base(str(tiny_model_folder), quantize="none"), tokenizer=kind[0])


def test_ids_are_text_with_the_tags_and_without_other_special_tokens(kind):
    special, thought = kind
    ids = [*thought, *b"Two.", special.eos_token_id]
    text = answer_decoder(special)(ids)
    assert split_thought(text) == ("Hm, hm.", "Two.")
    assert special.eos_token not in text
    assert thought_tokens(special, ids) == len(thought) - ("<|START_RESPONSE|>" in special.get_vocab())
    assert said_length(special, list(b"Hi"), ids) in (4, 5)
    assert answer_decoder(special)([*b"Two.", special.eos_token_id]) == "Two."


def test_any_first_part_of_the_ids_is_a_first_part_of_the_text(kind):
    special, thought = kind
    ids = [*thought, *b"Two."]
    decode = answer_decoder(special)
    assert all(decode(ids).startswith(decode(ids[:count])) for count in range(len(ids) + 1))


def test_an_answer_is_streamed_and_written_alike(kind, base, say):
    special, thought = kind
    say([*thought, *b"Two.", special.eos_token_id])
    [answer] = generate(base.model, special, [QUESTION])
    assert (answer.said, answer.finished) == ("Two.", True)
    assert note_of_thoughts([answer]).startswith("1 of 1 answers begin with a thought")
    pieces = "".join(stream_from(base.model, special, prompt_ids(special, QUESTION)))
    assert pieces == answer.text


def test_a_terminal_and_a_page_fold_it_away(kind, base, say, tmp_path):
    special, thought = kind
    say([*thought, *b"Two.", special.eos_token_id])
    chat = Chat(base, base.model)
    out = io.StringIO()
    assert say_once(chat, "How many?", out) == "thought 2 words first, not shown"
    assert out.getvalue() == "Two.\n"
    terminal = io.StringIO()
    speak(chat, "And now?", Console(file=terminal, force_terminal=True, color_system="standard", width=100))
    assert "\x1b[2mH\x1b[0m" in terminal.getvalue()
    assert terminal.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").split() == ["Hm,", "hm.", "Two."]
    with Host(base, tmp_path / "none") as host:
        [turn] = list(ask(host, Conversation(), "How many?", ["base"], Sampling()))[-1:]
    text = turn.answers[0].text
    assert folded(text) == "<details><summary>thought 2 words</summary>\n\nHm, hm.\n\n</details>\n\nTwo."
    assert answer_html(text).endswith("<summary>thought 2 words</summary>Hm, hm.</details>Two.")


def test_thoughts_of_channels_go_on_and_may_be_missing(gpt):
    decode = answer_decoder(gpt)
    assert split_thought(decode(encode(gpt, TWICE))) == ("Hm,\n\nhm.", "Two.")
    ids = encode(gpt, "<|channel|>final<|message|>Two.<|return|>")
    assert split_thought(decode(ids)) == ("", "Two.")
    assert said_length(gpt, list(b"Hi"), ids) == 4
    cut = encode(gpt, "<|channel|>analysis<|message|>Hm.")
    assert split_thought(decode(cut)) == ("Hm.", "")
    assert thought_tokens(gpt, cut) == len(cut)
    assert opened_thought(gpt, encode(gpt, "<|start|>assistant<|channel|>analysis<|message|>")) != ""
    assert opened_thought(gpt, encode(gpt, "<|start|>assistant<|channel|>final<|message|>")) == ""


ANALYSIS, COMMENTARY, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "commentary", "final"))
CALL = "<|channel|>commentary to=functions.look json<|message|>{}"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        (f"{ANALYSIS}Hm.{NEXT}{COMMENTARY}I look.{NEXT}{FINAL}Two.", "Hm.", "I look.\n\nTwo."),
        (f"{ANALYSIS}a{NEXT}{COMMENTARY}b{NEXT}{ANALYSIS}c{NEXT}{FINAL}d", "a\n\nc", "b\n\nd"),
        (f"{COMMENTARY}b{NEXT}{ANALYSIS}c{NEXT}{FINAL}d", "c", "b\n\nd"),
        (f"{COMMENTARY}b{NEXT}{COMMENTARY}c", "", "b\n\nc"),
        (f"{COMMENTARY}I look.", "", "I look."),
        (f"{COMMENTARY}", "", ""),
        # a call of a tool is nothing that is said to the user: it is not taken for a preamble
        (CALL, "", CALL),
        (f"{ANALYSIS}Hm.{NEXT}{CALL}", f"Hm.{NEXT}{CALL}", ""),
    ],
)
def test_commentary_is_told_to_the_user(text, thought, said, size):
    assert split_thought(text) == (thought, said)
    splitter = ThoughtSplitter()
    parts = [part for at in range(0, len(text), size) for part in splitter.feed(text[at : at + size])]
    parts += splitter.end()
    assert "".join(part for inside, part in parts if inside).strip() == thought
    assert "".join(part for inside, part in parts if not inside).strip() == said


def test_thoughts_between_what_is_said_are_counted(gpt):
    def count(*parts):
        return len(encode(gpt, "".join(parts)))

    first, told = f"{ANALYSIS}Hm.{NEXT}{COMMENTARY}", f"I look.{NEXT}{ANALYSIS}"
    second, answer = f"So.{NEXT}{FINAL}", "Two."
    ids = encode(gpt, first + told + second + answer)
    assert thought_tokens(gpt, ids) == count(first, second)
    assert said_length(gpt, list(b"Hi"), [*ids, gpt.eos_token_id]) == count(told, answer)
    assert thought_tokens(gpt, encode(gpt, first + told + "So")) == count(first, "So")
    assert thought_tokens(gpt, encode(gpt, COMMENTARY + answer)) == count(COMMENTARY)


def test_a_preamble_is_no_thought_in_a_history():
    text = f"{COMMENTARY}I look.{NEXT}{ANALYSIS}Hm.{NEXT}{FINAL}Two."
    wanted = {"role": "assistant", "content": "I look.\n\nTwo.", "reasoning_content": "Hm."}
    assert assistant_turn(text) == wanted


def test_channels_are_beside_each_other_in_the_next_prompt(gpt):
    turn = assistant_turn(TWICE)
    assert turn == {"role": "assistant", "content": "Two.", "reasoning_content": "Hm,\n\nhm."}
    assert assistant_turn("<|channel|>final<|message|>Two.") == {"role": "assistant", "content": "Two."}
    assert assistant_turn("[THINK]a[/THINK]b") == {"role": "assistant", "content": "[THINK]a[/THINK]b"}
    text = render(gpt, [*QUESTION, turn])
    assert text.endswith(
        f"assistant<|channel|>analysis<|message|>Hm,\n\nhm.{NEXT}<|channel|>final<|message|>Two.<|return|>"
    )


def test_an_end_that_no_thought_begins_with_is_no_tag(tokenizer):
    phi = with_template(tokenizer, BARS, tokens=("<|end|>", "<|assistant|>"), eos="<|endoftext|>")
    assert answer_decoder(phi)(encode(phi, "Two.<|end|>")) == "Two."


def test_the_doctor_takes_tags_for_no_template(tokenizer, tmp_path):
    special = with_template(tokenizer, tokenizer.chat_template, tokens=("[THINK]", "[/THINK]", "[SEP]"))
    path = tmp_path / "a.jsonl"
    for text, found in (("[THINK]Hm.[/THINK]Two.", False), ("[SEP]Two.", True)):
        path.write_text(json.dumps({"prompt": "How many?", "chosen": text, "rejected": "Three."}), encoding="utf-8")
        assert ("leftover" in examine([str(path)], tokenizer=special).findings) == found


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_is_said_is_not_changed_by_marks_in_it(size):
    said = "In gpt-oss, <|end|><|start|>assistant<|channel|>analysis<|message|> goes on."
    splitter, text = ThoughtSplitter(), f"<think>Hm.</think>{said}"
    parts = [part for at in range(0, len(text), size) for part in splitter.feed(text[at : at + size])]
    parts += splitter.end()
    assert "".join(part for inside, part in parts if not inside) == said
