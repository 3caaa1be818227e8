"""Keywords for a chat template, such as `enable_thinking: false`: which may be given, by whom ever they are given.

A recipe, a command, a request and the passport of an adapter from elsewhere all pass through here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_dpo.config.yaml import typed_value
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

TemplateKwargs = Mapping[str, Any]
"""Keywords by name, with values that JSON has."""

NO_KWARGS: TemplateKwargs = {}

MOST = 16
"""Keywords at once; known templates read at most a handful."""
MAX_CHARACTERS = 4096
"""Of all of them as JSON."""

RESERVED = frozenset(
    (
        *("self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "conversations"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "raise_exception", "strftime_now", "namespace", "range"),
    )
)
"""Names that are the conversation itself, the tokenizer's, or parameters of `apply_chat_template`."""

WORDS = frozenset(
    (
        *(
            "true",
            "false",
            "none",
            "True",
            "False",
            "None",
            "not",
            "and",
            "or",
            "in",
            "is",
            "if",
            "elif",
            "else",
            "endif",
        ),
        *("for", "endfor", "set", "endset", "macro", "endmacro", "call", "endcall", "filter", "endfilter", "block"),
        *("endblock", "extends", "include", "import", "from", "as", "with", "endwith", "without", "recursive", "break"),
        *("continue", "generation", "endgeneration", "loop", "caller", "varargs", "kwargs", "super", "context"),
        *("dict", "cycler", "joiner", "lipsum"),
    )
)
"""Words of Jinja, and names that it sets itself: a template does not read them, or cannot be written with them."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def checked_template_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that a template may be given.

    Raises:
        ValueError: too many or too long, a name that is none, is reserved or is a word of Jinja, or a value that JSON
            has not; the text is a sentence's end.
    """
    if len(given) > MOST:
        raise ValueError(f"{len(given)} keywords for the chat template are given, at most {MOST} are taken")
    for name in given:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} is no name of a keyword: letters, digits and _ make one")
        if name in RESERVED or name.startswith("_"):
            raise ValueError(f"{name} is not for a keyword of the chat template: it is set by the conversation")
        if name in WORDS:
            raise ValueError(f"{name} is no name of a keyword: it is a word of the language of chat templates")
    try:
        text = json.dumps(dict(given), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        raise ValueError("a keyword's value is none of text, a number, true, false, null, or a list of these") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the keywords have {len(text):,} characters as JSON, at most {MAX_CHARACTERS:,} are taken")
    known: dict[str, Any] = json.loads(text)
    return known


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """`enable_thinking=false,reasoning_effort=low` as keywords; values are typed as in a recipe.

    Raises:
        ConfigError: it is written otherwise, or as `checked_template_kwargs` does.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                f"--template is {shown(text)}: write KEYWORD=VALUE with commas between, such as enable_thinking=false."
            )
        if name.strip() in found:
            raise ConfigError(f"--template is {shown(text)}: {name.strip()} is given twice.")
        found[name.strip()] = typed_value(value.strip(), Any, where="--template")
    try:
        return checked_template_kwargs(found)
    except ValueError as error:
        raise ConfigError(f"--template is {shown(text)}: {error}.") from None


def as_words(kwargs: TemplateKwargs) -> str:
    """`enable_thinking=false, reasoning_effort="low"`, for a line that tells them."""
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in kwargs.items())
