"""What a recipe's header says of download, memory and time is what a plan of the recipe says."""

import re
from pathlib import Path

import pytest
from published import long_pairs, published_model

from lora_dpo.config.reading import read_recipe
from lora_dpo.training.planning.cards import GB
from lora_dpo.training.planning.make_plan import plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ON_A_CARD = {"8gb-3b": "granite-4.1-3b", "24gb-8b": "granite-4.1-8b"}
"""Recipes for a card, and whose sizes their model has."""


def header(name):
    """The comment at a recipe's top, on one line."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:first])


def said(name, pattern):
    found = re.search(pattern, header(name))
    assert found, f"the header of {name} says nothing like: {pattern}"
    return found.groups()


def test_every_header_that_names_an_amount_of_memory_is_held():
    naming = {path.stem for path in CONFIGS.rglob("*.yaml") if re.search(r"^# Memory", path.read_text(), re.MULTILINE)}
    assert naming == {*ON_A_CARD, "quickstart"}


@pytest.mark.parametrize("name", ON_A_CARD)
def test_a_header_says_what_the_plan_says(name, tmp_path, tokenizer):
    model = published_model(tmp_path / "model", ON_A_CARD[name], tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 16)
    recipe = read_recipe(CONFIGS / f"{name}.yaml")
    assert recipe.model.name == f"ibm-granite/{ON_A_CARD[name]}"
    total, available, card, least = said(name, r"Memory +([\d.]+) of ([\d.]+) GB on an (RTX [^;]+); ([\d.]+) GB is the")
    given = [f"model.name={model}", f"data.train={pairs}", f"data.eval={pairs}"]
    planned = plan(read_recipe(CONFIGS / f"{name}.yaml", given), card=card)
    assert planned.tokens.cut == 16  # all of them fill max_length
    memory, loading = planned.memory, planned.loading
    assert [total, available, least] == [f"{one / GB:.1f}" for one in (memory.total, memory.available, memory.least)]
    assert memory.verdict == "fits"
    assert said(name, r"Download +([\d.]+) GB") == (f"{loading.download / GB:.1f}",)
    (enough,) = said(name, r"(\d+) GB of main memory")
    assert 0.3 < loading.main_memory / GB / float(enough) < 0.6  # the rest for the system and whatever else runs
    hours, on, steps, batch = said(name, r"Time +([\d.]+) hours on an (RTX .+?) for (\d+) steps of (\d+) pairs")
    assert on == card
    (count,) = re.search(r"\[:(\d+)\]", recipe.data.train).groups()
    assert int(steps) * int(batch) == int(count)
    assert planned.steps.pairs == int(batch)
    assert f"{planned.time.seconds / planned.steps.steps * int(steps) / 3600:.1f}" == hours


def test_the_quickstarts_header_says_what_the_plan_says(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    planned = plan(read_recipe("configs/quickstart.yaml"), memory="16GB")
    memory = planned.memory
    (told,) = said("quickstart", r"Memory +(\d+) GB of main memory by lora-dpo plan")
    # libraries as a command of its own has them: this process has loaded more, or fewer, of them
    assert abs(memory.total - memory.libraries + 1.0 * GB - int(told) * GB) < 0.5 * GB
