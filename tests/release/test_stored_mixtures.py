"""Mixtures of experts that came quantised: each expert's matrix is merged as the value that it stands for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import bitsandbytes_pieces, copies_of, eight_bit_floats
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lora_dpo import merge
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.errors import ModelError
from lora_dpo.model.base import load_base
from lora_dpo.release.merged_weights import plan_base

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures") / "plain"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, moe_intermediate_size=64, intermediate_size=64, head_dim=16,
        num_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(mixture):
    return copies_of(mixture, bitsandbytes_pieces)


def log_probabilities(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.log_softmax(-1)


@pytest.mark.parametrize("parameters", [[], "experts"], ids=["attention alone", "experts, too"])
def test_an_fp8_mixture_merged_is_the_live_one(stored, make_adapter, tmp_path, parameters):
    adapter = make_adapter(tmp_path / "adapter", model=stored("fp8"), quantize="auto", rank=2, parameters=parameters)
    live = log_probabilities(attach_adapter(load_base_of(adapter), adapter))
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged", dtype="float32"))
    assert torch.allclose(log_probabilities(merged), live, atol=2e-5)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.12), ("int8", 0.01), ("fp8", 0.04)])
def test_every_matrix_of_a_stored_mixture_is_its_value(mixture, stored, kind, most):
    plain = load_file(mixture / "model.safetensors")
    merged = plan_base(str(stored(kind)))
    assert merged.shapes == {name: tuple(weight.shape) for name, weight in plain.items()}
    for name, value in merged.tensors():
        assert (value - plain[name]).norm() <= most * plain[name].norm(), name


def without_scale(tensors, name):
    tensors.pop(f"{name}_scale_inv")


def two_numbers_a_byte(tensors, name):
    tensors[name] = tensors[name].view(torch.int8)


def a_scale_of_no_block(tensors, name):
    tensors[f"{name}_scale_inv"] = torch.ones(3)


@pytest.mark.parametrize("change", [without_scale, two_numbers_a_byte, a_scale_of_no_block])
@pytest.mark.parametrize("name", ["mlp.experts.2.up_proj.weight", "self_attn.q_proj.weight"])
def test_eight_bit_numbers_without_their_scales_are_refused_before_any_is_read(mixture, tmp_path, change, name):
    name = f"model.layers.1.{name}"
    folder = eight_bit_floats(mixture, tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is stored in an arrangement of 8-bit weights that is not read here"):
        plan_base(str(folder))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_transformers_would_load_as_codes_is_refused(stored, kind):
    with pytest.raises(ModelError, match=r"experts are stored quantised one by one.* Name its 16-bit original"):
        load_base(str(stored(kind)))
