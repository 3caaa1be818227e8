"""Chat messages to token ids, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from lora_dpo.data.template_trial import fault_of
from lora_dpo.errors import ModelError

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
) -> str:
    """The conversation as the text that the model reads, special tokens written out.

    Args:
        tools: JSON schemas of the functions that the model may call.

    Raises:
        ModelError: the tokenizer has no chat template, or the template refuses the messages, does not end, or writes
            or holds without end.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so chat messages cannot be "
            "written for it. Use an instruction-tuned (chat) model, or data with plain text prompts."
        )
    named = tokenizer.chat_template  # a tokenizer may have several, by their use
    if fault := fault_of("\n".join(named.values()) if isinstance(named, dict) else named):
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} is not used: {fault}. Take the model from its source again."
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,  # some templates write an introduction to an empty list
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program of the model's maker: it raises what it likes
        reason = (
            f"{error}" if isinstance(error, jinja2.exceptions.TemplateError) else f"{type(error).__name__}: {error}"
        )
        raise ModelError(f"The model's chat template refuses these messages: {reason}") from error
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of rendered text, with exactly the special tokens that are written in it."""
    # The template writes its own special tokens: the tokenizer must not add BOS once more.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
