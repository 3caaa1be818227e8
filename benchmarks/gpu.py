"""The same comparison on a GPU, with randomly initialised Llama architectures of 1B and 8B in NF4.

    python benchmarks/gpu.py --size 1b --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --size 8b

Speed does not depend on the weights' values, so no large model has to be downloaded; the tokenizer is that of the
quickstart's model, which is fetched if it is not here. Each variant gets a model of its
own, so the card has to hold three of them: for 8B that is 24 GB and more.
"""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import bench
import torch
from rich.console import Console
from shapes import SHAPES, draw
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_dpo.model.packaged import fetch_model

SIZES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
}


def random_nf4(size: str, device: str = "cuda") -> Any:
    """A random Llama of that size on the device, its linear layers quantised one by one as they are made."""
    import bitsandbytes

    config = LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=5e5,
        tie_word_embeddings=size == "1b", torch_dtype=torch.bfloat16, **SIZES[size],
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, torch.nn.Linear) and part is not model.lm_head:
                packed = bitsandbytes.nn.Linear4bit(
                    part.in_features, part.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                values = torch.randn(part.out_features, part.in_features, dtype=torch.bfloat16) * 0.02
                packed.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
                setattr(parent, name, packed.to(device))
    for part in model.modules():  # what is left on the meta device: embeddings, norms, the head
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
                setattr(part, name, torch.nn.Parameter(drawn, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False).eval()


def main(device: str = "cuda") -> None:
    parser = bench.options_parser()
    parser.description = __doc__
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.set_defaults(pairs=64, rounds=3, quantize="nf4", dtype="bfloat16")
    options = parser.parse_args()
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This script measures a GPU, and there is none here. On a CPU: make bench")
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("smollm2-135m"))  # only for its pad token
    made = lambda: SimpleNamespace(model=random_nf4(options.size, device), tokenizer=tokenizer)  # noqa: E731
    bench.bases = lambda _: (made, made)
    options.model = f"random Llama {options.size}"
    for shape in options.shape or SHAPES:
        rows = draw(SHAPES[shape], options.pairs, vocabulary=40000)
        title = f"{SHAPES[shape].title}: {len(rows)} pairs in steps of {options.batch}, {options.model}"
        bench.compare(options, shape, title, rows, Console())
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
