"""Checkpointed layers whose inputs wait in main memory: the same gradients, dropout too, and nothing else kept."""

import pytest
import torch
from peft import LoraConfig
from tiny import PAIRS, assert_close, build, columns, gradients_of, tiny

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.engine.checkpointing import checkpoint_lowest, checkpoint_on_host
from lora_dpo.engine.trunk_cache import decoder_layers
from lora_dpo.errors import ConfigError
from lora_dpo.model.lora import base_of

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.2)


def gradients(folder, tmp_path, count, *, kind="llama", **options):
    torch.manual_seed(3)
    trainer = build(DPOTrainer, tiny(kind), folder, tmp_path, gradient_checkpointing=True, **options)
    trainer.model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = trainer.state.logging_steps = 1
    budget, layers = trainer.engine.whole_step.budget, decoder_layers(base_of(trainer.model))
    budget.set_checkpointing = lambda _: checkpoint_lowest(layers, count, offload=True)
    torch.manual_seed(4)
    trainer.training_step(trainer.model, trainer.data_collator(columns(PAIRS)))
    return gradients_of(trainer)


@pytest.mark.parametrize(
    ("kind", "count", "split_pairs"), [("llama", 1, False), ("gemma2", 2, False), ("llama", 2, True)]
)
def test_the_gradient_is_that_without_checkpointing(kind, count, split_pairs, tiny_model_folder, tmp_path):
    # without, nothing above the frozen embeddings asks for a gradient of the first layer's input
    options = dict(kind=kind, engine=EngineSection(split_pairs=split_pairs))
    plain = gradients(tiny_model_folder, tmp_path, 0, **options)
    assert_close(gradients(tiny_model_folder, tmp_path, count, **options), plain)


def test_dropout_draws_the_same_again(tiny_model_folder, tmp_path):
    plain = gradients(tiny_model_folder, tmp_path, 0, lora=LORA)
    assert_close(gradients(tiny_model_folder, tmp_path, 2, lora=LORA), plain)


@pytest.mark.parametrize("needs", [True, False])
def test_a_layer_keeps_what_it_is_given_and_no_more(needs, monkeypatch):
    layer, hidden = torch.nn.Linear(3, 3), torch.randn(1, 5, 3, requires_grad=needs)
    moved = []
    real = torch.autograd.graph.save_on_cpu

    class Watched(real):
        def __init__(self, *, pin_memory):
            super().__init__(pin_memory=pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (moved.append(tensor.shape), pack(tensor))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    checkpoint_on_host(lambda given: torch.tanh(layer(given)), hidden).sum().backward()
    assert moved == [hidden.shape]
    found = [layer.weight.grad.clone(), hidden.grad]
    layer.zero_grad()
    hidden.grad = None
    torch.tanh(layer(hidden)).sum().backward()
    assert torch.allclose(found[0], layer.weight.grad)
    assert (found[1] is None) == (not needs)
    assert not needs or torch.allclose(found[1], hidden.grad)


def test_on_a_cpu_it_is_refused(tiny_model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.offload moves what layers are given from a GPU"):
        build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, engine=EngineSection(offload=True))
