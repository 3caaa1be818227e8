"""What a user writes: recipes, and TRL's settings within them, checked before anything is loaded.

yaml             YAML as recipes hold it, read within limits
column_names     what columns of a data file can be named as
template_kwargs  keywords for a chat template, from whoever gives them
recipe           the recipe of a run, section by section; `lora-dpo recipe` prints its fields
reading          recipes from files and options, with an error for what is none
trl_fields       the fields of TRL's config classes, as a table
trl_kinds        that table, or TRL itself where another version is installed
trl_common       which of TRL's fields are refused for every method; types and ranges
trl_dpo          the `trainer:` section for DPO: defaults, losses, refusals; and the entry point for all methods
trl_sft_kto      the same for SFT and KTO
improve_recipe   the recipe of `lora-dpo improve`: rounds, and where prompts come from
foreign/         settings of other tools as those of a recipe
"""

from __future__ import annotations

from lora_dpo.config.improve_recipe import read_improve_recipe
from lora_dpo.config.reading import read_recipe
from lora_dpo.config.recipe import EngineSection, LoraSection, Recipe

__all__ = ["EngineSection", "LoraSection", "Recipe", "read_improve_recipe", "read_recipe"]
