"""Preference-tuning of open chat models with LoRA and DPO, on one loaded base model.

Importing this package loads no torch: the names below bring it in when they are called, and
`DPOTrainer`, a class on top of TRL's, when it is first looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lora_dpo.telemetry  # noqa: F401 - first: switches off what libraries would count and tell
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.hub import pull, push
from lora_dpo.adapters.loading import load_policy
from lora_dpo.adapters.store import install, list_adapters, pack
from lora_dpo.config.improve_recipe import read_improve_recipe
from lora_dpo.config.recipe import EngineSection, LoraSection, Recipe, read_recipe
from lora_dpo.data import read_pairs
from lora_dpo.data.prompts import read_prompts
from lora_dpo.errors import BaseDiffers, LoraDPOError
from lora_dpo.evaluation.evaluate import AssessPlan, assess
from lora_dpo.evaluation.report.write import write_report
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.judging import open_judge
from lora_dpo.judging.pair_making import make_pairs
from lora_dpo.model.base import Base, load_base
from lora_dpo.model.decoding import Sampling, generate, stream
from lora_dpo.model.lora import attach_lora, reference
from lora_dpo.model.packaged import fetch_model
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.merge_fidelity import fidelity
from lora_dpo.release.merged_folder import merge
from lora_dpo.release.mixture import mix
from lora_dpo.serving.chat import Chat, open_chat
from lora_dpo.serving.host import Host, open_host
from lora_dpo.training.improve_rounds import improve
from lora_dpo.training.planning.make_plan import Plan, plan
from lora_dpo.training.prepare import Stopped, StopSignal
from lora_dpo.training.run import TrainResult, train

if TYPE_CHECKING:
    from lora_dpo.training.dpo_trainer import DPOTrainer

__all__ = [
    "AssessPlan",
    "Base",
    "BaseDiffers",
    "Chat",
    "DPOTrainer",
    "EngineSection",
    "Host",
    "LoraDPOError",
    "LoraSection",
    "Plan",
    "Recipe",
    "Sampling",
    "StopSignal",
    "Stopped",
    "TrainResult",
    "assess",
    "attach_adapter",
    "attach_lora",
    "export",
    "fetch_model",
    "fidelity",
    "generate",
    "improve",
    "install",
    "list_adapters",
    "load_base",
    "load_policy",
    "make_pairs",
    "merge",
    "mix",
    "open_chat",
    "open_host",
    "open_judge",
    "pack",
    "plan",
    "pull",
    "push",
    "read_improve_recipe",
    "read_pairs",
    "read_prompts",
    "read_recipe",
    "reference",
    "stream",
    "train",
    "verify",
    "write_report",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "DPOTrainer":
        from lora_dpo.training.dpo_trainer import DPOTrainer

        return DPOTrainer
    raise AttributeError(f"module 'lora_dpo' has no attribute {name!r}")
