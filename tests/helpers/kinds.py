"""Configurations of transformers' model types, with the settings that matter switched on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

STREAMS = (
    *("llama", "mistral", "ministral", "ministral3", "gemma", "gemma2", "gemma3_text", "gemma4_text"),
    *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    *("phi", "phi3", "olmo", "olmo2", "olmo3", "olmoe", "olmo_hybrid", "smollm3", "gpt_oss", "gpt_neox"),
    *("granite", "granitemoe", "granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "lfm2", "kimi_linear"),
    *("cohere", "cohere2", "glm", "glm4", "exaone4", "hunyuan_v1_dense", "seed_oss", "ernie4_5", "starcoder2"),
    *("mixtral", "helium", "arcee", "apertus", "nanochat", "solar_open"),
)
"""Those of which a small copy runs as a stream of pairs."""
PLAIN = ("minimax", "phimoe")
"""Those that TRL's own passes run: a state that no cache takes, and a router with noise."""
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SETTINGS = {
    "ministral": {"rope_parameters": ROPE, "head_dim": 128},
    "hunyuan_v1_dense": {"rope_parameters": ROPE, "head_dim": 128},
    "seed_oss": {"attention_dropout": 0.0},
    "gemma4_text": {"num_kv_shared_layers": 10},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
}
"""Where the defaults make no model, leave something out, or are noise."""


def skeleton(kind):
    """A model of this type as its configuration's defaults make it, without weights."""
    config = AutoConfig.for_model(kind, **SETTINGS.get(kind, {})).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
