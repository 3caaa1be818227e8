"""A random Qwen3.5 with SmolLM2-135M's sizes and tokenizer, to time a hybrid model's steps with.

    python benchmarks/hybrid_model.py models/hybrid
    python benchmarks/bench.py --model models/hybrid --shape hh --quick

Three layers of four are gated DeltaNet, the fourth is attention, as in Qwen3.5.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from lora_dpo.model.base import load_skeleton, load_tokenizer

LIKE = "smollm2-135m"


def main(folder: Path) -> None:
    sizes = load_skeleton(LIKE).config
    config = Qwen3_5TextConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        linear_num_key_heads=sizes.num_key_value_heads,
        linear_num_value_heads=sizes.num_attention_heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=sizes.pad_token_id,
        bos_token_id=sizes.bos_token_id,
        eos_token_id=sizes.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(LIKE).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
