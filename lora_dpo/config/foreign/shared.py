"""What other tools' settings have in common: steps, batches, LoRA, bits, data, and what has no use here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

from lora_dpo.config.foreign.translation import Translation
from lora_dpo.config.template_kwargs import checked_template_kwargs
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

HF_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
"""Those of transformers' TrainingArguments, which a tool has where its settings are silent."""

PEFT_TARGETS = ["q_proj", "v_proj"]
"""What peft adapts where no layers are named: in Llama, Mistral, Qwen and Gemma."""


def reasons(table: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """A table of reasons, each with the names that it is for, the other way round."""
    return {name: why for why, names in table.items() for name in names}


OTHER_DEVICES = "a run has one base on one device; a script with lora_dpo.DPOTrainer can be sharded"
QUIET = reasons(
    {
        "a run has one process on one device": (
            "ddp*", "local_rank", "world_size", "accelerator_config", "device_map", "num_processes", "num_machines",
            "use_ray", "ray_*", "resources_per_worker", "master_addr", "master_port", "gradient_checkpointing_kwargs",
            "average_tokens_across_devices",
        ),
        "nothing is padded or packed: a step's pairs run as one stream": (
            "packing", "neat_packing", "sample_packing*", "eval_sample_packing", "pad_to_sequence_len",
            "pad_to_multiple_of", "group_by_length", "batch_flattening", "multipack_real_batches", "padding_free",
        ),
        "attention and kernels are chosen by the engine": (
            "flash_attn*", "flash_attention", "attn_implementation", "xformers_attention", "sdp_attention",
            "flex_attention", "sage_attention", "eager_attention", "use_unsloth", "use_unsloth_gc", "lora_mlp_kernel",
            "lora_qkv_kernel", "lora_o_kernel", "enable_liger_kernel", "use_liger_kernel", "dpo_use_liger_kernel",
            "use_kernels", "chunked_cross_entropy*", "tf32", "use_v1_kernels", "use_reentrant_gc",
        ),
        "rows are read and tokenised before training starts, in one process": (
            "preprocessing_num_workers", "preprocessing_batch_size", "dataset_num_proc", "dataset_processes",
            "overwrite_cache", "dataset_prepared_path", "tokenized_path", "streaming", "buffer_size",
            "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "remove_unused_columns",
            "data_shared_file_system", "skip_prepare_dataset", "dataset_keep_in_memory", "dataset_streaming",
            "shuffle_merged_datasets", "shuffle_before_merging_datasets",
        ),
        "every run writes its curves and a report": ("plot_loss", "include_tokens_per_second", "include_tkps"),
        "an adapter folder is never overwritten, and holds safetensors": ("overwrite_output_dir", "save_safetensors"),
        "a run trains, and measures before and after": (
            "do_train", "do_eval", "do_predict", "generate_samples", "predict_with_generate",
            "include_num_input_tokens_seen", "logging_first_step",
        ),
        "the adapter goes to adapters/ by the recipe's name; set output: for another place": ("output_dir",),
        "a run uploads nothing: lora-dpo adapters push": (
            "push_to_hub", "hub_*", "hf_use_auth_token", "hf_hub_token", "hf_token", "ms_hub_token", "om_hub_token",
            "push_dataset_to_hub", "token",
        ),
        "set trainer.report_to and the tracker's own variables": (
            "wandb_*", "use_wandb", "mlflow_*", "use_mlflow", "comet_*", "use_comet", "swanlab_*", "use_swanlab",
            "trackio_*", "use_trackio", "use_tensorboard", "enable_wandb", "enable_tensorboard", "tensorboard_dir",
        ),
        "a run is resumed with --resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
        "the guard (health:) watches the run": ("loss_watchdog_*", "early_stopping_*"),
    }
)  # fmt: skip
"""Why settings of any tool have no counterpart that anybody would miss."""
LOUD = reasons(
    {
        OTHER_DEVICES: ("deepspeed", "fsdp*", "deepcompile", "parallelism_config"),
        "the vocabulary stays the base's: add tokens to a copy of the model first": (
            "resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config", "resize_token_embeddings*",
            "tokens", "added_tokens_overrides",
        ),
        "the base stays as it is: change rope_scaling in a copy of its config.json": ("rope_scaling",),
        "both matrices of the adapter learn at one rate": ("loraplus_lr_ratio",),
        "the adapter starts at B = 0: any other start changes the base that it is held to": (
            "pissa_init", "pissa_convert", "use_loftq", "loftq_config", "peft_init_lora_weights", "init_lora_weights",
            "peft",
        ),
        "only the adapter's matrices are trained": (
            "lora_target_parameters", "target_parameters", "unfrozen_parameters", "peft_trainable_token_indices",
            "lora_rank_pattern", "lora_alpha_pattern", "peft_layer_replication", "embedding_lr*", "lr_groups",
        ),
        "set lora.modules_to_save to them: each is copied whole, beside the base's own": (
            "additional_target", "lora_modules_to_save", "modules_to_save",
        ),
        "the reference is the base, or with reference: adapter:PATH that adapter": (
            "ref_model", "ref_model_adapters", "ref_model_quantization_bit",
        ),
    }
)  # fmt: skip
"""Why settings of any tool that change what is trained have no counterpart."""


def refuse_method(t: Translation, name: str, value: Any) -> ConfigError:
    """The error for a way of training that is not here."""
    return ConfigError(
        f"{name} is {shown(value)}: {t.tool} trains by that, and there is no counterpart here. There is dpo (with "
        "TRL's losses), kto and sft."
    )


def full(t: Translation, name: str, value: Any) -> None:
    """Remark that all weights were trained; their learning rate is not an adapter's."""
    t.miss(name, "all weights were trained there; here it is an adapter, and the base stays", value=value, loud=True)
    rate = t.take("learning_rate")
    if rate is not None:
        text = "it was meant for all weights, and an adapter needs more: the default is left as it is"
        t.miss("learning_rate", text, value=rate, loud=True)
    t.put("trainer.learning_rate", 1e-4 if t.settings.get("method") == "sft" else 5e-5, "not theirs: for an adapter")


TEMPLATE = "the chat template is the base's own; look at a pair with lora-dpo data show DATA --model NAME"


def keywords(t: Translation, name: str, value: Any) -> None:
    """Keywords for the chat template, such as whether it asks for a thought: `model.template`."""
    if value is None or value == {}:
        return
    try:
        found = checked_template_kwargs(value) if isinstance(value, dict) else None
    except ValueError as error:
        t.miss(name, str(error), value=value, loud=True)
        return
    if found is None:
        t.miss(name, "keywords for the chat template are names with values", value=value, loud=True)
    else:
        t.put("model.template", found, t.origin(name))


def base(t: Translation, *, revision: str) -> None:
    """Which base, under transformers' name for it, which revision, and whether its code is run."""
    t.put("model.name", str(t.take("model_name_or_path", "")), t.origin("model_name_or_path"))
    wanted = t.take(revision, "main")
    if wanted != "main":
        t.put("model.revision", str(wanted), revision)
    if t.switch("trust_remote_code"):
        t.put("model.trust_remote_code", True, "trust_remote_code")
        t.change("trust_remote_code", "taken over: it runs code that comes with the model. Remove it if there is none")


def half(t: Translation, *names: str) -> None:
    """Switches of 16-bit precision: what is computed in is chosen by the hardware here."""
    for name in names:
        if t.switch(name):
            t.change(name, "model.dtype stays auto: bfloat16 on GPUs that have it, float16 on others, float32 on CPUs")


def quantised(t: Translation, bits: int | None, origin: str) -> None:
    """How the base is held: in 4 bits, or as stored; 8 bits there are 4 here."""
    if bits == 4:
        t.put("model.quantize", "nf4", origin)
    elif bits == 8:
        t.put("model.quantize", "nf4", origin)
        t.miss(origin, "there are 4 bits (nf4), or the weights as stored with quantize: none; 4 were taken", loud=True)
    else:
        t.put("model.quantize", "none", f"{origin}; nf4 would take a quarter of the memory")


def lora(t: Translation, *, rank: str, alpha: str, dora: str, rslora: str) -> None:
    """Rank, alpha and kind of the adapter, by their names."""
    size, scale = t.whole(rank), t.number(alpha)
    for name, key, value in ((rank, "lora.rank", size), (alpha, "lora.alpha", scale)):
        if value is not None:
            t.put(key, value, t.origin(name))
    for name, key in ((rslora, "lora.rslora"), (dora, "lora.dora")):
        if t.switch(name):
            t.put(key, True, t.origin(name))


def targets(t: Translation, names: list[str], origin: str) -> None:
    """The layers that are adapted, but the head and the embeddings: no adapter on these would be trained."""
    if not names or names in (["all"], ["all-linear"]):
        t.put("lora.targets", "all-linear", origin)
        return
    kept = [name for name in names if name not in ("lm_head", "embed_tokens")]
    if len(kept) < len(names):
        gone = ", ".join(name for name in names if name not in kept)
        t.miss(origin, f"no adapter is put on {gone}: it would not be trained", loud=True)
    t.put("lora.targets", kept or "all-linear", origin)


def dropout(t: Translation, name: str) -> None:
    """Dropout on the adapter's input, which preference tuning there switches off."""
    value = t.number(name)
    if not value:
        t.take("disable_dropout")
        return
    if t.settings.get("method") == "sft":
        t.put("lora.dropout", float(value), t.origin(name))
    elif t.take("disable_dropout", True):
        text = "it did nothing there: DPO and KTO switch all dropout off"
        t.miss(name, text, value=value)
    else:
        t.put("trainer.disable_dropout", False, "disable_dropout")
        t.put("lora.dropout", float(value), t.origin(name))


def training(t: Translation, defaults: Mapping[str, Any]) -> None:
    """Steps, batches, rate and schedule, under transformers' names; their defaults where nothing is said.

    Args:
        defaults: theirs, for the names of `HF_DEFAULTS` and others.
    """
    _length(t, defaults)
    _warmup(t, defaults)
    _batch(t, defaults)
    for name in ("learning_rate", "lr_scheduler_type", *(n for n in defaults if n not in HF_DEFAULTS)):
        if t.has(f"trainer.{name}"):
            t.take(name)
            continue
        given = name in t.left
        value = t.take(name, defaults.get(name))
        if value is None:
            continue
        refused = t.offer(name, value, None if given else f"{t.tool}'s default")
        if refused:
            t.miss(name, refused, value=value, loud=True)


def _length(t: Translation, defaults: Mapping[str, Any]) -> None:
    steps, epochs = t.whole("max_steps"), t.number("num_train_epochs")
    if steps is not None and steps > 0:
        t.put("trainer.max_steps", steps, t.origin("max_steps"))
    else:
        origin = f"{t.tool}'s default" if epochs is None else t.origin("num_train_epochs")
        t.put("trainer.num_train_epochs", defaults["num_train_epochs"] if epochs is None else epochs, origin)


def _warmup(t: Translation, defaults: Mapping[str, Any]) -> None:
    steps, ratio = t.number("warmup_steps"), t.number("warmup_ratio")
    if steps:
        t.put("trainer.warmup_steps", steps, t.origin("warmup_steps"))
        if ratio:
            t.change("warmup_ratio", f"warmup_steps is set, too, and decides there and here: {steps:g}")
    elif ratio:
        t.put("trainer.warmup_steps", float(ratio), t.origin("warmup_ratio"))
        t.change("warmup_ratio", f"trainer.warmup_steps: {ratio:g}, which below 1 is a share of all steps")
    elif steps == 0 or ratio == 0:
        t.put("trainer.warmup_steps", 0, t.origin("warmup_steps" if steps == 0 else "warmup_ratio"))
    else:
        t.put("trainer.warmup_steps", defaults["warmup_steps"], f"{t.tool}'s default")


def _batch(t: Translation, defaults: Mapping[str, Any]) -> None:
    size_name, gathered_name = "per_device_train_batch_size", "gradient_accumulation_steps"
    size, gathered = t.whole(size_name), t.whole(gathered_name)
    silent = f"{t.tool}'s default"
    origins = [
        silent if one is None else t.origin(name) for one, name in ((size, size_name), (gathered, gathered_name))
    ]
    size = defaults[size_name] if size is None else size
    gathered = defaults[gathered_name] if gathered is None else gathered
    unit = "pairs" if t.settings.get("method", "dpo") == "dpo" else "answers"
    total, named = size * gathered, f"{t.origin(size_name)} × {t.origin(gathered_name)}"
    text = f"{size} × {gathered}: {total} {unit} a step, as there on one GPU; on several it was as many times that"
    if t.settings.get("method") == "kto" and size < 2:
        size, gathered = 2, ceil(total / 2)
        text = (
            f"{size} × {gathered} in place of 1 × {total}: KTO here estimates its KL term from the other answers of a "
            "batch, so it needs two"
        )
    t.put(f"trainer.{size_name}", size, origins[0])
    t.put(f"trainer.{gathered_name}", gathered, origins[1])
    t.change(named, text)


def hub_source(name: str, *, config: Any = None, split: Any = None, limit: Any = None) -> str:
    """A data set as a recipe names it: a path as it is, or `owner/name/CONFIG:SPLIT[:LIMIT]`."""
    text = f"{name}/{config}" if config else name
    if limit:
        return f"{text}:{split or 'train'}[:{limit}]"
    return f"{text}:{split}" if split and split != "train" else text


def sources(t: Translation, found: list[str], origin: str, key: str = "data.train") -> None:
    """Where pairs come from: one place, or several."""
    if found:
        t.put(key, found[0] if len(found) == 1 else found, origin)


def columns(t: Translation, named: list[dict[str, str]], origin: str) -> None:
    """Columns by other names than the usual ones: `data.columns`, which is one for all files.

    Args:
        named: for each data set, columns by what they are to be.
    """
    found = named[0] if named else {}
    if any(other != found for other in named):
        text = "they differ, and data.columns is one for all files: give the columns of the files the same names"
        t.miss(origin, text, loud=True)
    elif found:
        t.put("data.columns", found, origin)


def held_out(t: Translation, name: str) -> None:
    """A share or a number of rows that was held out: prompts here, with all their pairs."""
    value = t.number(name)
    if not value or t.has("data.eval"):
        return
    wanted: int | float = int(value) if value >= 1 else float(value)
    t.put("data.hold_out", wanted, t.origin(name))
    what = f"{wanted:g} of the prompts" if wanted < 1 else f"{wanted} prompts"
    t.change(name, f"data.hold_out: {what}, with all their pairs; there it was of the rows")
