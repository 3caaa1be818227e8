"""The model that answers and the judge of its answers, both in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_dpo.adapters.loading import LoadedModel, attach_reference, beta_of, load_policy
from lora_dpo.config.recipe import Quantize
from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.errors import ConfigError
from lora_dpo.judging import Judge, Means, open_judge
from lora_dpo.judging.endpoint import EndpointSettings
from lora_dpo.judging.specs import check_specs, is_implicit


def load_with_judge(
    specs: Sequence[str],
    *,
    cache: Path,
    endpoint: EndpointSettings | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    quantize: Quantize | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> tuple[LoadedModel, Judge]:
    """The model that answers and the judge of its answers, both in memory.

    Args:
        specs: judges as a user writes them; they add up.
        cache: where an LLM judge keeps its verdicts.
        chat_template_kwargs: keywords for the chat template, on top of those of the adapter.

    Raises:
        LoraDPOError: as `load_policy` and `open_judge` do. What needs no model is refused before one is loaded.
    """
    check_specs(specs)
    implicit = any(map(is_implicit, specs))
    if implicit and adapter is None:
        raise ConfigError("The implicit judge compares an adapter with its reference. Give one with --adapter.")
    policy = load_policy(model, adapter=adapter, quantize=quantize, chat_template_kwargs=chat_template_kwargs)
    if implicit:
        attach_reference(policy)
    means = Means(
        base=policy.base,
        policy=policy.model if adapter else None,
        chat_template_kwargs=policy.chat_template_kwargs,
        beta=beta_of(adapter),
        endpoint=endpoint or EndpointSettings(),
        cache=cache,
    )
    return policy, open_judge(specs, means)
