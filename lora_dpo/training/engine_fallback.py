"""When TRL's own passes must run: what a trainer's settings say, what a batch says, and what the first batch shows.

The engine computes what stock TRL computes. Where it could not, one of these checks finds it: of the set-up, when the
trainer is made; of each batch's form, when it comes; and of the log-probabilities themselves, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_dpo.engine import unsupported_reason
from lora_dpo.engine.rope import shared_rope_limit
from lora_dpo.errors import ConfigError
from lora_dpo.model.lora import base_of
from lora_dpo.model.visiting import visiting_of
from lora_dpo.model.whole_parts import copies_of

if TYPE_CHECKING:
    import trl

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest mean |log-ratio| per answer token at step 0 that still counts as equal, by compute dtype."""


KNOWN = frozenset({"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"})
"""Parts of TRL's batch of pairs."""

STEPS = ("compute_loss", "_compute_loss", "compute_ref_log_probs")
"""TRL's methods in whose place the engine works: a subclass that has its own wants it called."""


def no_engine_because(trainer: trl.DPOTrainer, own: type) -> str | None:
    """Why a trainer's set-up needs TRL's own passes, or None.

    Args:
        own: the class whose methods the engine knows; what a subclass of it changes, it does not.
    """
    args = trainer.args
    if trainer._is_vision_dataset:
        return "the data holds images"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "the model is sharded by DeepSpeed or FSDP"
    if trainer.ref_model is not None:
        return "the reference is a second model"
    if args.activation_offloading:
        return "activation_offloading hooks into the same places"
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha draws noise by the length of each row, and a stream has no rows"
    if args.torch_compile or any(part._compiled_call_impl is not None for part in trainer.model.modules()):
        return "the model is compiled (torch.compile), and each step's stream has another length"
    if "lomo" in str(getattr(args.optim, "value", args.optim)):
        return f"{args.optim} updates the weights within the backward pass"
    if trainer.use_weighting and "sft" in trainer.loss_types:
        return "TRL weights the sft loss (use_weighting) in place, which batches of one pair alone can take"
    if trainer.aux_loss_enabled:
        return (
            f"the router's auxiliary loss counts (router_aux_loss_coef {trainer.router_aux_loss_coef:g}), which is of "
            "TRL's batches"
        )
    own_steps = [name for name in STEPS if getattr(type(trainer), name) is not getattr(own, name)]
    own_steps += [name for name in STEPS if name in vars(trainer)]
    if own_steps:
        return f"{type(trainer).__name__} has its own {own_steps[0]}"
    return _adapter_reason(trainer.model) or _base_reason(trainer) or unsupported_reason(base_of(trainer.model))


def refuse_whole_weights(model: PeftModel) -> None:
    """Raise `ConfigError` for an adapter that was made of weights which were away, or changes them."""
    if visiting_of(base_of(model)) is None:
        return
    parts = {
        "DoRA": any(getattr(part, "lora_magnitude_vector", None) for part in model.modules()),
        "modules_to_save": bool(copies_of(model)),
        "adapters on experts (lora.parameters)": any(type(part).__name__ == "ParamWrapper" for part in model.modules()),
    }
    if odd := [name for name, found in parts.items() if found]:
        raise ConfigError(
            f"The base's weights visit the device (model.stream), and the adapter has {odd[0]}, which needs them all "
            "the time. Set model.stream to off, or leave that out."
        )


def _adapter_reason(model: Any) -> str | None:
    if not isinstance(model, PeftModel):
        return "the whole model is trained, not an adapter"
    for adapter in model.peft_config.values():
        if not isinstance(adapter, LoraConfig) or getattr(adapter, "alora_invocation_tokens", None):
            return f"the adapter is of another kind than LoRA ({type(adapter).__name__})"
        if adapter.bias != "none":
            return "the adapter trains biases of the base, which then is no fixed reference"
        if adapter.layer_replication:
            return "layer_replication runs layers of the base more than once"
    return None


def _base_reason(trainer: trl.DPOTrainer) -> str | None:
    for parameter in trainer.model.parameters():
        if type(parameter).__name__ == "Int8Params":
            return "8-bit layers of bitsandbytes compute a row by what is beside it, and otherwise in evaluation"
        if is_traceable_wrapper_subclass(parameter.data):
            return f"its weights are of the type {type(parameter.data).__name__}"
    return _rope_reason(base_of(trainer.model).config, trainer.args.max_length)


def _rope_reason(config: Any, max_length: int | None) -> str | None:
    """Rotary frequencies that change with the longest row of a call are those of the pair's own rows up to a limit."""
    found = shared_rope_limit(config)
    if found is None or (max_length is not None and max_length <= found[1]):
        return None
    kind, limit = found
    return (
        f"its rotary embedding ({kind}) depends on the longest row of a batch beyond {limit} tokens, and max_length is "
        f"{max_length}"
    )


def unsupported_batch(inputs: dict[str, Any], *, weighted: bool) -> str | None:
    """Why a batch cannot be laid out as a stream of pairs, or None.

    Args:
        weighted: whether a `pair_weight` may be in it.
    """
    known = KNOWN | {"pair_weight"} if weighted else KNOWN
    if inputs.keys() - known:
        return f"the data collator adds {', '.join(sorted(inputs.keys() - known))}"
    missing = {"input_ids", "attention_mask", "completion_mask"} - inputs.keys()
    if missing:
        return f"the data collator leaves out {', '.join(sorted(missing))}"
    mask_RT, answers_RT = inputs["attention_mask"].bool(), inputs["completion_mask"].bool()
    if len(mask_RT) % 2 or mask_RT.dim() != 2:
        return "the batch is not made of pairs of rows"
    # one answer to wait for on a GPU, not three
    right = mask_RT[:, 0].all() & (mask_RT[:, 1:] <= mask_RT[:, :-1]).all()
    right &= ~(answers_RT & ~mask_RT).any()
    return None if right else "the data collator pads elsewhere than at the end of the rows"
