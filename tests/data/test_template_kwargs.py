"""Keywords for the chat template reach every place that writes with one, and one that it does not read is told."""

import ast
import json
import keyword
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHANNELS, HEADERS, NO_SYSTEM, THINKING, with_template

import lora_dpo
from lora_dpo.adapters.passport import read_passport
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.template_kwargs import RESERVED, WORDS, checked_template_kwargs, parse_template_kwargs
from lora_dpo.data import Message, Origin, PreferencePair, tokenize_pairs
from lora_dpo.data.answers import tokenize_answers
from lora_dpo.data.chat_template import encode, hold_defaults, prompt_ids, render, with_defaults
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.keywords_read import keywords_of, note_of_keywords
from lora_dpo.data.pairs import UnpairedAnswer
from lora_dpo.data.template_trial import fault_of, template_environment
from lora_dpo.data.token_view import view_pair
from lora_dpo.data.tokenize import tokenize_pair
from lora_dpo.errors import AdapterError, ConfigError

OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
EMPTY = "<think>\n\n</think>\n\n"
ASKED = (Message(role="user", content="2+2?"),)


def bot(content, **more):
    return (Message(role="assistant", content=content, **more),)


def pair(chosen, rejected, prompt=ASKED):
    return PreferencePair(prompt, chosen, rejected, Origin("a.jsonl", 1))


@pytest.fixture(scope="module")
def thinking(tokenizer):
    return with_template(tokenizer, THINKING)


def own(tokenizer, messages, *, ask=False, **kwargs):
    """What the tokenizer itself makes of a conversation."""
    written = tokenizer.apply_chat_template(
        [dict(m) for m in messages], add_generation_prompt=ask, return_dict=False, **kwargs
    )
    return list(written)


# --- every place ----------------------------------------------------------------------------------

WRITERS = {
    *("render", "prompt_ids", "tokenize_pairs", "tokenize_pair", "tokenize_row", "tokenize_answers", "view_pair"),
    *("generate", "stream", "draw", "sample_answers", "implicit_judge", "examine", "make_passport"),
}
WITHOUT = {
    ("judging/reward_model.py", "render"),  # another model's template
    ("training/run_summary.py", "examine"),  # looks at the text alone
    ("demo/pair_store.py", "examine"),  # votes belong to no recipe yet
    ("cli/model_check.py", "render"),  # what the template does by itself
    ("data/keywords_read.py", "render"),
    ("cli/plan.py", "draw"),  # a picture
    ("release/exports/ollama.py", "render"),  # they are the defaults of the template there
}


def calls():
    """Calls of these functions by their bare names, with their file."""
    root = Path(lora_dpo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WRITERS:
                yield path.relative_to(root).as_posix(), node


def test_every_call_that_writes_with_a_template_hands_the_keywords_on():
    found = list(calls())
    assert len(found) > 20
    lacking = {
        (file, node.func.id)
        for file, node in found
        if "chat_template_kwargs" not in {keyword.arg for keyword in node.keywords}
    }
    assert lacking <= WITHOUT


@pytest.mark.parametrize(("kwargs", "start"), [(OFF, EMPTY), (ON, ""), ({}, "")])
def test_ids_of_training_are_the_tokenizers_own(thinking, kwargs, start):
    chosen, rejected = bot("4"), bot("5, I think")
    tokens = tokenize_pair(thinking, pair(chosen, rejected), max_length=None, chat_template_kwargs=kwargs)
    for ids, answer in ((tokens.chosen, chosen), (tokens.rejected, rejected)):
        assert [*tokens.prompt, *ids] == own(thinking, [*ASKED, *answer], **kwargs)[:-1]  # but the last line break
    asked = own(thinking, ASKED, ask=True, **kwargs)
    assert prompt_ids(thinking, ASKED, chat_template_kwargs=kwargs) == asked
    assert asked[len(asked) - len(start) :] == list(start.encode())
    assert tokens.prompt == [*asked, *([] if start else EMPTY.encode())]  # an empty thought is never trained on
    assert (tokens.chosen, tokens.rejected) == ([*b"4", 257], [*b"5, I think", 257])
    assert (tokens.left_out, tokens.other_start) == (False, False)


def test_a_thought_of_the_data_is_trained_on_wherever_it_stands(thinking):
    beside = bot("4", reasoning_content="Two and two.")
    inside = bot("<think>\nTwo and two.\n</think>\n\n4")
    for answer in (beside, inside):
        tokens = tokenize_pair(thinking, pair(answer, bot("5")), max_length=None)
        assert tokens.prompt == own(thinking, ASKED, ask=True)
        assert tokens.chosen == [*b"<think>\nTwo and two.\n</think>\n\n4", 257]
        assert tokens.rejected == [*EMPTY.encode(), *b"5", 257]  # against a thought, none is a choice
        assert (tokens.left_out, tokens.other_start) == (False, False)


def test_an_empty_thought_that_the_data_has_is_trained_on(tokenizer):
    tokens = tokenize_pair(tokenizer, pair(bot(EMPTY + "4"), bot(EMPTY + "5")), max_length=None)
    assert tokens.chosen == [*EMPTY.encode(), *b"4", 257]


def test_an_empty_thought_after_a_prompt_that_opens_it_is_not_trained_on(tokenizer):
    opens = THINKING.replace(
        "{{ '<|im_start|>assistant\\n' }}{%- if enable", "{{ '<|im_start|>assistant\\n<think>\\n' }}{%- if enable"
    )
    assert opens != THINKING
    tokens = tokenize_pair(with_template(tokenizer, opens), pair(bot("4"), bot("5")), max_length=None)
    assert tokens.prompt[-len(EMPTY) :] == list(EMPTY.encode())
    assert (tokens.chosen, tokens.rejected, tokens.other_start) == ([*b"4", 257], [*b"5", 257], False)


def test_a_cut_counts_the_empty_thought_as_prompt(thinking):
    tokens = tokenize_pair(thinking, pair(bot("fourteen"), bot("five")), max_length=None)
    room = len(tokens.prompt) + 3
    cut = tokenize_pair(thinking, pair(bot("fourteen"), bot("five")), max_length=room)
    assert (cut.prompt, cut.chosen, cut.truncated) == (tokens.prompt, list(b"fou"), True)


def test_the_view_the_doctor_and_single_answers_write_with_them(thinking, tmp_path):
    one = pair(bot("4"), bot("5"))
    shown = view_pair(thinking, one, max_length=None, chat_template_kwargs=OFF)
    assert "".join(piece.text for piece in shown.prompt).endswith(EMPTY)
    vote = UnpairedAnswer(ASKED, bot("4"), True, Origin("a", 1))
    [answer], _ = tokenize_answers(thinking, [vote], max_length=None, chat_template_kwargs=OFF)
    assert (answer.prompt, answer.answer) == (own(thinking, ASKED, ask=True, **OFF), [*b"4", 257])
    [both], _ = tokenize_pairs(thinking, [one], max_length=None, chat_template_kwargs=OFF)
    assert both.prompt == answer.prompt
    # thinking on, the prompt alone ends before the empty thought; off, a thought does not follow it
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "2+2?", "chosen": "<think>\\nHm.\\n</think>\\n\\n4", "rejected": "5"}\n')
    found = examine([str(path)], tokenizer=thinking, chat_template_kwargs=OFF).findings
    assert found["other-start"].examples[0][1].endswith("</think>\n\n")
    assert "other-start" not in examine([str(path)], tokenizer=thinking).findings


def test_what_a_turn_thought_goes_to_a_template_under_the_name_that_it_reads(tokenizer):
    channels = with_template(tokenizer, CHANNELS)
    answer = bot("4", reasoning_content="Two and two.")
    text = render(channels, [*ASKED, *answer], chat_template_kwargs={"reasoning_effort": "low"})
    assert "<|channel|>analysis<|message|>Two and two.<|end|>" in text
    assert "Reasoning: low<|end|>" in text
    # transformers itself knows that name; this one it does not
    other = with_template(tokenizer, CHANNELS.replace("m.thinking", "m.reasoning"))
    assert "<|channel|>analysis<|message|>Two and two.<|end|>" in render(other, [*ASKED, *answer])


# --- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (THINKING, {"enable_thinking"}),
        (HEADERS, {"date_string"}),
        (CHANNELS, {"reasoning_effort"}),
        (NO_SYSTEM, set()),
        ("{% broken", set()),
        ({"default": THINKING, "tool_use": HEADERS}, {"enable_thinking", "date_string"}),
        ("{% generation %}{{ thinking }}{% endgeneration %}{% set mine = 1 %}{{ mine }}{{ pad_token }}", {"thinking"}),
    ],
)
def test_the_keywords_that_a_template_reads(tokenizer, template, read):
    assert keywords_of(with_template(tokenizer, template)) == read


def test_a_mistyped_keyword_is_told(thinking):
    assert note_of_keywords(thinking, {}) is None
    assert note_of_keywords(thinking, OFF) is None
    said = note_of_keywords(thinking, {**OFF, "enable_thinkng": False})
    assert "does not read enable_thinkng, so that changes nothing: it reads enable_thinking." in said
    assert said.endswith("Did you mean enable_thinking?")


def test_a_template_that_no_keyword_changes_says_so(tokenizer):
    assert note_of_keywords(with_template(tokenizer, NO_SYSTEM), OFF).endswith("it reads none.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"messages": []}, "messages is not for a keyword"),
        ({"tokenize": True}, "tokenize is not for a keyword"),
        ({"eos_token": "x"}, "eos_token is not for a keyword"),
        ({"a b": 1}, "no name of a keyword"),
        ({"__class__": 1}, "not for a keyword"),
        ({"a": object()}, "none of text"),
        ({"a": float("nan")}, "none of text"),
        ({"a": "\ud83d"}, "none of text"),
        ({"a": "x" * 5000}, "5,009 characters"),
        ({f"a{n}": 1 for n in range(17)}, "17 keywords"),
    ],
)
def test_what_is_no_keyword_is_refused_in_a_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        checked_template_kwargs(given)


def test_all_that_transformers_takes_for_itself_is_reserved():
    import inspect

    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert taken.keys() - {"kwargs"} <= RESERVED
    assert set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) <= RESERVED


def test_a_command_writes_them_with_their_types():
    text = "enable_thinking=false, reasoning_effort=low,n=3,names=null"
    assert parse_template_kwargs(text) == {"enable_thinking": False, "reasoning_effort": "low", "n": 3, "names": None}


@pytest.mark.parametrize("text", ["", "enable_thinking", "=x", "a=1,a=2", "tokenize=true"])
def test_a_command_that_writes_none_is_refused(text):
    with pytest.raises(ConfigError, match="--template is"):
        parse_template_kwargs(text)


def test_a_recipe_takes_them_and_refuses_what_is_none(recipe_dict):
    recipe = check_recipe(recipe_dict(model={"template": OFF}))
    assert recipe.model.template == OFF
    with pytest.raises(ConfigError, match=r"model\.template is .*tokenize is not for a keyword"):
        check_recipe(recipe_dict(model={"template": {"tokenize": False}}))


# --- defaults for programs that hand none on ------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text("ab\"'\\", max_size=3), inside, max_size=2),
    max_leaves=5,
)


@given(values, values)
@settings(max_examples=60, deadline=None)
def test_a_default_is_the_keyword_where_none_is_given(value, other):
    template = (
        "\n  {% if a is none %}nothing{% else %}{{ a | tojson }}{% endif %}\n{% for m in messages %}{{ a }}{% endfor %}"
    )
    texts = template, with_defaults(template, {"a": value})
    plain, held = map(template_environment().from_string, texts)
    assert held.render(messages=ASKED) == plain.render(messages=ASKED, a=value)
    assert held.render(messages=ASKED, a=other) == plain.render(messages=ASKED, a=other)


def test_defaults_go_into_the_default_template_alone(tokenizer):
    named = with_template(tokenizer, {"default": THINKING, "tool_use": HEADERS})
    hold_defaults(named, OFF)
    assert named.chat_template["tool_use"] == HEADERS
    assert prompt_ids(named, ASKED) == prompt_ids(with_template(tokenizer, THINKING), ASKED, chat_template_kwargs=OFF)
    plain = with_template(tokenizer, THINKING)
    hold_defaults(plain, {})
    assert plain.chat_template == THINKING


def test_a_template_that_a_keyword_makes_run_on_is_not_used(tokenizer):
    once = "{% if loud %}{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}{% endif %}x"
    assert "characters of a few words" in fault_of(once)
    assert fault_of(THINKING) is None
    assert encode(tokenizer, "x") == [120]


NAMES = sorted({*WORDS, *keyword.kwlist, *keyword.softkwlist, "namespaces", "style"} - {"_"})


@pytest.mark.parametrize("name", NAMES)
def test_a_keyword_is_one_that_a_template_reads_and_can_be_written_with(name):
    """A word of Jinja is refused in one sentence, wherever it comes from; any other name works as a default."""
    if name in WORDS:
        with pytest.raises(
            ConfigError, match=rf"^--template is '{name}=7': {name} is no name of a keyword: it is a word"
        ):
            parse_template_kwargs(f"{name}=7")
        return
    kwargs = checked_template_kwargs({name: 7})
    template = f"{{{{ {name} }}}}|{{% for one in [1] %}}{{{{ {name} }}}}{{% endfor %}}"
    assert template_environment().from_string(with_defaults(template, kwargs)).render() == "7|7"


@pytest.mark.parametrize("name", ["not", "true", "None", "loop", "in"])
def test_words_that_a_template_cannot_be_written_with_are_refused_of_a_passport_too(tiny_adapter, tmp_path, name):
    adapter = shutil.copytree(tiny_adapter, tmp_path / "foreign")
    passport = json.loads((adapter / "passport.json").read_text())
    (adapter / "passport.json").write_text(json.dumps({**passport, "chat_template_kwargs": {name: 1}}))
    with pytest.raises(AdapterError, match=f"passport.json cannot be read .{name} is no name of a keyword"):
        read_passport(adapter)
