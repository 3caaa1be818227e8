"""Apple's GPU, by torch's answers: none can be used here, so what is asked of torch is looked at."""

import pytest
import torch
from transformers import PreTrainedModel

from lora_dpo.config.reading import check_recipe
from lora_dpo.config.trl_dpo import trainer_config, trainer_settings
from lora_dpo.engine.step_record import answer_sums
from lora_dpo.errors import ConfigError
from lora_dpo.model.base import decide_packed, load_base, load_skeleton
from lora_dpo.model.device import device_name, give_back_memory, pick_device, pick_dtype
from lora_dpo.model.quantised import nf4_value


@pytest.fixture
def apple(monkeypatch):
    """A Mac whose GPU torch can use; `apple(asked="mps", macos=13)` for what is asked of it, and an older system."""

    def answers(*, asked: str | None = "mps", macos: int = 14) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if asked is None:
            monkeypatch.delenv("LORA_DPO_DEVICE", raising=False)
        else:
            monkeypatch.setenv("LORA_DPO_DEVICE", asked)

    return answers


@pytest.mark.parametrize("asked", [None, "", "auto"])
def test_it_is_not_taken_by_itself(apple, asked):
    apple(asked=asked)
    assert pick_device() == torch.device("cpu")


def test_it_is_taken_when_it_is_asked_for_and_computes_in_16_bits(apple):
    apple()
    assert pick_device() == torch.device("mps")
    assert pick_dtype("auto", torch.device("mps")) == "bfloat16"
    assert pick_dtype("float16", torch.device("mps")) == "float16"
    assert device_name(torch.device("mps")) == "Apple GPU (untested)"
    apple(macos=13)
    assert pick_dtype("auto", torch.device("mps")) == "float32"


def test_where_there_is_none_that_is_said(monkeypatch):
    monkeypatch.setenv("LORA_DPO_DEVICE", "mps")
    with pytest.raises(ConfigError, match="torch offers no Apple GPU here"):
        pick_device()


@pytest.mark.parametrize("asked", ["gpu", "cuda", "cpu", "MPS"])
def test_another_word_is_refused(monkeypatch, asked):
    monkeypatch.setenv("LORA_DPO_DEVICE", asked)
    with pytest.raises(ConfigError, match=f"LORA_DPO_DEVICE is '{asked}': allowed are auto and mps"):
        pick_device()


def test_the_trainer_uses_it_only_when_it_is_asked_for(apple, tmp_path):
    """transformers takes an Apple GPU by itself, and moves the model there."""
    settings = trainer_settings(check_recipe({"model": {"name": "m"}, "data": {"train": "a.jsonl"}}))
    for asked, use_cpu in (("mps", False), (None, True)):
        apple(asked=asked)
        config = trainer_config(settings, output_dir=tmp_path, dtype="bfloat16")
        assert (config.use_cpu, config.bf16, config.fp16) == (use_cpu, False, False)


def test_4_bit_values_are_made_on_the_cpu_and_held_there_dequantised(apple, tiny_model_folder, monkeypatch):
    apple()
    moved, loaded = [], []
    real = PreTrainedModel.from_pretrained.__func__

    def noted(cls, *given, **named):
        loaded.append(named["device_map"][""])
        assert "quantization_config" not in named
        return real(cls, *given, **named)

    def to(self, *places, **named):
        weight = self.model.layers[0].mlp.up_proj.weight
        moved.append((*places, weight.device.type, weight.detach().clone()))
        return self

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noted))
    monkeypatch.setattr(PreTrainedModel, "to", to)
    base = load_base(str(tiny_model_folder), quantize="nf4")
    assert loaded == [torch.device("cpu")]
    [(place, there, weight)] = moved[-1:]
    assert (place, there) == (torch.device("mps"), "cpu")
    stored = load_base(str(tiny_model_folder), quantize="none", dtype="bfloat16", device="cpu")
    assert torch.equal(weight, nf4_value(stored.model.model.layers[0].mlp.up_proj.weight.data))
    assert (base.packed, base.dtype) == (False, "bfloat16")


def test_packed_weights_are_refused_there(apple, tiny_model_folder):
    apple()
    assert not decide_packed(load_skeleton(str(tiny_model_folder)), torch.device("mps"), torch.bfloat16)
    with pytest.raises(ConfigError, match="no 4-bit kernels are known for Apple GPUs: set it to false"):
        load_base(str(tiny_model_folder), quantize="nf4", packed=True)


def test_its_memory_is_given_back(apple, monkeypatch):
    apple(asked=None)
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(True))
    give_back_memory()
    assert emptied == [True]


def test_sums_in_float64_are_made_on_the_cpu(monkeypatch):
    """Apple's GPUs have no float64. The table stands for one on such a GPU: it refuses to become one where it is."""
    table = torch.tensor([[-1.0, -2.0], [-4.0, 0.0]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    real, asked = torch.Tensor.double, []

    def cpu(self, *given):
        copy = self.clone()
        asked.append(copy)
        return copy

    def double(self):
        assert any(self is copy for copy in asked), "float64 where the table is"
        return real(self)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", double)
    assert answer_sums(table, mask) == [(-1.0, -2.0, -4.0, 0.0)]
