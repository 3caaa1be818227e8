"""What a server says of adapters that change under it, and of kinds that plain PEFT loads."""

import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.errors import AdapterError
from lora_dpo.model.base import load_base
from lora_dpo.serving.adapter_pool import AdapterPool

IDS = torch.tensor([[257, 5, 6, 7, 8]])


@pytest.fixture
def pool(tiny_model_folder, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "adapters" / "mine")
    return AdapterPool(load_base(str(tiny_model_folder), quantize="none"), tmp_path / "adapters")


def refuse(replaced):
    def resident(self, name):
        if replaced:
            os.utime(self.folder / name / WEIGHTS)
        raise AdapterError("it was written to while it was read")

    return resident


def test_an_adapter_that_is_replaced_while_it_is_read_ahead_is_looked_at_again(pool, monkeypatch):
    monkeypatch.setattr(AdapterPool, "resident", refuse(replaced=True))
    pool.preload("mine")
    assert pool.names() == ["base", "mine"]


def test_an_adapter_that_cannot_be_read_is_left_out_as_long_as_it_is_the_same(pool, monkeypatch):
    monkeypatch.setattr(AdapterPool, "resident", refuse(replaced=False))
    pool.preload("mine")
    assert pool.names() == ["base"]
    assert "written to" in pool.incompatibility("mine")


def test_an_adapter_that_keeps_tied_weights_tied_is_what_plain_peft_makes_of_it(tiny_model_folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, tie_word_embeddings=True)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    trained = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trained.save_pretrained(tmp_path / "mine")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), tmp_path / "mine").eval()
    with pytest.warns(match="no passport"):
        ours = attach_adapter(load_base(str(tmp_path / "tied"), quantize="none"), tmp_path / "mine")
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, plain(IDS).logits)
