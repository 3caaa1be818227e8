"""Scores of answers outside training, where rotary frequencies depend on the longest row of a call."""

import pytest
import torch
from tiny import DYNAMIC, LONGROPE, pair, tiny

from lora_dpo.engine.proof import unsupported_reason
from lora_dpo.engine.scoring import score_pairs

PAIRS = [
    pair([1, *range(20, 30)], [8, 9, 10, 11, 2], [*range(40, 70), 2]),  # 16 and 42 tokens
    pair([1, *range(20, 38)], [8, 9, 2], [10, 2]),  # 22 and 21
    pair([1, 5, 6, 7], [8, 9, 2], [10, 2]),
    pair([1, *range(50, 60)], [12, 13, 14, 15, 2], [10, 2]),  # 16 and 13: not beyond
    pair([1, *range(70, 80)], [12, 13, 14, 15, 16, 2], [10, 2]),  # 17
    pair([1, 20], [21, 22, 23, 24, 2], [21, 22, 30]),
]


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("kind", "rope"), [("phi3", LONGROPE), ("llama", DYNAMIC | {"max_position_embeddings": 16}), ("qwen3", {})]
)
def test_long_rows_have_the_frequencies_that_they_have_alone(kind, rope, streams, monkeypatch):
    if not streams:
        monkeypatch.setattr("lora_dpo.engine.proof.unsupported_reason", lambda model: "a test")
    else:
        assert unsupported_reason(tiny(kind, **rope).requires_grad_(False)) is None
    model = tiny(kind, **rope).requires_grad_(False)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 60)[None])  # what was computed before does not matter
    scores = score_pairs(model, PAIRS, pad_id=0)
    for number, one in enumerate(PAIRS):
        for answer, score in zip((one.chosen, one.rejected), (side[number] for side in scores), strict=True):
            ids_1T = torch.tensor([one.prompt + answer])
            labels_1T = ids_1T.clone()
            labels_1T[:, : len(one.prompt)] = -100
            with torch.no_grad():
                loss = tiny(kind, **rope)(input_ids=ids_1T, labels=labels_1T).loss.item()
            assert score == pytest.approx(-loss * len(answer), rel=1e-5)
