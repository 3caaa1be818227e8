"""A step's pairs beside TRL's padded batch: what its rows are, and that they are found once."""

import pickle

import pytest
import torch
from tiny import PAIRS, build, columns, tiny

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.engine import pair_batch, pair_forward
from lora_dpo.engine.layout import stream_length
from lora_dpo.engine.pair_batch import PairBatch, merge_batches, rows_of
from lora_dpo.engine.reference_cache import pair_key


@pytest.fixture
def padded(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    return trainer.data_collator(columns(PAIRS))


def test_rows_without_the_padding():
    values, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert rows_of(mask, values, values == 6) == [[[5, 6], [7]], [[0, 1], [0]]]


def test_a_batch_knows_what_its_pairs_were(padded):
    batch = PairBatch.of(padded)
    sides = [pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS]
    assert batch.tokens == [pair.prompt + side for pair, side in zip(PAIRS * 2, sides, strict=True)]
    assert batch.scored == [[0] * len(p.prompt) + [1] * len(side) for p, side in zip(PAIRS * 2, sides, strict=True)]
    assert len(batch) == len(PAIRS)
    half = len(PAIRS)
    assert batch.lengths == [stream_length(batch.tokens[n], batch.tokens[half + n]) for n in range(half)]
    assert batch.keys == [pair_key(batch.tokens[n::half], batch.scored[n::half]) for n in range(half)]
    assert batch.prompts == [hash(tuple(pair.prompt)) for pair in PAIRS]


def test_a_part_has_the_rows_of_its_pairs(padded):
    batch = PairBatch.of({**padded, "pair_weight": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    part = batch.select([3, 1])
    assert part.rows.tolist() == [3, 1, 7, 5]
    assert part.tokens == [batch.tokens[row] for row in (3, 1, 7, 5)]
    assert part.scored == [batch.scored[row] for row in (3, 1, 7, 5)]
    assert part.inputs["pair_weight"].tolist() == [4.0, 2.0]
    assert rows_of(part.inputs["attention_mask"], part.inputs["input_ids"]) == [part.tokens]
    assert batch.whole().tokens == batch.tokens


def test_one_branch_stands_beside_a_sequence_that_adds_nothing(padded):
    part = PairBatch.of(padded).branch(5)
    assert part.rows.tolist() == [5]
    for name, found in (("input_ids", part.tokens), ("completion_mask", part.scored)):
        assert rows_of(part.inputs["attention_mask"], part.inputs[name]) == [found]
    assert len(part.tokens[1]) == 1
    assert part.scored[1] == [0]


def test_batches_of_several_widths_are_one(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    parts = [trainer.data_collator(columns(pairs)) for pairs in (PAIRS[:1], PAIRS[1:3], PAIRS[3:])]
    whole = trainer.data_collator(columns(PAIRS))
    assert PairBatch.of(merge_batches(parts, trainer.pad_id)).tokens == PairBatch.of(whole).tokens


@pytest.mark.parametrize("settings", [{}, {"tokens": 14}, {"split_pairs": True}])
def test_a_step_finds_its_rows_once_however_many_parts_it_has(settings, tiny_model_folder, tmp_path, monkeypatch):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, engine=EngineSection(**settings))
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 1, 1
    rows = trainer.data_collator(columns(PAIRS))
    trainer.training_step(trainer.model, rows)  # compares the engine with TRL's passes, and measures the memory
    found = []

    def counted(mask, *values):
        found.append(len(mask))
        return rows_of(mask, *values)

    monkeypatch.setattr(pair_batch, "rows_of", counted)
    monkeypatch.setattr(pair_forward, "rows_of", counted)
    trainer.training_step(trainer.model, rows)
    assert trainer.engine.last.parts > (1 if settings else 0)
    assert found == [2 * len(PAIRS)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 1.0]])
def test_what_makes_batches_goes_to_workers_that_begin_anew(weights, tiny_model_folder, tmp_path):
    """Windows and macOS start a loader's processes afresh and send them the collator; Linux has it there by a fork."""
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, weights=weights)
    rows = [trainer.train_dataset[number] for number in range(len(PAIRS))]
    ours, theirs = trainer.data_collator(rows), pickle.loads(pickle.dumps(trainer.data_collator))(rows)
    assert ours.keys() == theirs.keys()
    assert ("pair_weight" in ours) == (weights is not None)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
