"""Which keywords a chat template reads, so that one which changes nothing is told and not silent."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_dpo.config.reading import nearest
from lora_dpo.config.template_kwargs import RESERVED, TemplateKwargs
from lora_dpo.data.template_trial import template_environment
from lora_dpo.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def keywords_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The keywords that a tokenizer's chat template reads, beside the conversation itself. Empty for a broken one,
    which says so when it is used."""
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, Mapping) else [template] if template else []
    return frozenset().union(*map(_read_by, texts)) - set(tokenizer.special_tokens_map)


@functools.lru_cache(maxsize=64)
def _read_by(template: str) -> frozenset[str]:
    import jinja2
    import jinja2.meta

    environment = template_environment()
    try:
        tree = environment.parse(template)
        names = jinja2.meta.find_undeclared_variables(tree)
    except (jinja2.exceptions.TemplateError, RecursionError):
        return frozenset()
    # What is set in one branch and read after it is the template's own, unless it asks whether it was given.
    own = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "store"}
    asked_for = {
        test.node.name
        for test in tree.find_all(jinja2.nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, jinja2.nodes.Name)
    }
    known: set[str] = set(names) - (own - asked_for)
    return frozenset(known - RESERVED - set(environment.globals))


def note_of_keywords(tokenizer: PreTrainedTokenizerBase, kwargs: TemplateKwargs) -> str | None:
    """A sentence about keywords that the chat template does not read, and what it does; None if it reads them all."""
    known = keywords_of(tokenizer)
    unknown = [name for name in kwargs if name not in known]
    if not unknown:
        return None
    reads = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
    return (
        f"The chat template of {shown(tokenizer.name_or_path)} does not read {' and '.join(unknown)}, so that changes "
        f"nothing: {reads}.{nearest(unknown[0], known)}"
    )
