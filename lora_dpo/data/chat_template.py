"""Chat messages to token ids, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from lora_dpo.data.template_trial import fault_of
from lora_dpo.errors import ModelError
from lora_dpo.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Of an assistant turn: `{type: function, function: {name, arguments}}` each, with the `id` that a row gives it."""
    name: NotRequired[str]
    """Of a tool turn: the function that answers."""
    tool_call_id: NotRequired[str]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to write."""
    return encode(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
    template: str | None = None,
) -> str:
    """The conversation as the text that the model reads, special tokens written out.

    Args:
        tools: JSON schemas of the functions that the model may call.
        template: written with in place of the tokenizer's own.

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
            [dict(message) for message in messages],
            tools=list(tools) or None,  # some templates write an introduction to an empty list
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=template,
        )
    except Exception as error:  # a template is a program of the model's maker: it raises what it likes
        reason = (
            f"{error}" if isinstance(error, jinja2.exceptions.TemplateError) else f"{type(error).__name__}: {error}"
        )
        raise ModelError(f"The model's chat template refuses these messages: {reason}") from error
    return str(text)


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
