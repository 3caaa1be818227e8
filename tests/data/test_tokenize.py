"""The fixture tokenizer's ids are bytes, so `b"Hi"` spreads into the ids of "Hi"; 256 starts a turn, 257 ends it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.data import Message, Origin, PreferencePair, TokenPair, tokenize_pairs
from lora_dpo.data.chat_template import encode, prompt_ids, render
from lora_dpo.data.tokenize import common_prefix_length, tokenize_pair
from lora_dpo.errors import ModelError

START, END, TEXT_END = 256, 257, 258
ORIGIN = Origin("pairs.jsonl", 1)
HI_PROMPT = [START, *b"user\nHi", END, *b"\n", START, *b"assistant\n"]

OPEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def turns(role: str, *texts: str) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=text) for text in texts)


def make_pair(prompt: Any = "Hi", chosen: Any = "Yes", rejected: Any = "No", row: int = 1) -> PreferencePair:
    prompt = turns("user", prompt) if isinstance(prompt, str) else tuple(prompt)
    chosen, rejected = (turns("assistant", x) if isinstance(x, str) else tuple(x) for x in (chosen, rejected))
    return PreferencePair(prompt, chosen, rejected, Origin("pairs.jsonl", row))


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


# --- what a pair becomes --------------------------------------------------------------------------


def test_a_pair_written_out(tokenizer):
    tokens = tokenize_pair(tokenizer, make_pair(), max_length=None)
    assert tokens == TokenPair(
        prompt=[256, 117, 115, 101, 114, 10, 72, 105, 257, 10, 256, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10],
        chosen=[89, 101, 115, 257],
        rejected=[78, 111, 257],
        origin=ORIGIN,
        truncated=False,
    )


def test_system_and_earlier_turns_are_prompt(tokenizer):
    prompt = [*turns("system", "S"), *turns("user", "a"), *turns("assistant", "b"), *turns("user", "c")]
    tokens = tokenize_pair(tokenizer, make_pair(prompt), max_length=None)
    assert tokens.prompt == [
        *[START, *b"system\nS", END, *b"\n"],
        *[START, *b"user\na", END, *b"\n"],
        *[START, *b"assistant\nb", END, *b"\n"],
        *[START, *b"user\nc", END, *b"\n"],
        *[START, *b"assistant\n"],
    ]
    assert tokens.chosen == [*b"Yes", END]


def test_an_answer_of_several_turns_ends_with_its_last_turn(tokenizer):
    chosen = [*turns("assistant", "a"), *turns("user", "b"), *turns("assistant", "c")]
    tokens = tokenize_pair(tokenizer, make_pair(chosen=chosen), max_length=None)
    assert tokens.chosen == [*b"a", END, *b"\n", START, *b"user\nb", END, *b"\n", START, *b"assistant\nc", END]
    assert tokens.rejected == [*b"No", END]


def test_an_answer_ends_with_its_end_of_turn_and_nothing_after_it(tokenizer):
    tokens = tokenize_pair(tokenizer, make_pair(chosen="Yes \n", rejected="N\n\no"), max_length=None)
    assert tokens.chosen == [*b"Yes \n", END]
    assert tokens.rejected == [*b"N\n\no", END]


def test_prompt_and_answer_decode_to_the_templates_own_text(tokenizer):
    pair = make_pair([*turns("system", "Sé"), *turns("user", "Hi 🙂")], "Ünï\n\n\tcode", "日本")
    tokens = tokenize_pair(tokenizer, pair, max_length=None)
    for answer, messages in ((tokens.chosen, pair.chosen), (tokens.rejected, pair.rejected)):
        text = tokenizer.apply_chat_template([*pair.prompt, *messages], tokenize=False)
        assert tokenizer.decode([*tokens.prompt, *answer]) + "\n" == text


def test_the_prompt_is_what_the_model_will_be_given_when_it_answers(tokenizer):
    pair = make_pair([*turns("system", "S"), *turns("user", "Hi")])
    assert tokenize_pair(tokenizer, pair, max_length=None).prompt == prompt_ids(tokenizer, pair.prompt)


def test_the_beginning_of_text_is_never_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    adds_bos = copy.deepcopy(tokenizer)
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", TEXT_END)]
    )
    adds_bos.bos_token = "<|endoftext|>"
    adds_bos.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert adds_bos("Hi")["input_ids"] == [TEXT_END, *b"Hi"]
    tokens = tokenize_pair(adds_bos, make_pair(), max_length=None)
    assert tokens.prompt == [TEXT_END, *HI_PROMPT]
    assert TEXT_END not in [*tokens.chosen, *tokens.rejected]
    assert (
        tokenize_pair(with_template(adds_bos, tokenizer.chat_template), make_pair(), max_length=None).prompt
        == HI_PROMPT
    )


@settings(max_examples=60, deadline=None)
@given(system=st.none() | st.text(), user=st.text(), chosen=st.text(), rejected=st.text())
def test_any_text_survives_as_prompt_and_answer(tokenizer, system, user, chosen, rejected):
    prompt = [*turns("system", *([] if system is None else [system])), *turns("user", user)]
    tokens = tokenize_pair(tokenizer, make_pair(prompt, chosen, rejected), max_length=None)
    start = [] if system is None else [START, *b"system\n", *system.encode(), END, *b"\n"]
    start += [START, *b"user\n", *user.encode(), END, *b"\n", START, *b"assistant\n"]
    assert tokens.prompt == start
    assert tokens.chosen == [*chosen.encode(), END]
    assert tokens.rejected == [*rejected.encode(), END]
    assert not tokens.truncated


# --- length ---------------------------------------------------------------------------------------


def test_truncation_cuts_the_answers_end_and_says_so(tokenizer):
    kept, dropped = tokenize_pairs(tokenizer, [make_pair()], max_length=len(HI_PROMPT) + 2)
    assert dropped == []
    assert (kept[0].prompt, kept[0].chosen, kept[0].rejected) == (HI_PROMPT, [*b"Ye"], [*b"No"])
    assert kept[0].truncated


def test_a_short_answer_stays_whole_beside_a_cut_one(tokenizer):
    pairs = [make_pair(chosen="Yes, sir"), make_pair(rejected="Never")]
    kept, _ = tokenize_pairs(tokenizer, pairs, max_length=len(HI_PROMPT) + 4)
    assert (kept[0].chosen, kept[0].rejected) == ([*b"Yes,"], [*b"No", END])
    assert (kept[1].chosen, kept[1].rejected) == ([*b"Yes", END], [*b"Neve"])
    assert [tokens.truncated for tokens in kept] == [True, True]


def test_a_pair_that_just_fits_is_not_truncated(tokenizer):
    kept, dropped = tokenize_pairs(tokenizer, [make_pair()], max_length=len(HI_PROMPT) + 4)
    assert not dropped
    assert kept[0].chosen == [*b"Yes", END]
    assert not kept[0].truncated


@pytest.mark.parametrize("shorter", [0, 1, 10])
def test_a_prompt_that_fills_max_length_is_dropped_with_its_reason(tokenizer, shorter):
    max_length = len(HI_PROMPT) - shorter
    kept, dropped = tokenize_pairs(tokenizer, [make_pair(row=7)], max_length=max_length)
    assert kept == []
    assert dropped[0].origin.row == 7
    assert dropped[0].reason == f"prompt fills max_length ({max_length} tokens)"


def test_a_prompt_that_leaves_one_token_is_kept(tokenizer):
    kept, _ = tokenize_pairs(tokenizer, [make_pair()], max_length=len(HI_PROMPT) + 1)
    assert (kept[0].chosen, kept[0].rejected) == ([*b"Y"], [*b"N"])


def test_answers_that_truncation_makes_equal_are_dropped(tokenizer):
    pairs = [make_pair(chosen="Yes", rejected="Yep", row=1), make_pair(chosen="Yes", rejected="Nay", row=2)]
    kept, dropped = tokenize_pairs(tokenizer, pairs, max_length=len(HI_PROMPT) + 2)
    assert [tokens.origin.row for tokens in kept] == [2]
    assert [(drop.origin.row, drop.reason) for drop in dropped] == [(1, "identical after truncation")]


def test_answers_that_the_template_makes_equal_are_not_blamed_on_truncation(tokenizer):
    trims = with_template(tokenizer, tokenizer.chat_template.replace("message['content']", "message['content'] | trim"))
    kept, dropped = tokenize_pairs(trims, [make_pair(chosen="Yes", rejected="Yes ")], max_length=None)
    assert kept == []
    assert "identical" in dropped[0].reason
    assert "truncation" not in dropped[0].reason


def test_every_pair_is_kept_or_dropped_and_counted_as_it_goes(tokenizer):
    ticks: list[int] = []
    pairs = [make_pair("x" * length, row=length) for length in (1, 50, 3)]
    kept, dropped = tokenize_pairs(tokenizer, pairs, max_length=40, on_pair=ticks.append)
    assert [tokens.origin.row for tokens in kept] == [1, 3]
    assert [drop.origin.row for drop in dropped] == [50]
    assert ticks == [1, 2, 3]


# --- other templates ------------------------------------------------------------------------------


def test_a_template_without_end_of_turn_gets_the_end_of_text(tokenizer):
    tokens = tokenize_pair(with_template(tokenizer, OPEN_TEMPLATE), make_pair(), max_length=None)
    assert tokens.prompt == [*b"user: Hi\nassistant: "]
    assert tokens.chosen == [*b"Yes", END]
    assert tokens.rejected == [*b"No", END]


def test_a_template_that_opens_thinking_in_the_generation_prompt_only(tokenizer):
    thinks = with_template(tokenizer, tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    assert prompt_ids(thinks, turns("user", "Hi")) == [*HI_PROMPT, *b"<think>\n"]
    tokens = tokenize_pair(thinks, make_pair(), max_length=None)
    assert (tokens.prompt, tokens.chosen, tokens.rejected) == (HI_PROMPT, [*b"Yes", END], [*b"No", END])


def test_a_template_that_opens_thinking_in_whole_conversations_only(tokenizer):
    content = "('<think></think>' if message['role'] == 'assistant' else '') + message['content']"
    thinks = with_template(tokenizer, tokenizer.chat_template.replace("message['content']", content))
    tokens = tokenize_pair(thinks, make_pair(), max_length=None)
    assert tokens.prompt == [*HI_PROMPT, *b"<think></think>"]  # nobody's words: the template's own
    assert tokens.chosen == [*b"Yes", END]
    assert tokens.rejected == [*b"No", END]


def test_the_common_prefix_ends_at_the_first_difference():
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2, 4], [1, 2]) == 2
    assert common_prefix_length([5], [6]) == 0


def test_a_tokenizer_without_chat_template_is_refused_with_the_next_step(tokenizer):
    with pytest.raises(ModelError, match=r"no chat template.*chat"):
        tokenize_pairs(with_template(tokenizer, None), [make_pair()], max_length=None)


def test_a_template_that_refuses_the_messages_is_quoted(tokenizer):
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    strict = with_template(tokenizer, refusal + tokenizer.chat_template)
    assert tokenize_pair(strict, make_pair(), max_length=None).prompt == HI_PROMPT
    with pytest.raises(ModelError, match="no system turn"):
        tokenize_pair(strict, make_pair([*turns("system", "S"), *turns("user", "Hi")]), max_length=None)


def test_a_row_that_the_template_refuses_is_named(tokenizer):
    strict = with_template(tokenizer, "{{ raise_exception('no system turn') }}")
    says = r"pairs\.jsonl, row 7: The model's chat template refuses .*no system turn\. .*\. lora-dpo data check --model"
    with pytest.raises(ModelError, match=says):
        tokenize_pairs(strict, [make_pair(row=7)], max_length=None)


def test_render_leaves_the_turn_to_the_assistant_only_when_asked(tokenizer):
    text = render(tokenizer, turns("user", "Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
    assert render(tokenizer, turns("user", "Hi"), add_generation_prompt=True) == text + "<|im_start|>assistant\n"


def test_encode_reads_special_tokens_and_adds_none(tokenizer):
    assert encode(tokenizer, "<|im_start|>Hi<|endoftext|>") == [START, *b"Hi", TEXT_END]
