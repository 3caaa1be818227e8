"""What a user writes: recipes, and TRL's settings within them, checked before anything is loaded.

yaml             YAML as recipes hold it, read within limits
column_names     what columns of a data file can be named as
recipe           the recipe of a run, section by section; `lora-dpo recipe` prints its fields
reading          recipes from files and options, with an error for what is none
trl_common       what every method's `trainer:` section has in common
trl_dpo          that section for DPO, with nothing ignored in silence
trl_sft_kto      the same for SFT and KTO
improve_recipe   the recipe of `lora-dpo improve`: rounds, and where prompts come from
"""

from __future__ import annotations

from lora_dpo.config.improve_recipe import read_improve_recipe
from lora_dpo.config.reading import read_recipe
from lora_dpo.config.recipe import EngineSection, LoraSection, Recipe

__all__ = ["EngineSection", "LoraSection", "Recipe", "read_improve_recipe", "read_recipe"]
