"""Axolotl's settings (its YAML): rl: dpo, ipo and kto, and SFT without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dpo.config.foreign.shared import (
    HF_DEFAULTS,
    LOUD,
    QUIET,
    TEMPLATE,
    base,
    columns,
    dropout,
    full,
    half,
    held_out,
    hub_source,
    keywords,
    lora,
    quantised,
    reasons,
    refuse_method,
    sources,
    targets,
    training,
)
from lora_dpo.config.foreign.translation import Translation, written

TOOL = "Axolotl"
DEFAULTS: dict[str, Any] = {
    **HF_DEFAULTS,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "max_length": 512,
}
NAMES = {
    "base_model": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "sequence_len": "max_length",
    "evaluation_strategy": "eval_strategy",
    "dpo_use_weighting": "use_weighting",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
}
"""Its names for what transformers and TRL call otherwise."""
FIELDS = {"field_system": "system", "field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which what was thought before it is read."""

_QUIET = reasons(
    {
        "which class loads the base is decided by its own files": (
            "model_type", "type_of_model", "tokenizer_type", "processor_type", "is_*_derived_model",
            "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model", "is_falcon_derived_model",
            "base_model_config", "tokenizer_use_fast", "tokenizer_legacy", "low_cpu_mem_usage",
            "experimental_skip_move_to_device",
        ),
        "memory is measured, and the engine makes do with what there is": (
            "gpu_memory_limit", "max_memory", "lora_on_cpu", "gc_steps", "gc_collect_steps", "torch_empty_cache_steps",
            "activation_offloading", "layer_offloading", "selective_checkpointing", "tiled_mlp*",
            "auto_find_batch_size",
        ),
        "it is for SFT there": ("train_on_inputs", "roles_to_train", "train_on_eos", "train_on_eot"),
        "references are kept by themselves": ("precompute_ref_log_probs",),
        "it changes nothing that is trained": ("profiler_*", "strict", "is_preprocess", "axolotl_config_path", "debug"),
        "lora-dpo data check --fix removes duplicates": ("dataset_exact_deduplication",),
        "a merge is a command: lora-dpo merge": ("merge_lora", "merge_method"),
    }
)  # fmt: skip
_LOUD = reasons(
    {
        "no plugin of theirs runs here": ("plugins",),
        TEMPLATE: (
            "chat_template_jinja", "eot_tokens", "special_tokens",
        ),
        "set it in a system turn of the rows": ("default_system_message",),
        "the tokenizer is the base's own": ("tokenizer_config",),
        "the base's config stays as it is": ("overrides_of_model_config", "overrides_of_model_kwargs"),
        "the base is loaded, never trained from the start": ("reinit_weights",),
        "learning rates fall as transformers' schedules do (trainer.lr_scheduler_kwargs)": (
            "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_div_factor", "relora*",
            "jagged_restart_*",
        ),
        "a base that is stored quantised is used as it is stored, with quantize: none": (
            "gptq", "model_quantization_config*",
        ),
        "4 bits are NF4 with double quantisation here": ("bnb_config_kwargs",),
        "AdamW and transformers' other optimizers are there (trainer.optim)": ("dion_*", "qgalore_*", "lisa_*"),
        "the loss is the mean over pairs": ("dpo_norm_loss",),
    }
)  # fmt: skip


def translate(given: Mapping[str, Any]) -> Translation:
    """Its settings as those of a recipe.

    Raises:
        ConfigError: a method that is not here, or a value of the wrong kind.
    """
    t = Translation(TOOL, given)
    method = t.take("rl")
    for name in ("reward_model", "process_reward_model", "pretraining_dataset"):
        if t.left.get(name):
            raise refuse_method(t, name, t.left[name])
    if method not in ("dpo", "ipo", "kto", None):
        raise refuse_method(t, "rl", method)
    if method not in ("dpo", "ipo"):
        t.put("method", method or "sft", "rl" if method else "no rl")
    t.rename(NAMES)
    _model(t)
    _data(t)
    _adapter(t)
    _loss(t, method)
    _checkpoints(t)
    _lengths(t)
    training(t, DEFAULTS)
    t.leftovers({**QUIET, **_QUIET}, {**LOUD, **_LOUD})
    return t


def _model(t: Translation) -> None:
    base(t, revision="revision_of_model")
    if t.switch("load_in_4bit"):
        quantised(t, 4, "load_in_4bit")
    elif t.switch("load_in_8bit"):
        quantised(t, 8, "load_in_8bit")
    else:
        quantised(t, None, "no load_in_4bit")
    t.take("load_in_8bit")
    half(t, "bf16", "fp16", "bfloat16", "float16")
    if t.switch("float32"):
        t.put("model.dtype", "float32", "float32")
    keywords(t, "chat_template_kwargs", t.take("chat_template_kwargs"))
    template = t.take("chat_template")
    if template not in (None, "tokenizer_default"):
        t.miss("chat_template", TEMPLATE, value=template, loud=True)


def _adapter(t: Translation) -> None:
    kind = t.take("adapter")
    if kind not in ("lora", "qlora"):
        full(t, "adapter", "none" if kind is None else kind)
    lora(t, rank="lora_r", alpha="lora_alpha", dora="peft_use_dora", rslora="peft_use_rslora")
    names, linear = t.names("lora_target_modules"), t.switch("lora_target_linear")
    if linear or names:
        targets(t, ["all"] if linear else names, "lora_target_linear" if linear else "lora_target_modules")
    layers = t.take("peft_layers_to_transform")
    if layers is not None:
        t.put("lora.layers", layers, "peft_layers_to_transform")
    dropout(t, "lora_dropout")
    adapter = t.take("lora_model_dir")
    if adapter is not None:
        text = (
            f"there training goes on from it; here reference: adapter:{adapter} without a section lora does, and holds "
            "the policy to it"
        )
        t.miss("lora_model_dir", text, value=adapter, loud=True)


def _loss(t: Translation, method: str | None) -> None:
    nested = t.take("trl")
    beta = nested.get("beta") if isinstance(nested, dict) else None
    old, new = t.number("dpo_beta"), t.number("rl_beta")
    value, origin = next(
        ((v, name) for v, name in ((beta, "trl.beta"), (new, "rl_beta"), (old, "dpo_beta")) if v is not None),
        (0.1, f"{TOOL}'s default"),
    )
    losses, weights, alpha = t.take("dpo_loss_type"), t.take("dpo_loss_weights"), t.number("rpo_alpha")
    if method is None:
        return
    t.put("trainer.beta", value, origin)
    if method == "kto":
        return
    if method == "ipo":
        t.put("trainer.loss_type", ["ipo"], "rl")
    else:
        t.put("trainer.loss_type", losses or ["sigmoid"], "dpo_loss_type" if losses else f"{TOOL}'s default")
    if weights is not None:
        t.put("trainer.loss_weights", weights, "dpo_loss_weights")
    elif alpha:
        t.put("trainer.loss_type", [*t.settings["trainer"]["loss_type"], "sft"], "rpo_alpha")
        t.put("trainer.loss_weights", [1.0, float(alpha)], "rpo_alpha")
        t.change("rpo_alpha", f"loss_weights: [1.0, {alpha:g}], the SFT term's weight")
    smoothing = t.number("dpo_label_smoothing")
    if smoothing and t.offer("label_smoothing", smoothing, "dpo_label_smoothing"):
        text = "it does nothing to these losses; with loss_type: [robust] it would"
        t.miss("dpo_label_smoothing", text, value=smoothing, loud=True)


def _checkpoints(t: Translation) -> None:
    """Saves and evaluations that are counted by the epoch: a share of all steps here."""
    epochs = t.left.get("num_train_epochs", 1)
    for name, ours in (("saves_per_epoch", "save_steps"), ("evals_per_epoch", "eval_steps")):
        times = t.number(name)
        if not times or not isinstance(epochs, int | float) or isinstance(epochs, bool) or epochs <= 0:
            continue
        share = round(1 / (times * epochs), 6)
        if ours == "eval_steps":
            refused = t.offer("eval_strategy", "steps", name)
            if refused:
                t.miss(name, "nothing is held out, so nothing is evaluated on the way", value=times)
                continue
        if share >= 1:
            t.miss(name, "once in the whole run: a finished run is saved and measured anyway", value=times)
            continue
        t.put(f"trainer.{ours}", share, name)
        t.change(name, f"trainer.{ours}: {share:g}, a share of all steps")


def _lengths(t: Translation) -> None:
    strategy = t.take("excess_length_strategy", "drop")
    if strategy != "truncate":
        what = "left out" if strategy == "drop" else "an error"
        t.change("sequence_len", f"trainer.max_length: a longer pair is cut at its end; there it was {what}")


def _data(t: Translation) -> None:
    named: list[dict[str, str]] = []
    for name, key in (("datasets", "data.train"), ("test_datasets", "data.eval")):
        entries = t.take(name) or []
        entries = entries if isinstance(entries, list) else [entries]
        entries = [entry for entry in entries if isinstance(entry, dict) and entry.get("path")]
        found = [_source(t, entry, name) for entry in entries]
        sources(t, list(dict.fromkeys(one for group in found for one in group)), name, key)
        named += [_columns(t, entry, name) for entry in entries]
    columns(t, named, "datasets' field_ names")
    held_out(t, "val_set_size")


def _source(t: Translation, entry: dict[str, Any], name: str) -> list[str]:
    """The sources of one entry, and remarks on what of it is not taken."""
    files = entry.get("data_files")
    if files is not None and entry.get("path") in ("json", "csv", "parquet"):
        found = [files] if isinstance(files, str) else [str(file) for file in files]
    else:
        found = [hub_source(str(entry["path"]), config=entry.get("name"), split=entry.get("split"))]
        if files is not None:
            t.miss(f"{name}.data_files", "a data set of the hub is read whole", value=files, loud=True)
    kind = entry.get("type")
    if isinstance(kind, str):
        template = kind.partition(".")[0]
        if template not in ("chat_template", "passthrough", "user_defined"):
            text = "what a row means is found by its columns, and the chat template is the base's own"
            t.miss(f"{name}.type", text, value=kind, loud=template != "alpaca")
    thought = entry.get("field_thinking")
    if thought and thought not in THOUGHTS:
        t.miss(f"{name}.field_thinking", "call that key reasoning_content in the data", value=thought, loud=True)
    for part, loud in (("revision", True), ("shards", True), ("roles", False), ("message_property_mappings", False)):
        if entry.get(part) and not _is_plain(part, entry[part]):
            t.miss(f"{name}.{part}", "no counterpart: rows are read as their columns say", value=entry[part], loud=loud)
    return found


def _columns(t: Translation, entry: Mapping[str, Any], name: str) -> dict[str, str]:
    """The columns of one entry that have other names than the usual ones, and remarks on how it writes texts."""
    kind = entry.get("type")
    given = {**entry, **kind} if isinstance(kind, dict) else entry
    if given.get("field_messages", "messages") != "messages":
        text = "call that column messages in the data"
        t.miss(f"{name}.field_messages", text, value=given["field_messages"], loud=True)
    for field in ("prompt_format", "chosen_format", "rejected_format"):
        form = given.get(field)
        if form and form != "{" + field.partition("_")[0] + "}":
            t.miss(f"{name}.{field}", "texts are taken as they are: write the rows so", value=written(form), loud=True)
    named = {role: given.get(field) for field, role in FIELDS.items()}
    return {role: str(column) for role, column in named.items() if column and column != role}


def _is_plain(part: str, value: Any) -> bool:
    """True for mappings of names onto themselves."""
    if not isinstance(value, dict):
        return False
    return all(key == inner or inner == [key] for key, inner in value.items())
