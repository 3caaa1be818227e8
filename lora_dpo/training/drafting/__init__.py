"""From pairs to a recipe: what the Train page and `lora-dpo init` choose for them.

presets   from a choice of pairs and one word to a whole recipe
"""
