"""The model that answers: a base in memory, with an adapter on it or without."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.folder import attach_adapter, check_adapter, put_beside, warn_of
from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.adapters.passport import read_passport
from lora_dpo.adapters.store import find_adapter
from lora_dpo.config.reading import read_recipe
from lora_dpo.config.recipe import Dtype, Quantize
from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.errors import AdapterError, BaseDiffers
from lora_dpo.files import sha256_of
from lora_dpo.model.base import Base, load_base
from lora_dpo.model.lora import POLICY, REFERENCE


@dataclass
class LoadedModel:
    """A model that can answer, and what identifies it."""

    base: Base
    model: Any
    """The base's model, or a PeftModel around it."""
    adapter: Path | None = None
    chat_template_kwargs: TemplateKwargs = field(default_factory=dict)
    """Keywords for the chat template that it is asked with."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its answers depend on, as plain values."""
        weights = self.adapter and sha256_of(self.adapter / "adapter_model.safetensors")
        return {
            "model": self.base.name,
            "model_fingerprint": self.base.fingerprint,
            "quantize": self.base.quantize,
            "dtype": self.base.dtype,
            "adapter": str(self.adapter) if self.adapter else None,
            "adapter_sha256": weights or None,
            **({"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}),
        }


def load_policy(
    model: str | None = None,
    *,
    adapter: Path | None = None,
    quantize: Quantize | None = None,
    dtype: Dtype = "auto",
    chat_template_kwargs: TemplateKwargs | None = None,
) -> LoadedModel:
    """Load a base once and put an adapter on it, if there is one.

    Args:
        model: the base; by default the one that the adapter was trained on.
        quantize: by default as the adapter was trained, and "auto" without an adapter.
        chat_template_kwargs: keywords for the chat template, on top of those that the adapter was trained with.

    Raises:
        ModelError: the base cannot be loaded.
        AdapterError: no adapter there, or made for another base.
    """
    if adapter is None:
        if model is None:
            raise AdapterError("Name the model that answers, with --model or --adapter.")
        base = load_base(model, quantize=quantize or "auto", dtype=dtype)
        return LoadedModel(base, base.model, chat_template_kwargs=chat_template_kwargs or {})
    base = load_base_of(adapter, model=model, quantize=quantize, dtype=dtype)
    kwargs = {**open_adapter(adapter).chat_template_kwargs, **(chat_template_kwargs or {})}
    return LoadedModel(base, attach_adapter(base, adapter), adapter, kwargs)


def load_base_of(
    folder: str | Path, *, model: str | None = None, quantize: Quantize | None = None, dtype: Dtype = "auto"
) -> Base:
    """Load the base that an adapter was made for, held as in its training.

    Args:
        model: another place of the same base; it has revisions of its own.
        quantize: by default as the adapter was trained.

    Raises:
        AdapterError: the folder is no adapter, or does not say what it was made for.
        ModelError: the base cannot be loaded.
    """
    adapter = open_adapter(folder)
    name, revision = (model, None) if model else base_of(adapter)
    return load_base(name, revision=revision, quantize=quantize or adapter.quantize, dtype=dtype)


def beta_of(adapter: Path | None) -> float:
    """The β that an adapter was trained with, by its recipe; DPO's usual 0.1 if it does not say.

    1 for SFT, which has none: its margins are in nats, as in training.
    """
    if adapter is None or not (adapter / "recipe.yaml").is_file():
        return 0.1
    recipe = read_recipe(adapter / "recipe.yaml")
    return 1.0 if recipe.method == "sft" else float(recipe.trainer.get("beta", 0.1))


def attach_reference(policy: LoadedModel) -> None:
    """Put the frozen reference of the adapter's training beside it, if that was an adapter itself.

    Raises:
        AdapterError: that adapter is not where the passport says, or does not fit the base.

    Warns:
        BaseDiffers: another adapter is there than in training.
    """
    passport = read_passport(policy.adapter) if policy.adapter else None
    if passport is None or passport.reference == "base":
        return
    try:
        folder = find_adapter(passport.reference.removeprefix("adapter:"))
    except AdapterError as error:
        raise AdapterError(
            f"{policy.adapter} was trained against {passport.reference}, which is not there: its implicit reward "
            "cannot be computed."
        ) from error
    warn_of(check_adapter(policy.base, folder))
    if passport.reference_sha256 not in (None, sha256_of(folder / WEIGHTS)):
        text = f"{policy.adapter} was trained against other weights than {folder} holds now: its implicit reward is "
        warnings.warn(BaseDiffers(text + "against another reference."), stacklevel=2)
    put_beside(policy.model, folder, name=REFERENCE, base=policy.base.name)
    policy.model.set_adapter(POLICY)
    policy.model.eval()
