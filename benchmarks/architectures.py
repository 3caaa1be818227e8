"""Which models run as a stream of pairs: a small copy of each type that transformers has, tried (`lora_dpo.engine`).

    python benchmarks/architectures.py                       every type of decoder, by its configuration's defaults
    python benchmarks/architectures.py qwen3_5_text lfm2     these
    python benchmarks/architectures.py --table               what was found, as the table of docs/architectures.md

What is found is put into results/architectures.json. The numbers hang on the CPU's rounding.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_dpo.engine.pair_forward import structural_reason
from lora_dpo.engine.proof import prove

RESULTS = Path(__file__).parent / "results" / "architectures.json"
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "ministral": {"rope_parameters": ROPE, "head_dim": 128},
    "hunyuan_v1_dense": {"rope_parameters": ROPE, "head_dim": 128},
    "seed_oss": {"attention_dropout": 0.0},
    "gemma4_text": {"num_kv_shared_layers": 10},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
}
"""Where the defaults make no model, leave layers out, or are noise."""


def tried(kind: str) -> dict[str, Any]:
    """What trying one model type found."""
    try:
        config = AutoConfig.for_model(kind, **SETTINGS.get(kind, {})).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    except Exception as error:  # whatever the type's class raises of its own defaults
        return {"reason": f"its defaults make no model ({type(error).__name__}: {str(error)[:120]})"}
    if reason := structural_reason(model):
        return {"reason": reason}
    found = prove(model)
    if math.isnan(found.loss):
        return {"reason": found.reason}
    return {"loss": found.loss, "gradient": found.gradient, "seconds": round(found.seconds, 2), "reason": found.reason}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: those that run as a stream, then those that do not and why."""
    runs = [kind for kind, one in sorted(found.items()) if one["reason"] is None]
    lines = ["| Model type | loss | gradients |", "|---|---|---|"]
    lines += [f"| {kind} | {found[kind]['loss']:.0e} | {found[kind]['gradient']:.0e} |" for kind in runs]
    lines += ["", "| Model type | why not |", "|---|---|"]
    lines += [f"| {kind} | {one['reason']} |" for kind, one in sorted(found.items()) if one["reason"] is not None]
    return "\n".join(lines)


def main(kinds: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"found": {}}
    if kinds == ["--table"]:
        print(table(stored["found"]))
        return
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        stored["found"][kind] = tried(kind)
        print(kind, stored["found"][kind], flush=True)
        stored |= {"torch": version("torch"), "transformers": version("transformers")}
        RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
