"""LLaMA-Factory's settings (its YAML, JSON and command line): stages dpo, kto and sft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
from lora_dpo.config.foreign.translation import Translation

TOOL = "LLaMA-Factory"
LOSSES = ("sigmoid", "hinge", "ipo")
"""Values of `pref_loss` that are the losses of the same name here."""
COLUMNS = ("prompt", "chosen", "rejected", "system", "history")
"""Of dataset_info.json: they are called the same in `data.columns`."""

_QUIET = reasons(
    {
        "its web page and its chat have counterparts of their own: lora-dpo demo, serve and chat": (
            "infer_*", "use_kv_cache", "vllm_*", "sglang_*",
        ),
        "answers before and after are greedy, up to evaluation.max_new_tokens": (
            "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "eval_num_beams",
        ),
        "weights of adapters are float32, and what they are put on is computed in model.dtype": (
            "pure_bf16", "upcast_layernorm", "upcast_lmhead_output",
        ),
        "it is for other stages": (
            "ppo_*", "reward_model*", "train_on_prompt", "mask_history", "compute_accuracy", "use_dft_loss",
            "use_asft_loss", "asft_alpha", "use_eaft_loss", "eaft_alpha", "freeze_*", "simpo_gamma",
        ),
        "it is for images, videos and sounds": ("image_*", "video_*", "audio_*", "media_dir", "crop_to_patches"),
        "what is loaded is decided by the base's own files": (
            "use_fast_tokenizer", "split_special_tokens", "low_cpu_mem_usage", "cache_dir", "offload_folder",
            "print_param_status",
        ),
        "sources are read one after the other; lora-dpo data mix mixes them": ("mix_strategy", "interleave_probs"),
        "padding is never part of a loss": ("ignore_pad_token_for_loss",),
        "held-out data is one": ("eval_on_each_dataset",),
    }
)  # fmt: skip
_LOUD = reasons(
    {
        "AdamW and transformers' other optimizers are there (trainer.optim)": (
            "use_galore", "galore_*", "use_apollo", "apollo_*", "use_badam", "badam_*", "use_adam_mini", "use_muon",
        ),
        "the base's layers stay as they are": ("shift_attn", "mixture_of_depths", "use_llama_pro", "moe_aux_loss_coef"),
        "the base is loaded, never trained from the start": ("train_from_scratch",),
        "rows are shuffled": ("disable_shuffling",),
        "it trains elsewhere": ("use_mca", "use_megatron_bridge", "use_hyper_parallel", "use_kt", "fp8"),
        "no counterpart: bco_pair here has no running mean of the rewards": ("pref_bco_weight",),
        "it takes that share of the labels for wrong; loss_type: [robust] with trainer.label_smoothing corrects for "
        "wrong ones, which is another loss": ("dpo_label_smoothing",),
        "set it in a system turn of the rows": ("default_system",),
    }
)  # fmt: skip


def translate(given: Mapping[str, Any], *, folder: Path) -> Translation:
    """Its settings as those of a recipe.

    Args:
        folder: of the file that they are from: its data sets are described in a file near it.

    Raises:
        ConfigError: a stage or loss that is not here, or a value of the wrong kind.
    """
    t = Translation(TOOL, given)
    stage = t.take("stage", "sft")
    if stage not in ("dpo", "kto", "sft"):
        raise refuse_method(t, "stage", stage)
    if stage != "dpo":
        t.put("method", stage, "stage")
    _model(t)
    _data(t, folder)
    kind = t.take("finetuning_type", "lora")
    if kind != "lora":
        full(t, "finetuning_type", kind)
    _adapter(t)
    _loss(t, stage)
    training(t, {**HF_DEFAULTS, "max_length": 2048})
    t.leftovers({**QUIET, **_QUIET}, {**LOUD, **_LOUD})
    return t


def _model(t: Translation) -> None:
    base(t, revision="model_revision")
    bits = t.whole("quantization_bit")
    quantised(t, bits, "quantization_bit" if bits else f"{TOOL}'s default")
    _kind_of_bits(t)
    half(t, "bf16", "fp16")
    adapter = t.take("adapter_name_or_path")
    if adapter is not None:
        text = (
            f"there training goes on from it and is held to the base; here reference: adapter:{adapter} without a "
            "section lora goes on from it and is held to it"
        )
        t.miss("adapter_name_or_path", text, value=adapter, loud=True)
    t.take("create_new_adapter")
    thinks = t.take("enable_thinking")
    if isinstance(thinks, bool):
        keywords(t, "enable_thinking", {"enable_thinking": thinks})
        if thinks:
            text = "model.template; there an empty thought was trained on where an answer has none, here it is prompt"
            t.change("enable_thinking", text)
    elif thinks is not None:
        t.miss("enable_thinking", "it is on or off", value=thinks, loud=True)
    template = t.take("template")
    if template is not None:
        t.miss("template", TEMPLATE, value=template, loud=True)


def _kind_of_bits(t: Translation) -> None:
    """4 bits of another kind than NF4 with double quantisation, bitsandbytes'."""
    kinds = {
        "quantization_method": ("bnb", "bitsandbytes"),
        "quantization_type": ("nf4",),
        "double_quantization": (True,),
    }
    for name, ours in kinds.items():
        value = t.take(name, ours[0])
        if value not in ours:
            t.miss(name, "4 bits are NF4 with double quantisation here", value=value, loud=True)
    t.take("quantization_device_map")


def _adapter(t: Translation) -> None:
    rank = t.left.get("lora_rank", 8)
    t.left.setdefault("lora_rank", rank)
    silent = "lora_alpha" not in t.left
    if silent and isinstance(rank, int):
        t.left["lora_alpha"] = 2 * rank
    lora(t, rank="lora_rank", alpha="lora_alpha", dora="use_dora", rslora="use_rslora")
    if silent:
        t.origins["lora.alpha"] = f"{TOOL}'s default: 2 × lora_rank"
    targets(t, t.names("lora_target"), "lora_target")
    dropout(t, "lora_dropout")


def _loss(t: Translation, stage: str) -> None:
    beta, ftx, loss = t.number("pref_beta"), t.number("pref_ftx"), t.take("pref_loss", "sigmoid")
    if stage == "sft":
        return
    t.put("trainer.beta", 0.1 if beta is None else beta, f"{TOOL}'s default" if beta is None else "pref_beta")
    if stage == "kto":
        for name, ours in (("kto_chosen_weight", "desirable"), ("kto_rejected_weight", "undesirable")):
            value = t.number(name)
            if value is not None:
                t.put(f"trainer.{ours}_weight", float(value), name)
        if ftx:
            t.miss("pref_ftx", "KTO here has no SFT term", value=ftx, loud=True)
        return
    if loss not in LOSSES:
        raise refuse_method(t, "pref_loss", loss)
    t.put("trainer.loss_type", [loss, "sft"] if ftx else [loss], "pref_loss, pref_ftx" if ftx else "pref_loss")
    if ftx:
        t.put("trainer.loss_weights", [1.0, float(ftx)], "pref_ftx")
        text = (
            f"loss_weights: [1.0, {ftx:g}]; there each answer counts alike, here each token of a batch, so long "
            "answers count for more"
        )
        t.change("pref_ftx", text)


def _data(t: Translation, folder: Path) -> None:
    if "cutoff_len" in t.left:
        t.rename({"cutoff_len": "max_length"})
        t.change("cutoff_len", "trainer.max_length: only answers are cut, there prompts are, too")
    limit, place = t.whole("max_samples"), str(t.take("dataset_dir", "data"))
    info = _data_sets(place, folder)
    named: list[dict[str, str]] = []
    for name, key in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        wanted = t.names(name)
        sources(t, [_source(t, one, info, name, limit) for one in wanted], name, key)
        named += [_columns(t, one, info, name) for one in wanted]
    columns(t, named, "columns of dataset_info.json")
    held_out(t, "val_size")


@dataclass(frozen=True)
class _DataSets:
    """What `dataset_info.json` says of data sets."""

    folder: Path
    described: dict[str, Any] | None
    """By name; None where there is no such file."""

    def entry(self, name: str) -> dict[str, Any] | None:
        found = (self.described or {}).get(name)
        return found if isinstance(found, dict) else None


def _data_sets(place: str, folder: Path) -> _DataSets:
    """Those of the current folder, or of the folder of the settings."""
    for start in (Path(), folder, folder.parent):
        path = start / place / "dataset_info.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return _DataSets(path.parent, found)
    return _DataSets(Path(place), None)


def _source(t: Translation, wanted: str, info: _DataSets, name: str, limit: int | None) -> str:
    """A data set of theirs, as a recipe names it."""
    entry = info.entry(wanted)
    named = f"data.{'train' if name == 'dataset' else 'eval'}"
    if entry is None:
        missing = f"there is no {info.folder.as_posix()}/dataset_info.json here"
        what = missing if info.described is None else "dataset_info.json does not have it"
        text = f"it is a name of LLaMA-Factory's, and {what}: write the file or hub id into {named}"
        t.miss(name, text, value=wanted, loud=True)
        return wanted
    if "hf_hub_url" in entry:
        split, subset = entry.get("split"), entry.get("subset")
        found = hub_source(str(entry["hf_hub_url"]), config=subset, split=split, limit=limit)
    elif "file_name" in entry:
        found = str(info.folder / str(entry["file_name"]))
        if limit is not None:
            t.miss("max_samples", f"a file is read whole: cut {found}", value=limit, loud=True)
    else:
        t.miss(name, "it is neither a file nor on the Hugging Face hub: name a file", value=wanted, loud=True)
        return wanted
    t.change(f"{name}: {wanted}", f"{named}: {found}, by dataset_info.json")
    return found


def _columns(t: Translation, wanted: str, info: _DataSets, name: str) -> dict[str, str]:
    """The columns of one data set that have other names than the usual ones."""
    entry = info.entry(wanted) or {}
    given = entry.get("columns")
    given = given if isinstance(given, dict) else {}
    other = [role for role in given if role not in COLUMNS] + [part for part in ("tags",) if part in entry]
    if other:  # a prompt of two columns, or turns with tags of their own
        text = "columns are found by their own names: lora-dpo data check says what is read"
        t.miss(name, text, value=f"{wanted} ({', '.join(other)})", loud=True)
        return {}
    return {role: str(column) for role, column in given.items() if column and column != role}
