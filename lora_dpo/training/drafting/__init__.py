"""From pairs to a recipe: what the Train page, `lora-dpo init` and `lora-dpo train DATA` choose for them.

lengths       how long pairs are, in tokens
presets       from a choice of pairs and one word to the settings of a run
comments      why each of them is so
recipe_text   settings as a text that teaches
from_pairs    from a file of pairs to a recipe beside it
from_tool     from another tool's settings to a recipe
quickstart    the quickstart, out of the installed package
"""
