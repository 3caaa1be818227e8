"""TRL's settings: `trl dpo`, `trl kto` and `trl sft`, their YAML, and scripts that use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dpo.config.foreign.shared import (
    HF_DEFAULTS,
    LOUD,
    PEFT_TARGETS,
    QUIET,
    base,
    dropout,
    full,
    held_out,
    hub_source,
    lora,
    quantised,
    reasons,
    sources,
    targets,
    training,
)
from lora_dpo.config.foreign.translation import Translation

TOOL = "TRL"
RATES = {"dpo": 1e-6, "kto": 1e-6, "sft": 2e-5}

_QUIET = reasons(
    {
        "what a row means is found by its columns": ("columns", "dataset_text_field", "dataset_kwargs"),
        "it is for other tasks": ("lora_task_type", "task_type"),
        "it is for several devices": ("ignore_bias_buffers", "bnb_4bit_quant_storage"),
        "model.dtype says what is computed in": ("bf16", "fp16", "bnb_4bit_compute_dtype", "torch_dtype"),
        "references are kept by themselves": ("precompute_ref_log_probs", "precompute_ref_batch_size"),
        "no bias is trained": ("bias",),
    }
)  # fmt: skip
_LOUD = reasons(
    {
        "it is another tool's": ("env",),
        "set it with an environment variable before the command": ("model_init_kwargs",),
        "the chat template is the base's own": ("chat_template_path", "eos_token", "pad_token"),
    }
)  # fmt: skip


def translate(given: Mapping[str, Any], *, method: str) -> Translation:
    """Its settings as those of a recipe.

    Args:
        method: dpo, kto or sft.

    Raises:
        ConfigError: a value of the wrong kind.
    """
    t = Translation(TOOL, given)
    if method != "dpo":
        t.put("method", method, f"trl {method}")
    _model(t)
    _data(t)
    if not t.switch("use_peft"):
        full(t, "use_peft", False)
    lora(t, rank="lora_r", alpha="lora_alpha", dora="use_dora", rslora="use_rslora")
    for name, value in (("lora.rank", 16), ("lora.alpha", 32)):
        if not t.has(name):
            t.put(name, value, f"{TOOL}'s default")
    names = t.names("lora_target_modules")
    if names:
        targets(t, names, "lora_target_modules")
    else:
        t.put("lora.targets", PEFT_TARGETS, "peft's default")
        t.change("lora_target_modules", "it is not set: these are what peft takes in Llama, Mistral, Qwen and Gemma")
    if method == "sft":  # elsewhere all dropout is off
        t.left.setdefault("lora_dropout", 0.05)
    dropout(t, "lora_dropout")
    loss(t, method)
    training(t, {**HF_DEFAULTS, "learning_rate": RATES[method], "max_length": 1024})
    t.leftovers({**QUIET, **_QUIET}, {**LOUD, **_LOUD})
    return t


def loss(t: Translation, method: str) -> None:
    """Losses and their weights: TRL's own names are those of a recipe."""
    if method == "dpo":
        losses = t.names("loss_type") or None
        t.put("trainer.loss_type", losses or ["sigmoid"], "loss_type" if losses else "TRL's default")
        weights = t.take("loss_weights")
        if weights is not None:
            t.put("trainer.loss_weights", weights if isinstance(weights, list) else [weights], "loss_weights")
    if method != "sft" and "beta" in t.left:
        t.put("trainer.beta", t.number("beta"), "beta")


def _model(t: Translation) -> None:
    base(t, revision="model_revision")
    dtype = t.take("dtype")
    if dtype in ("float32", "bfloat16", "float16"):
        t.put("model.dtype", dtype, "dtype")
    if t.switch("load_in_4bit"):
        quantised(t, 4, "load_in_4bit")
        kind = t.take("bnb_4bit_quant_type", "nf4")
        if kind != "nf4":
            t.miss("bnb_4bit_quant_type", "4 bits are NF4 here", value=kind, loud=True)
        if not any([t.switch("use_bnb_nested_quant"), t.switch("bnb_4bit_use_double_quant")]):
            t.change("load_in_4bit", "with double quantisation, as use_bnb_nested_quant: the scales are in 8 bits, too")
    elif t.switch("load_in_8bit"):
        quantised(t, 8, "load_in_8bit")
    else:
        quantised(t, None, "no load_in_4bit")
    for name in ("load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"):
        t.take(name)


def _data(t: Translation) -> None:
    mixture = t.take("datasets")
    name, config = t.take("dataset_name"), t.take("dataset_config")
    train, test = t.take("dataset_train_split", "train"), t.take("dataset_test_split", "test")
    if isinstance(mixture, list) and mixture:
        entries = [entry for entry in mixture if isinstance(entry, dict) and entry.get("path")]
        sources(t, [_of_mixture(t, entry) for entry in entries], "datasets")
    elif name is not None:
        sources(t, [hub_source(str(name), config=config, split=train)], "dataset_name")
        if t.left.get("eval_strategy") not in (None, False, "no"):
            t.put("data.eval", hub_source(str(name), config=config, split=test), "dataset_test_split")
    held_out(t, "test_split_size")


def _of_mixture(t: Translation, entry: Mapping[str, Any]) -> str:
    if entry.get("fraction") is not None:
        text = "sources are read whole: lora-dpo data mix A:0.7 B:0.3 mixes them"
        t.miss("datasets.fraction", text, value=entry["fraction"], loud=True)
    files = entry.get("data_files")
    if isinstance(files, str) and entry["path"] in ("json", "csv", "parquet"):
        return files
    if files is not None:
        t.miss("datasets.data_files", "a data set of the hub is read whole", value=files, loud=True)
    return hub_source(str(entry["path"]), config=entry.get("name"), split=entry.get("split"))
