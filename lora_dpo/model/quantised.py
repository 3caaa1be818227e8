"""Quantised weights: which layers have them, what values they stand for, and those values held in their place.

W̃ = dequantise(quantise(W))   NF4 with double quantisation: Dettmers et al. 2023, section 3
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ModelError
from lora_dpo.model.stored_form import BITSANDBYTES, DEQUANTISED, StoredForm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantised_layers(model: PreTrainedModel, form: StoredForm | None = None) -> dict[str, torch.nn.Module]:
    """The layers that 4-bit loading quantises, by name: linear ones, and GPT-2's Conv1D; never the head.

    Weights that are no layer's own, such as a mixture's stacked experts, are not among them.

    Args:
        model: or its skeleton; packed weights do not matter.
        form: of a checkpoint that came quantised: what its maker left out is left out here, too.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    skipped = [] if form is None else [str(name) for name in form.settings.get("llm_int8_skip_modules") or []]
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear | Conv1D)
        and part is not head
        and ".lora_" not in name
        and not any(_names(pattern, name) for pattern in skipped)
    }


def _names(pattern: str, module: str) -> bool:
    """Whether a name of `llm_int8_skip_modules` means a module, as transformers reads them."""
    module = module.removesuffix(".base_layer")  # an adapter is on it
    return module.endswith(pattern) or re.match(rf"(?:{re.escape(pattern)})(?:\.|$)", module) is not None


def kept_share(model: PreTrainedModel, form: StoredForm | None = None) -> float:
    """Of the weights between embeddings and head, the share that 4-bit loading leaves as they are: 0 to 1.

    Norms and biases count; so does what a checkpoint's maker left out, and a mixture's stacked experts. Of forms that
    are not bitsandbytes' it is not known what they hold: 0.
    """
    if form is not None and form.kind not in BITSANDBYTES:
        return 0.0
    layers = quantised_layers(model, form)
    quantised = sum(_size(part) for part in layers.values())
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    outside |= {id(part.weight) for part in layers.values()}
    names = model.named_parameters()
    kept = sum(weight.numel() for name, weight in names if id(weight) not in outside and "lora_" not in name)
    return kept / (kept + quantised) if kept + quantised else 0.0


def _size(layer: Any) -> int:
    """Weights of a linear layer, also where they are packed."""
    return int(layer.in_features * layer.out_features if hasattr(layer, "in_features") else layer.weight.numel())


def hold_dequantized(model: PreTrainedModel) -> None:
    """Replace each linear weight but the head's by its NF4 value, in place and in the compute dtype.

    The function is that of the packed 4-bit model; no pass has to dequantise again.
    """
    for name, transposed in orientations(model).items():
        weight = model.get_parameter(f"{name}.weight")
        weight.data = nf4_value(weight.data, transposed=transposed)


def orientations(model: PreTrainedModel, form: StoredForm | None = None) -> dict[str, bool]:
    """The layers of `quantised_layers`, and whether their weight is `[in, out]`, as GPT-2's Conv1D has it."""
    import torch

    return {name: not isinstance(part, torch.nn.Linear) for name, part in quantised_layers(model, form).items()}


def nf4_value(weight: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """The weight as 4-bit NF4 with double quantisation holds it: what a QLoRA run computes with.

    Args:
        transposed: stored `[in, out]`, as GPT-2's Conv1D: blocks run over the rows of `[out, in]` all the same.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = (weight.T if transposed else weight).contiguous()
    codes, state = quantize_4bit(rows, quant_type="nf4", compress_statistics=True)
    value: torch.Tensor = dequantize_4bit(codes, state).to(weight.dtype).reshape(rows.shape)
    return value.T.contiguous() if transposed else value


def hold_stored_values(model: PreTrainedModel, form: StoredForm, compute: torch.dtype, *, packed: bool) -> None:
    """What was not quantised goes into the compute dtype; so do, unless `packed`, the values of what was.

    transformers leaves both as they are stored. Where nothing packed is left, the model is an ordinary one afterwards.
    """
    for weight in model.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            state.dtype = compute  # bitsandbytes' forward pass computes in this, its backward pass in the stored one
    if form.kind in BITSANDBYTES and not packed:
        _dequantise_layers(model, compute)
    if not packed:
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    if form.kind in (*BITSANDBYTES, *DEQUANTISED):
        for weight in model.parameters():
            if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
                weight.data = weight.data.to(compute)
        model.config.dtype = compute


def _dequantise_layers(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Put ordinary linear layers with the same values in the place of bitsandbytes' own."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, part in list(model.named_modules()):
        if isinstance(part, Linear4bit | Linear8bitLt):
            plain = torch.nn.Linear(part.in_features, part.out_features, bias=part.bias is not None, device="meta")
            plain.weight = torch.nn.Parameter(_value_of(part).to(compute), requires_grad=False)
            plain.bias = part.bias
            model.set_submodule(name, plain)


def _value_of(layer: Any) -> torch.Tensor:
    """What a bitsandbytes layer's weight stands for, `[out, in]`."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit

    if isinstance(layer, Linear4bit):
        value: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return value
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    dequantised: torch.Tensor = int8_vectorwise_dequant(layer.weight.data, scales)
    return dequantised


def stored_value(read: Callable[[str], torch.Tensor], name: str, names: Collection[str]) -> torch.Tensor:
    """What a weight of a checkpoint stands for, whether it is stored plain or quantised by bitsandbytes or in FP8.

    Args:
        read: gives a stored tensor by its name.
        name: the weight's, such as `model.layers.0.mlp.up_proj.weight`.
        names: of all tensors there are.

    Returns:
        `[out, in]`, in float32 where it was quantised.

    Raises:
        ModelError: an arrangement of 8-bit weights that is not read here.
    """
    weight = read(name)
    if any(f"{name}.quant_state.bitsandbytes__{kind}" in names for kind in ("nf4", "fp4")):
        return _four_bit_value(weight, {key: read(key) for key in names if key.startswith(f"{name}.")})
    module = name.removesuffix(".weight")
    if f"{module}.SCB" in names:
        if f"{module}.weight_format" in names and read(f"{module}.weight_format").item() != 0:
            raise ModelError(f"{name} is stored in an arrangement of 8-bit weights that is not read here.")
        return weight.float() * (read(f"{module}.SCB").float() / 127)[:, None]
    if f"{name}_scale_inv" in names:
        return _eight_bit_float_value(weight, read(f"{name}_scale_inv"))
    return weight


def _four_bit_value(packed: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict(dict(beside), device=torch.device("cpu"))
    state.dtype = torch.float32
    value: torch.Tensor = dequantize_4bit(packed.contiguous().view(torch.uint8).reshape(-1, 1), state)
    return value.reshape(state.shape)


def _eight_bit_float_value(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W[i, j] · s[i / b, j / b] of blocks of b, or s alone for the whole weight."""
    scale = scale.float()
    if scale.numel() > 1:
        for side in (0, 1):
            block = -(-weight.shape[side] // scale.shape[side])
            # blocks are powers of two, and the last one may be cut
            scale = scale.repeat_interleave(1 << (block - 1).bit_length(), dim=side).narrow(side, 0, weight.shape[side])
    return weight.float() * scale
