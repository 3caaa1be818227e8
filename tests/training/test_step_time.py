"""What the time of a step is computed from, held against counts of the engine's own passes."""

import sys
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dpo.training.planning.step_time import LAYER_SECONDS, TRAFFIC_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no part of the package
from step_counts import counted_step, fake_nf4_llama, hh_rows

LAYERS, HIDDEN = 8, 4096
ONE_LONG_PAIR = [{"prompt_ids": [*range(128)], "chosen_ids": [*range(200, 1096)], "rejected_ids": [*range(300, 1196)]}]


@pytest.mark.parametrize("rows", [hh_rows(), ONE_LONG_PAIR], ids=["eight short pairs", "one long pair"])
def test_what_passes_move_and_launch_is_what_time_is_computed_from(rows):
    with FakeTensorMode():
        counts = counted_step(fake_nf4_llama("8b", LAYERS), rows)[:2]
        head = counted_step(fake_nf4_llama("8b", 1), rows)[:2]  # what is not of the layers, and one of them
    traffic, kernels = (
        (sum(getattr(each, name) for each in counts) - sum(getattr(each, name) for each in head)) / (LAYERS - 1)
        for name in ("traffic", "launches")
    )
    tokens = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) - 1 for row in rows)
    assert traffic / (tokens * HIDDEN) == pytest.approx(TRAFFIC_BYTES, rel=0.2)
    assert kernels * 7e-6 == pytest.approx(LAYER_SECONDS, rel=0.2)
