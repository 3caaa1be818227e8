"""The table of docs/gpu.md that says what fits on which card is what `lora-dpo plan` says."""

from pathlib import Path

import pytest
from published import long_pairs, published_model

from lora_dpo.config.reading import read_recipe
from lora_dpo.training.planning.cards import GB
from lora_dpo.training.planning.make_plan import plan

ROOT = Path(__file__).resolve().parents[2]
CARDS = ("6GB", "8GB", "12GB", "16GB", "24GB")


def line_of(shape, folder, pairs, length):
    """One model and length: for each card the peak, how many layers are computed again, and the verdict."""
    cells = []
    for card in CARDS:
        given = [f"model.name={folder}", f"data.train={pairs}", f"data.eval={pairs}", f"trainer.max_length={length}"]
        memory = plan(read_recipe(ROOT / "configs" / "24gb-8b.yaml", given), card=card).memory
        if memory.verdict == "does not fit":
            cells.append(f"no: {memory.least / GB:.1f}")
        else:
            cells.append(f"{memory.verdict}: {memory.total / GB:.1f}, {memory.checkpointed} of {memory.layers}")
    return f"| {shape}, {length} | " + " | ".join(cells) + " |"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["granite-4.1-3b", "llama-3.1-8b"])
def test_the_table_of_cards_is_what_the_plan_says(shape, tmp_path, tokenizer):
    model = published_model(tmp_path / "model", shape, tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 16)
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    lines = [line_of(shape, model, pairs, length) for length in (1024, 2048)]
    assert [line for line in lines if line not in page] == []
