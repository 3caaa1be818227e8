"""Templates in the manner of the usual families: trained on are the tokenizer's own ids, or a sentence says why not."""

import copy
import json
import shutil

import pytest
from templates import BARS, CHANNELS, HEADERS, INSTRUCT, NO_SYSTEM, THINKING, with_template
from transformers import ByT5Tokenizer

from lora_dpo.config.reading import check_recipe
from lora_dpo.data import Message, Origin, PreferencePair
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.tokenize import tokenize_pair, tokenize_pairs
from lora_dpo.errors import ModelError
from lora_dpo.events import StopSignal
from lora_dpo.training.prepare import prepare

FAMILIES = {
    "llama 3": dict(
        template=HEADERS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>"),
        chosen="Yes.<|eot_id|>",
        rejected="No.<|eot_id|>",
    ),
    "qwen 3": dict(template=THINKING, chosen="Yes.<|im_end|>", rejected="No.<|im_end|>"),
    "gemma": dict(
        template=NO_SYSTEM,
        bos="<bos>",
        eos="<eos>",
        tokens=("<start_of_turn>", "<end_of_turn>"),
        chosen="Yes.<end_of_turn>",
        rejected="No.<end_of_turn>",
    ),
    "mistral": dict(
        template=INSTRUCT, bos="<s>", eos="</s>", tokens=("[INST]", "[/INST]"), chosen=" Yes.</s>", rejected=" No.</s>"
    ),
    "phi": dict(
        template=BARS,
        eos="<|endoftext|>",
        tokens=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        chosen="Yes.<|end|>\n<|endoftext|>",
        rejected="No.<|end|>\n<|endoftext|>",
    ),
    "gpt-oss": dict(
        template=CHANNELS,
        eos="<|return|>",
        tokens=("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        chosen="<|channel|>final<|message|>Yes.<|return|>",
        rejected="<|channel|>final<|message|>No.<|return|>",
    ),
}
TURNS = {
    "question": ["user"],
    "system": ["system", "user"],
    "conversation": ["user", "assistant", "user"],
    "two questions": ["user", "user"],
    "all": ["system", "user", "assistant", "user"],
}
REFUSED = {
    ("gemma", "system"): "This template takes no system turn: put its text before the first question",
    ("gemma", "all"): "This template takes no system turn: put its text before the first question",
    ("gemma", "two questions"): "Questions and answers have to take turns",
    ("mistral", "two questions"): "Questions and answers have to take turns",
}


def of(tokenizer, family, **more):
    how = {name: value for name, value in FAMILIES[family].items() if name not in ("chosen", "rejected")}
    return with_template(tokenizer, how.pop("template"), **how, **more)


def pair(roles):
    prompt = tuple(Message(role=role, content=f"Words {n}.") for n, role in enumerate(roles))
    sides = [(Message(role="assistant", content=text),) for text in ("Yes.", "No.")]
    return PreferencePair(prompt, sides[0], sides[1], Origin("a.jsonl", 1))


def own(tokenizer, messages, *, ask=False):
    turns = [dict(message) for message in messages]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=ask, return_dict=False))


@pytest.mark.parametrize("pad", ["same", "eos", None])
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_own_and_the_end_of_turn_is_trained_on(tokenizer, family, turns, pad):
    family_tokenizer, one = of(tokenizer, family, pad=pad), pair(TURNS[turns])
    if (family, turns) in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family, turns]) as refused:
            tokenize_pairs(family_tokenizer, [one], max_length=None)
        assert str(refused.value).startswith("a.jsonl, row 1: ")
        return
    [tokens], dropped = tokenize_pairs(family_tokenizer, [one], max_length=None)
    assert dropped == []
    assert family_tokenizer.decode(tokens.chosen) == FAMILIES[family]["chosen"]
    assert family_tokenizer.decode(tokens.rejected) == FAMILIES[family]["rejected"]
    for ids, side in ((tokens.chosen, one.chosen), (tokens.rejected, one.rejected)):
        whole = own(family_tokenizer, [*one.prompt, *side])
        written = [*tokens.prompt, *ids]
        assert written == whole[: len(written)]
        assert family_tokenizer.decode(whole[len(written) :]).strip() == ""
    asked = prompt_ids(family_tokenizer, one.prompt)
    assert asked == own(family_tokenizer, one.prompt, ask=True)
    assert tokens.prompt[: len(asked)] == asked  # a chat asks where training answers
    assert (tokens.left_out, tokens.other_start) == (False, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_beginning_of_text_is_there_once(tokenizer, family):
    family_tokenizer = of(tokenizer, family)
    tokens = tokenize_pair(family_tokenizer, pair(["user"]), max_length=None)
    if "bos" in FAMILIES[family]:
        assert tokens.prompt.count(family_tokenizer.bos_token_id) == 1


def test_the_doctor_says_what_a_family_refuses(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": [{"role": role, "content": "x"} for role in roles], "chosen": "a", "rejected": "b"}
        for roles in (["user"], ["system", "user"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = examine([str(path)], tokenizer=of(tokenizer, "gemma")).findings["template"]
    assert [origin.row for origin in found.rows] == [2]
    assert "put its text before the first question" in found.examples[0][1]


def test_a_slow_tokenizer_and_added_tokens():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    slow = with_template(slow, THINKING, eos="<|im_end|>", tokens=("<|im_start|>", "<|im_end|>"))
    one = pair(["system", "user"])
    tokens = tokenize_pair(slow, one, max_length=None)
    assert prompt_ids(slow, one.prompt) == own(slow, one.prompt, ask=True)
    assert slow.decode(tokens.chosen) == "Yes.<|im_end|>"
    assert tokens.chosen[-1] == slow.eos_token_id
    assert [*tokens.prompt, *tokens.chosen] == own(slow, [*one.prompt, *one.chosen])[:-1]


@pytest.mark.parametrize("written", ["<|im_start|>assistant", "<|im_start|>' + message"])
def test_a_token_without_a_row_in_the_model_stops_a_run(tiny_model_folder, recipe_dict, tmp_path, tokenizer, written):
    folder = tmp_path / "extended"
    shutil.copytree(tiny_model_folder, folder)
    extended = copy.deepcopy(tokenizer)
    extended.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    extended.chat_template = tokenizer.chat_template.replace(written, written.replace("im_start", "new"))
    extended.save_pretrained(folder)
    recipe = check_recipe(recipe_dict(model={"name": str(folder)}))
    with pytest.raises(
        ModelError, match=r"token 259 \('<\|new\|>'\).*has rows for 259 tokens.*Take both from one source"
    ):
        prepare(recipe, tmp_path / "out", lambda event: None, StopSignal())


def test_a_token_that_nothing_writes_does_no_harm(tiny_model_folder, recipe_dict, tmp_path, tokenizer):
    folder = tmp_path / "extended"
    shutil.copytree(tiny_model_folder, folder)
    extended = copy.deepcopy(tokenizer)
    extended.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    extended.save_pretrained(folder)
    recipe = check_recipe(recipe_dict(model={"name": str(folder)}))
    assert prepare(recipe, tmp_path / "out", lambda event: None, StopSignal()).train
