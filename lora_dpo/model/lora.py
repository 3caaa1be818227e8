"""LoRA on the one base: adapters on it, on and off it, and the reference that it is when they are off.

π_ref = reference(model): the adapters off, or the frozen copy named "ref"
π_θ   = the same model, the adapter named "default" on
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_dpo.config.recipe import LoraSection
from lora_dpo.errors import ConfigError
from lora_dpo.model.base import Base
from lora_dpo.model.experts import expert_weights, layer_of, short_name
from lora_dpo.model.whole_parts import copies_of, finish_copies, is_tied, whole_modules
from lora_dpo.text import shown

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

POLICY, REFERENCE = "default", "ref"
"""Adapter names on the model; TRL and plain peft use the same two."""
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
PAST_ADAPTERS = frozenset({"out_proj", "conv1d"})
"""In such models peft refuses to adapt these: their kernels read the weights past an adapter."""


def share_weights(base: Base) -> Base:
    """The same base once more, as another tree of modules over the same weights: no tensor is copied but buffers.

    What is done to one tree (an adapter, hooks, checkpointing, train mode) does not touch the other, so one can
    be trained while the other answers. It costs the modules themselves: megabytes, and a fraction of a second.

    Args:
        base: without an adapter on it.
    """
    weights = list(base.model.parameters())
    states = [getattr(weight, "quant_state", None) for weight in weights]  # bitsandbytes' scales
    memo = {id(shared): shared for shared in [*weights, *states] if shared is not None}
    return replace(base, model=copy.deepcopy(base.model, memo))


def attach_lora(base: PreTrainedModel, lora: LoraSection, *, seed: int) -> PeftModel:
    """Put a fresh adapter on a base model: B = 0, so the policy starts as the reference.

    Raises:
        ConfigError: `targets` or `layers` match nothing in this model.
    """
    import torch
    from peft import get_peft_model

    names = linear_names(base)
    whole = whole_modules(base, lora.modules_to_save)
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, lora_config(base, lora))
    except ValueError as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"lora: {reason}. Linear layers here: {', '.join(names)}.") from None
    _check_ranks(model, lora)
    _check_targets(model, lora)
    to_fp32_masters(model)
    if whole:
        finish_copies(model, whole)
    return model


def _check_targets(model: PeftModel, lora: LoraSection) -> None:
    """Raise `ConfigError` for a target of which `modules_to_save` leaves no layer to adapt."""
    adapted = [f".{name}" for name, part in model.named_modules() if hasattr(part, "lora_A")]
    for wanted in lora.targets if lora.modules_to_save and isinstance(lora.targets, list) else []:
        if not any(name.endswith(f".{wanted}") for name in adapted):
            raise ConfigError(
                f"lora.targets names {shown(wanted)}, of which lora.modules_to_save leaves nothing to adapt: what is "
                "trained whole has no adapter. Leave it out of one of them."
            )


def _check_ranks(model: PeftModel, lora: LoraSection) -> None:
    """Raise `ConfigError` for an entry of `rank_pattern` that no adapted layer has the name of."""
    adapted = [f".{name}" for name, part in model.named_modules() if hasattr(part, "lora_A")]
    for wanted in lora.rank_pattern:
        if not any(name.endswith(f".{wanted}") for name in adapted):
            there = sorted({name.rpartition(".")[2] for name in adapted})
            raise ConfigError(
                f"lora.rank_pattern names {shown(wanted)}, which no adapted layer is called. Adapted here: "
                f"{', '.join(there)}."
            )


def lora_config(model: PreTrainedModel, lora: LoraSection) -> LoraConfig:
    """The recipe's `lora` section in peft's terms, `top-N` resolved to layer numbers."""
    from peft import LoraConfig

    count = model.config.get_text_config().num_hidden_layers
    layers: list[int] | None = None
    if isinstance(lora.layers, list):
        layers = lora.layers
    elif lora.layers.startswith("top-"):
        layers = list(range(count))[-int(lora.layers.removeprefix("top-")) :]
    if layers and (max(layers) >= count or min(layers) < 0):
        raise ConfigError(f"lora.layers is {shown(lora.layers)}: this model has layers 0 to {count - 1}.")
    targets = lora.targets
    past = PAST_ADAPTERS if model.config.get_text_config().model_type in MAMBA else frozenset()
    if targets == "all-linear" and (layers is not None or expert_weights(model) or past):
        # peft picks layers by number only for named targets, and takes experts and their router for linear, too
        targets = [name for name in linear_names(model) if name not in past]
    whole = whole_modules(model, lora.modules_to_save)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # 32 and 32.0 are one file
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_parameters=_parameters(model, lora, layers),
        rank_pattern=dict(lora.rank_pattern),
        modules_to_save=whole or None,
        ensure_weight_tying=is_tied(model, whole),
        # EVA's A is set once the base is in memory (`eva.py`); what is saved is an ordinary adapter
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    return _as_named(config, model, lora)


def _parameters(model: PreTrainedModel, lora: LoraSection, layers: list[int] | None) -> list[str] | None:
    """`lora.parameters` as names of this model's; with a choice of layers each by its whole name."""
    if not lora.parameters:
        return None
    stacked = expert_weights(model)
    short = sorted({short_name(name) for name in stacked})
    wanted = short if lora.parameters == "experts" else lora.parameters
    if not stacked or (odd := [name for name in wanted if name not in short and name not in stacked]):
        there = f"Such weights here: {', '.join(short)}." if stacked else "This model has none."
        what = lora.parameters if not stacked else odd
        raise ConfigError(f"lora.parameters is {shown(what)}, but these are no stacked weights of experts. {there}")
    if lora.init == "eva":
        raise ConfigError("lora.init: eva is not possible with lora.parameters: experts read no rows of a fixed order.")
    for on, name in ((lora.dropout, "dropout"), (lora.dora, "dora")):
        if on:
            raise ConfigError(f"lora.{name} is not possible with lora.parameters: peft has neither for them.")
    if lora.rank_pattern:
        raise ConfigError("lora.rank_pattern is not possible with lora.parameters: experts have lora.rank.")
    if layers is None:
        return list(wanted)
    return [name for name in stacked if layer_of(name) in layers and {name, short_name(name)} & set(wanted)]


def _as_named(config: LoraConfig, model: PreTrainedModel, lora: LoraSection) -> LoraConfig:
    """A config whose targets mean what they name.

    From transformers 5 on a mixture's experts are no linear layers any more, and peft takes such names as `gate_proj`
    for all of them, also where a dense layer has that name. Those are left out of `all-linear`.

    Raises:
        ConfigError: the recipe names them.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not expert_weights(model):
        return config
    read = copy.deepcopy(config)
    convert_peft_config_for_transformers(read, model=model, conversions=None)
    taken = set(read.target_parameters or ()) - set(config.target_parameters or ())
    if not taken:
        return config
    if lora.targets != "all-linear":
        odd = sorted(set(config.target_modules) - set(read.target_modules))
        raise ConfigError(
            f"lora.targets names {', '.join(odd)}, which peft takes for the experts of this mixture. Leave them out; "
            "lora.parameters: experts is for those."
        )
    config.target_modules = set(read.target_modules)
    return config


def unreached(model: PeftModel) -> tuple[float, list[str]]:
    """The share of a model's layers that its adapter does not change, and what these weights are called.

    Counted are matrices and stacked weights; neither embeddings and head, nor vectors such as norms.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    reached = {
        id(getattr(part.get_base_layer(), getattr(part, "parameter_name", "weight")))
        for part in model.modules()
        if isinstance(part, LoraLayer)
    }
    base = model.get_base_model()
    outside = {
        id(weight) for part in base.modules() if isinstance(part, torch.nn.Embedding) for weight in part.parameters()
    }
    outside |= {id(weight) for weight in base.get_output_embeddings().parameters()}
    sizes = {True: 0, False: 0}
    names = set()
    for name, weight in base.named_parameters():
        if weight.dim() > 1 and id(weight) not in outside and not re.search(r"\.lora_|bias$", name):
            sizes[id(weight) in reached] += weight.numel()
            if id(weight) not in reached:
                names.add(short_name(name).replace("base_layer.", ""))
    return sizes[False] / max(1, sum(sizes.values())), sorted(names)


def to_fp32_masters(model: torch.nn.Module) -> None:
    """Hold every trainable parameter in float32.

    Adam's updates at small learning rates are below bf16's resolution (8 bits): they would round to zero.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


@contextlib.contextmanager
def reference(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The same model as the reference π_ref, for the length of the block.

    Adapters are off; or, where training continues from an adapter, its frozen copy "ref" is on. A
    model without adapters is its own reference.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield model
    elif REFERENCE in model.peft_config:
        before = model.active_adapter
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter(before)
    else:
        with model.disable_adapter():
            yield model


def is_reference(model: PeftModel) -> bool:
    """Whether the policy's weights still make it the reference: it is idle, or equal to the copy "ref"."""
    import torch

    if REFERENCE not in model.peft_config:
        return is_idle(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        before, policy, after = name.partition(f".{POLICY}")
        if not policy or not parameter.requires_grad:
            continue
        twin = parameters.get(f"{before}.{REFERENCE}{after}")
        if twin is None or not torch.equal(twin.to(parameter), parameter):
            return False
    return True


def is_idle(model: PeftModel) -> bool:
    """Whether the policy's adapter changes nothing yet: of each product BA the factor that begins at zero is zero, and
    whole modules are as the base has them. False of adapters other than LoRA, about which nothing is known here."""
    import torch

    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        before, policy, after = name.partition(f".{POLICY}")
        if not policy:
            continue
        above, _, part = before.rpartition(".")
        if part in ("lora_B", "lora_embedding_A"):
            if parameter.any():
                return False
        elif part == "modules_to_save":
            twin = parameters.get(f"{above}.original_module{after}")
            if twin is None or not torch.equal(twin.to(parameter), parameter):
                return False
        elif part not in ("lora_A", "lora_embedding_B", "lora_magnitude_vector"):
            return False
    return True


def frozen_name(name: str) -> str:
    """Of a policy's parameter the name that its frozen copy has; another parameter's name stays."""
    return f"{name}.".replace(f".{POLICY}.", f".{REFERENCE}.")[:-1]  # those of embeddings end in the adapter's name


def drop_idle_copy(model: PeftModel) -> None:
    """Remove the frozen copy "ref" of an adapter that changes nothing yet: the reference is the base itself.

    TRL copies every adapter that it is handed. The copy costs memory and time, and gives one and the same reference
    another name with each rank and seed, so that none of its stored log-probabilities would be found again.
    """
    if REFERENCE in model.peft_config and is_idle(model):
        model.delete_adapter(REFERENCE)


def detach(model: PeftModel) -> PreTrainedModel:
    """Take all adapters off again: the base as it was before any was put on, the same object."""
    own = {name: part.original_module for name, part in copies_of(model).items()}
    base: PreTrainedModel = model.unload()
    for name, part in own.items():  # in whose places peft leaves the adapter's copies
        base.set_submodule(name, part)
    if not hasattr(base, "_hf_hook"):  # an offloading hook of accelerate sits on the forward, too, and stays
        vars(base).pop("forward", None)  # TRL leaves its own there, one around the other with each training
    base.gradient_checkpointing_disable()
    hooks = base.get_input_embeddings()._forward_hooks
    for number, hook in list(hooks.items()):
        # For checkpointing, TRL and peft each add one, and transformers remembers only the last to remove it.
        if hook.__name__.startswith("make_inputs_require_grad"):
            del hooks[number]
    for handle in ("_require_grads_hook", "_require_grads_hooks"):
        vars(base).pop(handle, None)
    base.config.use_cache = True  # TRL switches it off for training
    base.requires_grad_(False)
    base.eval()
    return base


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel (adapters stay in its layers), or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last name parts of the model's linear layers, without the head: what `targets` may name."""
    import torch

    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return sorted(names - {"lm_head"})
