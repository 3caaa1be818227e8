"""Which token pads changes nothing: none, the end of the turn, or one of its own."""

import copy

import pytest
import tiny
from tiny import assert_close, one_step, pair

from lora_dpo.training.dpo_trainer import DPOTrainer

END = 257
ENDING = [pair([1, 5, 6, 7], [8, 9, END], [10, END]), pair([1, 20], [21, END], [22, 23, 24, END])]


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_the_end_of_a_turn_is_learnt_whatever_pads(tokenizer, tmp_path, monkeypatch, pad):
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == END
    monkeypatch.setattr(tiny, "PAIRS", ENDING)
    found = []
    for name, token in (("own", "<|endoftext|>"), ("other", pad)):
        changed = copy.deepcopy(tokenizer)
        changed.pad_token = token
        changed.save_pretrained(tmp_path / name)
        loss, gradients, _, trainer = one_step(DPOTrainer, "llama", tmp_path / name, tmp_path / f"{name}-run")
        assert trainer.processing_class.pad_token == (token or "<|im_end|>")
        found.append((loss, gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_close(found[0][1], found[1][1])
