"""Quantised weights: which layers have them, what values they stand for, and those values held in their place.

W̃ = dequantise(quantise(W))   NF4 with double quantisation: Dettmers et al. 2023, section 3
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ModelError
from lora_dpo.model.stored_form import BITSANDBYTES, DEQUANTISED, StoredForm
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_dpo.model.tensor_file import Looks


_EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2")
_EIGHT_BITS = ("I8", "U8", *_EIGHT_BIT_FLOATS)


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


def nf4_config(compute: torch.dtype) -> Any:
    """What transformers is told to load weights as NF4."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


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
            plain.weight = torch.nn.Parameter(weight_value(part).to(compute), requires_grad=False)
            plain.bias = part.bias
            model.set_submodule(name, plain)


def weight_value(layer: Any) -> torch.Tensor:
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
        ModelError: as `stored_shape`.
    """
    weight = read(name)
    kind, _ = _arrangement(lambda key: _looks(read(key)), read, name, names)
    if kind in ("nf4", "fp4"):
        return _four_bit_value(weight, {key: read(key) for key in _beside(name, kind) if key in names})
    if kind == "int8":
        return weight.float() * (read(f"{name.removesuffix('.weight')}.SCB").float() / 127)[:, None]
    if kind == "fp8":
        return _eight_bit_float_value(weight, read(f"{name}_scale_inv"))
    return weight


def stored_shape(
    looks: Callable[[str], Looks], read: Callable[[str], torch.Tensor], name: str, names: Collection[str]
) -> tuple[int, ...]:
    """The shape of what a weight stands for, of which nothing is read.

    Args:
        looks: gives the type and the shape of a stored tensor by its name.
        read: as for `stored_value`; small tensors alone are read.

    Raises:
        ModelError: 8-bit numbers without their scales, or with scales in an arrangement that is not read here.
    """
    return _arrangement(looks, read, name, names)[1]


def is_quantised(name: str, names: Collection[str]) -> bool:
    """Whether what a weight stands for is computed of several tensors of a checkpoint."""
    module = name.removesuffix(".weight")
    four_bits = (f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    return any(key in names for key in (*four_bits, f"{module}.SCB", f"{name}_scale_inv"))


def _arrangement(
    looks: Callable[[str], Looks], read: Callable[[str], torch.Tensor], name: str, names: Collection[str]
) -> tuple[str, tuple[int, ...]]:
    """How a weight is stored, "" for plain, and the shape of its value."""
    for kind in ("nf4", "fp4"):
        if (state := f"{name}.quant_state.bitsandbytes__{kind}") in names:
            return kind, tuple(json.loads(bytes(read(state).tolist()).decode())["shape"])
    dtype, shape = looks(name)
    scales, module = f"{name}_scale_inv", name.removesuffix(".weight")
    kind, fits = "", dtype not in _EIGHT_BITS
    if f"{module}.SCB" in names:
        turned = f"{module}.weight_format" in names and read(f"{module}.weight_format").item() != 0
        kind, fits = "int8", dtype == "I8" and not turned and looks(f"{module}.SCB")[1] == shape[:1]
    elif scales in names:  # an int8 that has them is two 4-bit numbers
        kind, fits = "fp8", dtype in _EIGHT_BIT_FLOATS and _tiles(looks(scales)[1], shape)
    if not fits:
        raise ModelError(
            f"{plain(name)} is stored in an arrangement of 8-bit weights that is not read here. Name the model's "
            "16-bit original instead."
        )
    return kind, shape


def _looks(tensor: torch.Tensor) -> Looks:
    import torch

    eight = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    return eight.get(tensor.dtype, "other"), tuple(tensor.shape)


def _tiles(scales: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether there is one scale, or one for each block of a matrix, or of each of several stacked ones."""
    if all(side == 1 for side in scales):
        return True
    alike = len(scales) == len(shape) > 1 and scales[:-2] == shape[:-2]
    return alike and all(scale <= side for scale, side in zip(scales[-2:], shape[-2:], strict=True))


def _beside(name: str, kind: str) -> tuple[str, ...]:
    """What bitsandbytes stores beside a 4-bit weight."""
    ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"quant_state.bitsandbytes__{kind}")
    return tuple(f"{name}.{end}" for end in ends)


def _four_bit_value(packed: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict(dict(beside), device=torch.device("cpu"))
    state.dtype = torch.float32
    value: torch.Tensor = dequantize_4bit(packed.contiguous().view(torch.uint8).reshape(-1, 1), state)
    return value.reshape(state.shape)


def _eight_bit_float_value(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W[i, j] · s[i / b, j / b] of blocks of b, or s alone for the whole weight; of stacked matrices for each."""
    import torch

    exponents = scale.dtype == torch.uint8  # of MXFP8: s = 2^(byte - 127)
    scale = (scale.float() - 127).exp2() if exponents else scale.float()
    if scale.numel() > 1:
        for side in (-2, -1):
            block = block_side(weight.shape[side], scale.shape[side])
            scale = scale.repeat_interleave(block, dim=side).narrow(side, 0, weight.shape[side])
    return weight.float() * scale


def block_side(side: int, scales: int) -> int:
    """Numbers along a side that share a scale: blocks are powers of two, and the last one may be cut."""
    return 1 << (-(-side // scales) - 1).bit_length()
