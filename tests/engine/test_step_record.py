"""A step's record: log-ratios of its pairs, by a worked example and as TRL's own numbers have them."""

import pytest
import torch
from tiny import PAIRS, build, columns, tiny

from lora_dpo import DPOTrainer
from lora_dpo.engine.pair_batch import PairBatch
from lora_dpo.engine.step_record import StepRecord, answer_sums

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]])  # one pair: 3 chosen tokens, 1 rejected
LOG_PROBS = torch.tensor([[-1.0, -2.0, -4.0, -9.0], [-0.5, -9.0, -9.0, -9.0]])


def test_answers_are_summed_up_to_the_shorter_ones_length_and_beyond():
    assert answer_sums(LOG_PROBS, MASK) == [(-1.0, -6.0, -0.5, 0.0)]


@pytest.mark.parametrize(("alpha", "chosen"), [(None, -7.0), (0.5, -4.0), (0.0, -1.0)])
def test_log_ratios_are_the_policys_sums_less_the_references(alpha, chosen):
    inputs = {"ref_chosen_logps": torch.tensor([-3.0]), "ref_rejected_logps": torch.tensor([-0.25])}
    batch = PairBatch(inputs, tokens=[[1, 2, 3, 4, 5], [1, 2]], scored=[[0, 1, 1, 1, 0], [0, 1]])
    step = StepRecord(torch.tensor(0.0), batch, LOG_PROBS, parts=1)
    assert step.log_ratios(alpha).tolist() == [[chosen + 3.0, -0.25]]


def test_the_last_steps_log_ratios_are_those_that_trl_logs(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 1, 1
    trainer.training_step(trainer.model, trainer.data_collator(columns(PAIRS)))
    mean = trainer.engine.last.log_ratios(None).mean(dim=0)
    logged = [trainer._metrics["train"][f"rewards/{side}"][-1] / trainer.args.beta for side in ("chosen", "rejected")]
    assert mean.tolist() == pytest.approx(logged, abs=1e-4)
    assert mean.abs().min() > 1e-3
