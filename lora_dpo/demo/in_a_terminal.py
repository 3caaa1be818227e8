"""The page's work as command lines and recipes, to copy: what is done here can be done without it."""

from __future__ import annotations

import shlex
from pathlib import Path

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.package import BASE
from lora_dpo.config.reading import dump_settings
from lora_dpo.config.recipe import Recipe
from lora_dpo.demo.session import AppState
from lora_dpo.errors import LoraDPOError
from lora_dpo.model.decoding import Sampling

TOP_P = 0.95
"""What `lora-dpo chat` draws with."""


def chat_command(app_state: AppState, players: list[str], sampling: Sampling, system: str) -> str:
    """`lora-dpo chat` with the adapter of the page, both answers if there are two, and its settings."""
    adapter = next((name for name in players if name != BASE), None)
    others = [name for name in app_state.names() if name != BASE]
    if adapter is None and not others:
        return "# lora-dpo chat talks with an adapter and its base: there is no adapter yet."
    words = ["lora-dpo", "chat", typed(app_state.adapters_dir / (adapter or others[0]))]
    words += ["--model", shlex.quote(app_state.host.base.name)] if not _knows_its_base(app_state, words[2]) else []
    words += ["--compare"] if len(set(players)) > 1 else []
    words += ["--system", shlex.quote(system.strip())] if system.strip() else []
    words += ["--temperature", f"{sampling.temperature:g}", "--max-new-tokens", str(sampling.max_new_tokens)]
    lines = [" ".join([*words, "--seed", str(sampling.seed)])]
    lines += ["# then, for the model without it:  /base"] if adapter is None else []
    lines += ["# one adapter at a time is beside its base there"] if len(players) > 1 and BASE not in players else []
    lines += [f"# top-p is {TOP_P:g} there"] if sampling.top_p != TOP_P else []
    return "\n".join(lines)


def vote_commands(app_state: AppState) -> str:
    """Where the votes lie, and how they are looked through and trained on."""
    votes = typed(app_state.pairs.book.path)
    return f"# the votes are in {votes}\nlora-dpo data check {votes}\nlora-dpo train {votes}"


def train_recipe(recipe: Recipe, name: str) -> str:
    """A whole recipe, with the command that runs it: its adapter gets a free name of its own."""
    file = shlex.quote(f"{name}.yaml")
    search = f"# or, for the best settings for these pairs:  lora-dpo tune {file} --minutes 20"
    return f"# save this as {file}, then:  lora-dpo train {file}\n{search}\n{dump_settings(recipe, hidden={'output'})}"


def typed(path: Path) -> str:
    """A path as one types it: from the current folder, if it is in there."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _knows_its_base(app_state: AppState, folder: str) -> bool:
    try:
        return open_adapter(Path(shlex.split(folder)[0])).base[0] == app_state.host.base.name
    except LoraDPOError:
        return True  # that command says what is wrong
