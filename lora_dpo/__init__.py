"""Preference-tuning of open chat models with LoRA and DPO, on one loaded base model.

What every room may use:

errors      what goes wrong, as classes whose message says what to do
events      what a run tells while it goes on, and how it is asked to stop
files       writing so that a reader sees the whole or nothing
leftovers   temporary files, and what killed commands left of them
text        text from elsewhere made safe for a terminal; counting words; JSON
quiet       what other libraries may say, and that nothing is sent to anyone
places      where adapters, models, collected pairs and evaluations lie
systems     what Windows and macOS do otherwise

The rooms, each importing those above it (docs/architecture.md):

config      what a user writes: the recipe, and TRL's settings in it
data        rows of a file to pairs of messages to token ids; the doctor
model       one base in memory, LoRA on it, decoding
engine      exact DPO passes: a stream of pairs, a step as one batch, references kept
adapters    the adapter folder: written, read, checked, shared
judging     who says which answer is better; pairs from that
evaluation  is it better? numbers, intervals, pages
training    one run: prepared, trained under a guard, measured, saved; its plan
tuning      which settings: many short runs on one base, and a choice that is proven
release     merged, mixed, exported
serving     one base for many who ask, and a training beside
demo        the browser
cli         the terminal

Importing this package loads nothing but its settings of other libraries: each name below brings in its room when it is
first looked up, and torch when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import lora_dpo.quiet  # first: switches off what libraries would count and tell
import lora_dpo.systems

lora_dpo.systems.let_segments_grow()

if TYPE_CHECKING:
    from lora_dpo.adapters import attach_adapter, install, list_adapters, load_policy, pack, pull, push
    from lora_dpo.config import EngineSection, LoraSection, Recipe, read_improve_recipe, read_recipe
    from lora_dpo.data import read_pairs, read_prompts
    from lora_dpo.errors import BaseDiffers, LoraDPOError
    from lora_dpo.evaluation import AssessPlan, assess, suspicious_pairs, verify, write_report
    from lora_dpo.judging import make_pairs, open_judge
    from lora_dpo.model import Base, Sampling, attach_lora, fetch_model, generate, load_base, reference, stream
    from lora_dpo.release import export, fidelity, merge, mix, recommend
    from lora_dpo.serving import Chat, Host, open_chat, open_host
    from lora_dpo.training import DPOTrainer, Plan, Stopped, StopSignal, TrainResult, improve, plan, train
    from lora_dpo.tuning import SweepResult, TuneResult, sweep, tune

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
    "SweepResult",
    "TrainResult",
    "TuneResult",
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
    "recommend",
    "reference",
    "stream",
    "suspicious_pairs",
    "sweep",
    "train",
    "tune",
    "verify",
    "write_report",
]

__version__ = "0.1.0"


_ROOMS = {
    "adapters": "attach_adapter install list_adapters load_policy pack pull push",
    "config": "EngineSection LoraSection Recipe read_improve_recipe read_recipe",
    "data": "read_pairs read_prompts",
    "errors": "BaseDiffers LoraDPOError",
    "evaluation": "AssessPlan assess suspicious_pairs verify write_report",
    "judging": "make_pairs open_judge",
    "model": "Base Sampling attach_lora fetch_model generate load_base reference stream",
    "release": "export fidelity merge mix recommend",
    "serving": "Chat Host open_chat open_host",
    "training": "DPOTrainer Plan StopSignal Stopped TrainResult improve plan train",
    "tuning": "SweepResult TuneResult sweep tune",
}
"""Where each name is at home."""
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a room, looked up for the first time."""
    if name in _HOME:
        found = getattr(importlib.import_module(f"lora_dpo.{_HOME[name]}"), name)
        globals()[name] = found
        return found
    if name in (*_ROOMS, "engine", "errors", "events"):
        return importlib.import_module(f"lora_dpo.{name}")
    raise AttributeError(f"module 'lora_dpo' has no attribute {name!r}")
