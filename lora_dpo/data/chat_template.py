"""Chat messages to token ids, through the model's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data.template_trial import fault_of
from lora_dpo.data.thoughts import CHANNELS, split_thought
from lora_dpo.errors import ModelError
from lora_dpo.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    """Of an assistant turn: what it thought before it answered, where a row keeps that beside the content."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Of an assistant turn: `{type: function, function: {name, arguments}}` each, with the `id` that a row gives it."""
    name: NotRequired[str]
    """Of a tool turn: the function that answers."""
    tool_call_id: NotRequired[str]


REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages hold, and templates read, what a turn thought."""


def assistant_turn(text: str) -> Message:
    """An answer as a turn: as it was written, but of gpt-oss's channels the thought beside the content."""
    if not text.lstrip().startswith(CHANNELS):
        return Message(role="assistant", content=text)
    thought, said = split_thought(text)
    beside = Message(role="assistant", content=said, reasoning_content=thought)
    return beside if thought else Message(role="assistant", content=said)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> list[int]:
    """Token ids of a conversation up to where the assistant is to write.

    Args:
        chat_template_kwargs: keywords for the template.
    """
    text = render(tokenizer, messages, add_generation_prompt=True, chat_template_kwargs=chat_template_kwargs)
    return encode(tokenizer, text)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
    template: str | None = None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> str:
    """The conversation as the text that the model reads, special tokens written out.

    Args:
        tools: JSON schemas of the functions that the model may call.
        template: written with in place of the tokenizer's own.
        chat_template_kwargs: keywords for the template, such as `enable_thinking`; others change nothing.

    Raises:
        ModelError: the tokenizer has no chat template, or none that is its default; or the template refuses the
            messages, does not end, or writes or holds without end.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so chat messages cannot be "
            "written for it. Use an instruction-tuned (chat) model, or data with plain text prompts."
        )
    check_default(tokenizer.chat_template, tokenizer.name_or_path)
    if fault := next(filter(None, map(fault_of, _all_of(tokenizer.chat_template))), None):
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} is not used: {fault}. Take the model from its source again."
        )
    try:
        text = tokenizer.apply_chat_template(
            [_as_read(message, template or tokenizer.chat_template) for message in messages],
            tools=list(tools) or None,  # some templates write an introduction to an empty list
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=template,
            **chat_template_kwargs,
        )
    except Exception as error:  # a template is a program of the model's maker: it raises what it likes
        reason = (
            f"{error}" if isinstance(error, jinja2.exceptions.TemplateError) else f"{type(error).__name__}: {error}"
        )
        raise ModelError(f"The model's chat template refuses these messages: {reason}{_way_out(reason)}") from error
    return str(text)


def _way_out(reason: str) -> str:
    """What to do about a template's refusal, by its words."""
    said = reason.casefold()
    if "alternat" in said:
        return ". Questions and answers have to take turns: join two of one kind, or leave one out"
    if "system" in said:
        return ". This template takes no system turn: put its text before the first question"
    return ""


def _as_read(message: Message, template: str | Mapping[str, str]) -> dict[str, Any]:
    """A message with what it thought under every name that the template mentions. Of transformers, newer versions
    alone know two of these."""
    given: dict[str, Any] = dict(message)
    if thought := given.get("reasoning_content"):
        texts = _all_of(template)
        given |= {name: thought for name in REASONING if any(re.search(rf"\b{name}\b", text) for text in texts)}
    return given


def with_defaults(template: str, kwargs: TemplateKwargs) -> str:
    """A template that takes these keywords where it is given none: for programs that hand none on.

    The line break after each line is taken away again, as after every block of a chat template.
    """
    lines = (
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in kwargs.items()
    )
    return "".join(lines) + template


def _literal(value: Any) -> str:
    """A value of JSON as Jinja writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(one)}" for name, one in value.items()) + "}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def check_default(template: str | Mapping[str, str], name: str) -> None:
    """Raise `ModelError` for several chat templates, by their use, of which none is the default."""
    if not isinstance(template, str) and "default" not in template:
        named = ", ".join(shown(one) for one in template)
        raise ModelError(
            f"The chat templates of {name} are named {named}, and none is the default, so it is not known which writes "
            "its chats. Save the right one as chat_template.jinja in a copy of the model's folder."
        )


def _all_of(template: str | Mapping[str, str]) -> list[str]:
    return [template] if isinstance(template, str) else list(template.values())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of rendered text, with exactly the special tokens that are written in it."""
    # The template writes its own special tokens: the tokenizer must not add BOS once more.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def hold_defaults(tokenizer: PreTrainedTokenizerBase, kwargs: TemplateKwargs) -> None:
    """Make these keywords the defaults of a tokenizer's chat template, or of its default one, before it is written."""
    own = tokenizer.chat_template
    if not kwargs or not own:
        return
    if isinstance(own, str):
        tokenizer.chat_template = with_defaults(own, kwargs)
    else:
        check_default(own, tokenizer.name_or_path)
        tokenizer.chat_template = {**own, "default": with_defaults(own["default"], kwargs)}
