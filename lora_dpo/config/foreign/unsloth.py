"""Unsloth's settings: the YAML and command lines of its own trainer, which is SFT, and scripts with TRL's trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dpo.config.foreign.shared import (
    HF_DEFAULTS,
    LOUD,
    QUIET,
    base,
    dropout,
    full,
    hub_source,
    lora,
    quantised,
    reasons,
    sources,
    targets,
    training,
)
from lora_dpo.config.foreign.translation import Translation
from lora_dpo.config.foreign.trl import loss

TOOL = "Unsloth"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What it adapts where nothing is said."""
SCRIPT_DEFAULTS: dict[str, Any] = {
    **HF_DEFAULTS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 0.1,
    "max_length": 1024,
    "weight_decay": 0.001,
    "optim": "adamw_8bit",
    "seed": 3407,
}
"""What it puts into TRL's config classes."""
OWN_DEFAULTS: dict[str, Any] = {
    **HF_DEFAULTS,
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "max_length": 2048,
    "weight_decay": 0.01,
    "seed": 3407,
}
"""Those of its own trainer."""
NAMES = {
    "model_name": "model_name_or_path",
    "model": "model_name_or_path",
    "r": "lora_r",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "random_seed": "seed",
    "random_state": "seed",
}

_QUIET = reasons(
    {
        "every run saves checkpoints and the adapter; lora-dpo merge and export make the rest": (
            "save_model", "save_path", "save_method", "quantization", "save_gguf", "push_gguf", "push_model",
        ),
        "what a row means is found by its columns": ("format_type", "dataset_text_field"),
        "a good answer is what is trained on": ("train_on_completions",),
        "the base is text alone": (
            "vision_all_linear", "finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules",
            "finetune_mlp_modules", "is_vision",
        ),
        "it is for answers while training": ("fast_inference", "gpu_memory_utilization", "float8_kv_cache"),
        "model.dtype says what is computed in": ("bf16", "fp16"),
        "no bias is trained": ("bias",),
        "what is loaded is decided by the base's own files": ("fix_tokenizer", "tokenizer_name", "max_lora_rank"),
    }
)  # fmt: skip
_LOUD = reasons({"it is read as plain text, and there is no counterpart": ("raw_text_file", "chunk_size", "stride")})


def translate(given: Mapping[str, Any], *, method: str, own: bool) -> Translation:
    """Its settings as those of a recipe.

    Args:
        given: without sections: their names do not overlap.
        method: dpo, kto or sft.
        own: they are those of its own trainer, not arguments of a script.

    Raises:
        ConfigError: a value of the wrong kind.
    """
    t = Translation(TOOL, given)
    if method != "dpo":
        t.put("method", method, "its trainer" if own else f"{method.upper()}Trainer")
    t.rename({name: ours for name, ours in NAMES.items() if ours not in t.left})
    for name in ("random_state", "max_steps", "save_steps"):
        if name == "random_state" or t.left.get(name) == 0:
            t.take(name)  # of the adapter's start, beside a seed; and 0 means that they are not set
    _model(t, own)
    _data(t)
    _adapter(t, own)
    loss(t, method)
    _lengths(t)
    training(t, OWN_DEFAULTS if own else SCRIPT_DEFAULTS)
    t.leftovers({**QUIET, **_QUIET}, {**LOUD, **_LOUD})
    return t


def _model(t: Translation, own: bool) -> None:
    base(t, revision="revision")
    name = str(t.settings["model"]["name"])
    silent = "load_in_4bit" not in t.left
    four, eight = silent or bool(t.left.get("load_in_4bit")), bool(t.left.get("load_in_8bit"))
    origin = f"{TOOL}'s default" if silent else "load_in_4bit"
    t.take("load_in_4bit")
    if name.lower().endswith(("-bnb-4bit", "-4bit")):
        t.put("model.quantize", "none", origin)
        t.change("load_in_4bit", f"{name} is stored in 4 bits: as stored, with quantize: none")
    else:
        quantised(t, 4 if four else 8 if eight else None, origin)
    t.take("load_in_8bit")
    dtype = t.take("dtype")
    if dtype in ("float32", "bfloat16", "float16"):
        t.put("model.dtype", dtype, "dtype")
    if str(t.take("training_type", "lora")) == "full":
        full(t, "training_type", "full")
    if t.switch("full_finetuning"):
        full(t, "full_finetuning", True)


def _adapter(t: Translation, own: bool) -> None:
    silent = {name for name in ("lora_r", "lora_alpha") if name not in t.left}
    t.left = {"lora_r": 64 if own else 16, "lora_alpha": 16, **t.left}
    lora(t, rank="lora_r", alpha="lora_alpha", dora="use_dora", rslora="use_rslora")
    for name, key in (("lora_r", "lora.rank"), ("lora_alpha", "lora.alpha")):
        if name in silent:
            t.origins[key] = f"{TOOL}'s default"
    names = t.names("target_modules")
    targets(t, names or LAYERS, "target_modules" if names else f"{TOOL}'s default")
    layers = t.take("layers_to_transform")
    if layers is not None:
        t.put("lora.layers", layers, "layers_to_transform")
    last = t.take("finetune_last_n_layers")
    if isinstance(last, int) and last > 0:
        t.put("lora.layers", f"top-{last}", "finetune_last_n_layers")
    dropout(t, "lora_dropout")
    for name in ("use_gradient_checkpointing", "gradient_checkpointing"):
        value = t.take(name)
        if value in (False, "none", "False"):
            t.put("trainer.gradient_checkpointing", False, name)


def _lengths(t: Translation) -> None:
    """A script may say it twice: to the model, and to the trainer, which decides."""
    most = t.whole("max_seq_length")
    if most is not None and "max_length" not in t.left:
        t.left["max_length"] = most
        t.change("max_seq_length", "trainer.max_length: only answers are cut")
    prompt = t.number("max_prompt_length")
    if prompt is not None:
        t.miss("max_prompt_length", "prompts are never cut: a pair that is too long is cut at its end", value=prompt)


def _data(t: Translation) -> None:
    files, name = t.names("local_dataset"), t.take("dataset")
    found = [*files, *([] if name is None else [hub_source(str(name), split=t.take("split"))])]
    sources(t, found, "local_dataset" if files else "dataset")
