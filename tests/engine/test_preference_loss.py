"""DPO's loss in eight lines: a worked example, stock TRL as the oracle, and the identity at step 0."""

import dataclasses
import math

import pytest
import torch
from tiny import PAIRS, Stock, build, columns, tiny
from trl.trainer.utils import FusedCausalLMOutput

from lora_dpo.engine.pair_forward import TokenTables
from lora_dpo.engine.preference_loss import preference_loss


def test_a_worked_example():
    # h = (1, -1) nats and β = 0.5: a margin of 1, and -log σ(1) = log(1 + e⁻¹) = 0.31326
    loss_B, chosen_B, rejected_B = preference_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.5)
    assert loss_B.item() == pytest.approx(0.3132617)
    assert (chosen_B.item(), rejected_B.item()) == (0.5, -0.5)


def test_where_policy_and_reference_are_one_it_is_ln_2_and_pulls_both_ways():
    chosen_B, rejected_B = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    loss_B, *_ = preference_loss(chosen_B, rejected_B, beta=0.1)
    assert loss_B.tolist() == pytest.approx([math.log(2)] * 3)
    loss_B.sum().backward()  # eq. 7's gradient: -β·σ(-margin) on the chosen answer, as much the other way on the other
    assert chosen_B.grad.tolist() == pytest.approx([-0.05] * 3)
    assert rejected_B.grad.tolist() == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_stock_trls_of_the_same_log_ratios(pair, tiny_model_folder, tmp_path):
    trainer = build(Stock, tiny("llama"), tiny_model_folder, tmp_path, pairs=[pair], loss_type="sigmoid")
    batch = trainer._prepare_inputs(trainer.data_collator(columns([pair])))
    loss = trainer.compute_loss(trainer.model, batch)
    rewards = [torch.tensor(trainer._metrics["train"][f"rewards/{side}"]) for side in ("chosen", "rejected")]
    assert abs(rewards[0] - rewards[1]) > 1e-4
    loss_B, *found = preference_loss(*(reward_B / trainer.beta for reward_B in rewards), beta=trainer.beta)
    assert loss_B.item() == pytest.approx(loss.item(), rel=1e-6)
    assert [reward_B.item() for reward_B in found] == pytest.approx([reward_B.item() for reward_B in rewards])


def test_the_engines_tables_have_the_fields_that_trl_reads():
    assert [each.name for each in dataclasses.fields(TokenTables)] == [
        each.name for each in dataclasses.fields(FusedCausalLMOutput)
    ]
