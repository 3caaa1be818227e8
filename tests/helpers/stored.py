"""Tiny checkpoints as people find them: stored in 4 or 8 bits, by several methods."""

import json
import shutil

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BITSANDBYTES = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "nf4-bf16": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16),
    "nf4-kept": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj"]),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}


def bitsandbytes(folder, target, kind):
    """A copy of a model folder as bitsandbytes stores it, of bfloat16 weights as people's are."""
    how = BITSANDBYTES[kind]
    how = {**how, "bnb_4bit_compute_dtype": torch.bfloat16} if "load_in_4bit" in how else how
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**how)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def eight_bit_floats(folder, target, block=32):
    """A copy whose linear weights are E4M3 numbers with a scale for each block, as DeepSeek's and Qwen's are."""
    shutil.copytree(folder, target)
    found = load_file(target / "model.safetensors")
    for name in [name for name in found if name.endswith("_proj.weight")]:
        blocks = found[name].float().unfold(0, block, block).unfold(1, block, block)
        scales = blocks.abs().amax(dim=(2, 3)) / 448
        codes = (blocks / scales[:, :, None, None]).to(torch.float8_e4m3fn)
        found[name] = codes.permute(0, 2, 1, 3).reshape(found[name].shape).contiguous()
        found[f"{name}_scale_inv"] = scales
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return marked(target, {**how, "modules_to_not_convert": ["lm_head"]})


def bitsandbytes_pieces(folder, target, kind):
    """A copy of a mixture whose experts are quantised one by one ("nf4", "int8"), as older transformers stored them."""
    shutil.copytree(folder, target)
    found = load_file(target / "model.safetensors")
    for name in [name for name in found if name.endswith("_proj.weight")]:
        weight = found[name].to(torch.bfloat16)
        if kind == "int8":
            scales = weight.float().abs().amax(dim=1)
            found[name] = (weight.float() / scales[:, None] * 127).round().to(torch.int8)
            found[f"{name.removesuffix('.weight')}.SCB"] = scales
        else:
            found[name], state = quantize_4bit(weight, quant_type=kind, compress_statistics=True)
            found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
    how = {"load_in_8bit": True} if kind == "int8" else {**four, "bnb_4bit_compute_dtype": "bfloat16"}
    return marked(target, {"quant_method": "bitsandbytes", **how})


def marked(folder, how, target=None):
    """A model folder, or a copy of it, whose config says that its weights are stored so."""
    if target is not None:
        shutil.copytree(folder, target)
    path = (target or folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
    return target or folder


def bfloat16(folder, target, change=None):
    """A copy in bfloat16, whose weights `change` may alter by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if change is not None:
                change(name, weight)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def copies_of(folder, pack=bitsandbytes):
    """Give copies of a model folder by how they are stored, each made once beside it; `pack` makes all but FP8's."""

    def make(kind):
        target = folder.parent / kind
        if not target.exists():
            eight_bit_floats(folder, target) if kind == "fp8" else pack(folder, target, kind)
        return target

    return make
