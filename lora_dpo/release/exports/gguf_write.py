"""GGUF files: a whole model, or a LoRA adapter for one. Written tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.peft_files import read_adapter, weights
from lora_dpo.errors import AdapterError, ModelError
from lora_dpo.release.exports.gguf_arch import Arch, add_numbers, arch_of, extra_tensors, head_count, lay_out, permute
from lora_dpo.release.exports.gguf_vocab import add_vocabulary
from lora_dpo.release.merged_weights import Merged
from lora_dpo.text import plain

if TYPE_CHECKING:
    import numpy as np
    import torch

KINDS = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
"""Types of weights that the `gguf` package can write, with llama.cpp's name of such a file."""

OnTensor = Callable[[int, int], None]


def write_model(
    merged: Merged,
    target: Path,
    *,
    kind: str,
    tokenizer: Any,
    stops: list[int],
    name: str,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write a model as one GGUF file, its matrices as `kind`.

    Norms and biases stay float32. In the 4- and 5-bit kinds the embedding and the head are q8_0, and a matrix whose
    rows are no multiple of the block is f16.

    Raises:
        ModelError: an architecture, tokenizer or setting that llama.cpp has no equal for.
    """
    import gguf
    import numpy as np

    config = merged.config
    arch = arch_of(config, merged.base)
    names = gguf_names(arch, config, list(merged.shapes))
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch.gguf]])
    writer.add_type("model")
    if "</s>" in tokenizer.get_vocab() or not re.search(r"phi-?3", name, re.IGNORECASE):
        writer.add_name(name)  # from such a name llama.cpp concludes that there is a token "</s>", and fails without
    add_numbers(writer, arch, config)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = next(shape[0] for key, shape in merged.shapes.items() if key.endswith("embed_tokens.weight"))
    add_vocabulary(writer, merged.path, tokenizer, size=rows, stops=stops)
    types = {key: _type_of(key, shape, kind) for key, shape in merged.shapes.items()}
    for key, shape in merged.shapes.items():
        _announce(writer, names[key], shape, types[key])
    extra = extra_tensors(config)
    for key, values in extra.items():
        _announce(writer, key, (len(values),), gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (key, tensor) in enumerate(merged.tensors(), start=1):
        writer.write_tensor_data(_packed(lay_out(arch, config, key, tensor), types[key], key))
        if on_tensor:
            on_tensor(number, len(merged.shapes))
    for values in extra.values():
        writer.write_tensor_data(np.array(values, dtype=np.float32))
    writer.close()


def write_adapter(adapter: Path, merged: Merged, target: Path, *, kind: str, name: str) -> None:
    """Write a LoRA adapter as one GGUF file, for `llama.cpp --lora` and Ollama's ADAPTER.

    llama.cpp multiplies by alpha / rank, with one alpha for all: other scales (rsLoRA, patterns) are folded into B. A
    matrix whose rows are no multiple of the kind's block (B of a small rank) is f16.

    Raises:
        AdapterError: DoRA, saved modules, embeddings or a tied head, which the format has no place for.
    """
    import gguf

    config, tensors = read_adapter(adapter)
    reason = (
        ("DoRA" if config.dora else "")
        or ("stacked weights of experts" if config.parameters else "")
        or ("whole saved modules" if tensors.saved else "")
        or ("embeddings" if any(lora.embedding for lora in tensors.lora.values()) else "")
        or ("a head that the base has in one with its embeddings" if merged.untied else "")
    )
    if reason:
        raise AdapterError(
            f"{adapter} uses {reason}, which a GGUF adapter cannot hold. Export the merged model: --to gguf."
        )
    arch = arch_of(merged.config, merged.base)
    names = gguf_names(arch, merged.config, [f"{module}.weight" for module in tensors.lora])
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch.gguf]])
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config.alpha)
    found = dict(weights(adapter))
    for module, lora in tensors.lora.items():
        a, b = found[lora.a.name].float(), found[lora.b.name].float()
        b = b * (config.scale_of(module, lora.rank) * lora.rank / config.alpha)
        heads = head_count(merged.config, module) if arch.permuted else None
        for part, tensor in (("lora_a", a), ("lora_b", permute(b, heads) if heads else b)):
            type_ = _type_of(module, tuple(tensor.shape), kind)
            writer.add_tensor(f"{names[module + '.weight']}.{part}", _packed(tensor, type_, module), raw_dtype=type_)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_names(arch: Arch, config: Any, keys: list[str]) -> dict[str, str]:
    """transformers' parameter names to llama.cpp's. Raises `ModelError` for one that it has no name for."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.gguf], config.num_hidden_layers)
    found = {key: table.get_name(key, try_suffixes=(".weight", ".bias")) for key in keys}
    for key, name in found.items():
        if name is None:
            raise ModelError(f"llama.cpp has no tensor for {plain(key)} in this architecture.")
    return {key: str(name) for key, name in found.items()}


def _type_of(key: str, shape: tuple[int, ...], kind: str) -> Any:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    if kind[:2] in ("q4", "q5") and key.endswith(("embed_tokens.weight", "lm_head.weight")):
        wanted = GGMLQuantizationType.Q8_0
    block, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % block else wanted


def _announce(writer: Any, name: str, shape: tuple[int, ...], type_: Any) -> None:
    """Tell the writer of a tensor that comes later. Quantised ones are announced as the bytes that they become."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape

    block, size = GGML_QUANT_SIZES[type_]
    items = int(np.prod(shape))
    if type_ in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.float32 if type_ == GGMLQuantizationType.F32 else np.float16
        writer.add_tensor_info(name, shape, np.dtype(dtype), items * size)
    else:
        packed = quant_shape_to_byte_shape(shape, type_)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), items // block * size, raw_dtype=type_)


def _packed(tensor: torch.Tensor, type_: Any, key: str) -> np.ndarray[Any, Any]:
    import numpy as np
    from gguf import quantize

    packed: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(tensor.float().numpy()), type_)
    if packed.dtype == np.float16 and not np.isfinite(packed).all():
        raise ModelError(f"{plain(key)} does not fit into f16 (a value overflows). Use --type bf16 or f32.")
    return packed
