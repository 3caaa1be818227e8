"""What a decoder layer keeps for its backward pass, a token, read off the modules that are in it.

Shape suffixes as in `cost_model.py`. Modules are known by the names that transformers gives them, sizes are theirs and
not the configuration's, since layers of one model differ.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.model.experts import active_share, expert_weights_of
from lora_dpo.model.plain_lora import plain_adapter

if TYPE_CHECKING:
    import torch

TRIED = 256
"""Tokens on which a recurrent layer is counted: a few chunks of linear attention."""
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
PARTS = {"gate_up_proj": 2, **dict.fromkeys(_FUSED, 3)}
"""How many matrices one of such a name holds."""
_UP = ("fc1", "c_fc", "dense_h_to_4h", "up_proj", "fc_in")
"""What an MLP without a gate calls its first matrix."""


@dataclass(frozen=True)
class AttentionSizes:
    """Heads and widths of a layer's attention; 0 of a layer without."""

    heads: int = 0
    query: int = 0
    """H·D."""
    key: int = 0
    """K·D; 0 where keys are another layer's."""


def attention_sizes(layer: Any, config: Any) -> AttentionSizes:
    """Of the attention that is in a decoder layer.

    Args:
        config: of the whole text model, for what the modules do not say.
    """
    for part in layer.modules():
        inside = dict(part.named_children())
        out = next((inside[name] for name in _OUT if name in inside), None)
        if out is None:
            continue
        fused = next((inside[name] for name in _FUSED if name in inside), None)
        if fused is None and not {"q_proj", "kv_b_proj"} & inside.keys():
            continue
        query = _width_in(out)
        heads = query // _head_width(part, config, query)
        if fused is not None:
            return AttentionSizes(heads, query, max(0, _width_out(fused) - query) // 2)
        if "kv_b_proj" in inside:  # keys and values are made of a few numbers, for each head
            return AttentionSizes(heads, query, query)
        return AttentionSizes(heads, query, _width_out(inside["k_proj"]) if "k_proj" in inside else 0)
    return AttentionSizes()


def layer_token_bytes(layer: Any, config: Any, itemsize: int, *, copies: bool, wide: int | None = None) -> int:
    """Bytes that a token keeps in a layer.

    Args:
        itemsize: of a number in the compute dtype.
        copies: whether each adapter that is not plain casts what it reads.
        wide: bytes of a number between the layers' modules, if another (`stream_itemsize`).
    """
    sizes = attention_sizes(layer, config)
    wide = itemsize if wide is None else wide
    kept: float = (2 * sizes.query + 2 * sizes.key) * itemsize + 4 * sizes.heads
    recurrent = recurrent_modules(layer)
    within = {id(part) for module in recurrent for part in module.modules()}
    kept += sum(recurrent_token_bytes(module, config.hidden_size, itemsize) for module in recurrent)
    bare_input: set[str] = set()
    for path, part in layer.named_modules():
        if id(part) in within:
            continue
        name = path.rpartition(".")[2]
        kept += _module_bytes(name, part, sizes, config, wide)
        if hasattr(part, "lora_A") and "default" in part.lora_A and not hasattr(part, "parameter_name"):
            kept += part.lora_A["default"].out_features * itemsize
            read = part.lora_A["default"].in_features * itemsize
            casts = (copies or wide > itemsize) and plain_adapter(part) is None
            if dora_magnitude(part) is not None:  # its two halves, each of which is scaled: W·x and B·A·x
                kept += _width_out(part) * ((itemsize if copies or name in _OUT else wide) + itemsize)
            own = casts or name in _OUT or type(part.lora_dropout["default"]).__name__ == "Dropout"
            if own:
                kept += read
            elif name != "down_proj" and not hasattr(layer, "input_layernorm"):
                parent = path.rpartition(".")[0]  # the layer's own input, one tensor for all that read it
                kept += 0 if parent in bare_input else read
                bare_input.add(parent)
    return int(kept + _expert_bytes(layer, config, itemsize))


def dora_magnitude(part: Any) -> Any:
    """The magnitudes by which an adapter of DoRA's kind scales its layer's rows; None of other modules."""
    held = getattr(part, "lora_magnitude_vector", None)
    return held["default"] if held and hasattr(part, "lora_A") and "default" in held else None


def stream_itemsize(layers: Sequence[Any], itemsize: int, *, packed: bool) -> int:
    """Bytes of a number of the hidden states: those of the compute dtype, but float32's with DoRA on packed layers.

    Its magnitudes are float32, and so is what peft makes of the product; of an unpacked layer it casts that back.
    """
    scaled = (part for layer in layers for part in layer.modules() if dora_magnitude(part) is not None)
    return 4 if packed and next(scaled, None) is not None else itemsize


def dora_weights(layer: Any) -> list[tuple[int, int, bool]]:
    """Of each adapter of DoRA's kind in a layer: inputs, outputs, and whether it has dropout."""
    return [
        (_width_in(part), _width_out(part), type(part.lora_dropout["default"]).__name__ == "Dropout")
        for part in layer.modules()
        if dora_magnitude(part) is not None
    ]


def merged_sizes(layer: Any) -> list[int]:
    """Elements of each stacked weight with an adapter on it: peft adds B·A to the whole weight, once a pass."""
    parts = [part for part in layer.modules() if hasattr(part, "parameter_name") and "default" in part.lora_A]
    return [part.get_param().numel() for part in parts]


def recurrent_modules(layer: Any) -> list[Any]:
    """Those of a layer that keep a state from token to token."""
    from lora_dpo.engine.forked_states import recurrent_layers

    return recurrent_layers([layer])


def recurrent_token_bytes(module: Any, hidden: int, itemsize: int) -> float:
    """Bytes a token that such a module keeps: counted in a run on tensors without values.

    By transformers' own functions, which keep more than fused kernels do.
    """
    import torch

    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    weights = {id(weight): _without_values(weight, dtype) for weight in module.parameters()}
    buffers = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    bare = copy.deepcopy(module, {**weights, **buffers}).train()
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    hidden_1TE = torch.empty(1, TRIED, hidden, dtype=dtype, device="meta", requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        done = bare(hidden_1TE)
    del done
    return sum(storage.nbytes() for storage in kept.values()) / TRIED


def _without_values(weight: torch.nn.Parameter, dtype: torch.dtype) -> torch.nn.Parameter:
    import torch

    kind = dtype if weight.is_floating_point() and not weight.requires_grad else weight.dtype
    return torch.nn.Parameter(torch.empty_like(weight, device="meta", dtype=kind), weight.requires_grad)


def _module_bytes(name: str, part: Any, sizes: AttentionSizes, config: Any, itemsize: int) -> float:
    """What one module of a layer keeps, a token, beside its adapter."""
    from lora_dpo.engine.fused_layers import is_norm, norm_offset

    kind = type(part).__name__
    if kind.endswith("RMSNorm"):
        weight = getattr(part, "weight", None)
        read = {"q_norm": sizes.query, "k_norm": sizes.key}.get(name) or int(config.hidden_size)
        width = weight.numel() if weight is not None else sizes.query // sizes.heads if name.endswith("_norm") else read
        fused = is_norm(part) and norm_offset(part) is not None
        return norm_bytes(width, max(1, read // width), itemsize, fused=fused)
    if "LayerNorm" in kind:
        return norm_bytes(int(config.hidden_size), 1, itemsize) + 4
    if name in ("gate_up_proj", "input_linear") and hasattr(part, "out_features"):  # what follows is made again
        return _width_out(part) * itemsize
    if name == "gate_proj":
        return 2 * _width_out(part) * itemsize
    if name == "w1":  # LFM2: a gate whose product is not made again
        return 3 * _width_out(part) * itemsize
    if not _has_gate(part):
        # an MLP without a gate keeps what its activation reads and, for the adapter on its second matrix, makes
        return sum(2 * _width_out(up) * itemsize for name, up in part.named_children() if name in _UP)
    return 0


def _has_gate(part: Any) -> bool:
    return any(hasattr(part, name) for name in ("gate_proj", "gate_up_proj", "w1"))


def norm_bytes(width: int, rows: int, itemsize: int, *, fused: bool = False) -> int:
    """What a norm over `width` numbers keeps for each of `rows`; it computes in float32.

    Args:
        fused: whether it is one autograd function (`fused_layers.py`), which keeps no copy in float32.
    """
    return rows * (width * (itemsize + (4 if itemsize < 4 and not fused else 0)) + 4)


def _expert_bytes(layer: Any, config: Any, itemsize: int) -> float:
    """What a mixture keeps: of each expert that a token uses gate and up, their product, and the weighted output.

    For the gradient of an expert with an adapter also what it reads, gathered by experts.
    """
    stacked = expert_weights_of(layer, config)
    down = next((weight for name, weight in stacked.items() if name.endswith("down_proj")), None)
    if down is None:
        return 0
    count = down.shape[0]
    used = active_share(config) * count
    hidden = int(config.hidden_size)
    inner = down.numel() // (count * hidden)
    adapted = {getattr(part, "parameter_name", "") for part in layer.modules()} - {""}
    read = (hidden if adapted - {"down_proj"} else 0) + (inner if "down_proj" in adapted else 0)
    return (used * (3 * inner + hidden + read) + 5 * count) * itemsize


def _width_out(part: Any) -> int:
    """Outputs of a linear layer, adapted or not."""
    return int(getattr(part, "out_features", 0) or getattr(part, "nf", 0) or part.weight.shape[0])


def _width_in(part: Any) -> int:
    return int(getattr(part, "in_features", 0) or part.weight.shape[-1])


def _head_width(part: Any, config: Any, query: int) -> int:
    """Width of a head of this attention; layers of one model may differ in it."""
    width = getattr(part, "head_dim", None) or getattr(part, "v_head_dim", None) or query // config.num_attention_heads
    return int(width)
