"""Settings of other tools as those of a recipe: what they are called here, and what has no counterpart.

Known are LLaMA-Factory, Axolotl and Unsloth as of summer 2026, and TRL 1.16. Nothing of theirs is imported or run.

translation     settings on their way: taken, changed, or without a counterpart
shared          what all of them have: steps, batches, LoRA, dropout, leftovers
llama_factory   its YAML and command line
axolotl         its YAML
unsloth         its YAML, command lines, and scripts
trl             its command line, YAML, and scripts
command_line    a command line as names and values
script          a Python script as the arguments that it gives
reading         a file: whose it is, and its translation
"""

from __future__ import annotations

from lora_dpo.config.foreign.reading import read_foreign
from lora_dpo.config.foreign.translation import Remark, Translation

__all__ = ["Remark", "Translation", "read_foreign"]
