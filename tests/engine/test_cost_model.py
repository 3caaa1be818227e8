"""What a step is predicted to keep, against what the engine keeps, on a small copy of each kind of model."""

from __future__ import annotations

import pytest
import torch
from kinds import STREAMS, skeleton

from lora_dpo.config.recipe import LoraSection
from lora_dpo.engine import PairForward
from lora_dpo.engine.cost_model import footprint, pair_shape
from lora_dpo.engine.small_copy import small_copy
from lora_dpo.model.lora import attach_lora, base_of

QUICK = ("llama", "qwen3_moe", "gpt_oss", "gemma4_text", "qwen3_5_text", "falcon_h1")


def pair_of_tokens(prompt=150, answer=50):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=draw).tolist() for length in (prompt, answer, answer)]


def kept_by_the_engine(model, prompt, chosen, rejected):
    ids = torch.tensor([prompt + chosen, prompt + rejected])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    base = base_of(model)
    forward = PairForward(base)
    try:
        with forward.count_kept() as kept:
            base(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    finally:
        forward.close()
    assert forward.streams == 1
    return sum(kept.values())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in STREAMS]
)
def test_bytes_that_a_pair_keeps_are_predicted_for_every_kind_of_layer(kind):
    small = small_copy(skeleton(kind))
    model = attach_lora(small.requires_grad_(False), LoraSection(rank=4), seed=0).train()
    pair = pair_of_tokens()
    predicted = footprint(model, itemsize=4, packed=False).kept_bytes(pair_shape(*pair))
    assert 0.8 < kept_by_the_engine(model, *pair) / predicted < 1.25


def dora(kind, dtype, **lora):
    small = small_copy(skeleton(kind)).to(dtype)
    return attach_lora(small.requires_grad_(False), LoraSection(rank=4, dora=True, **lora), seed=0).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_what_dora_keeps_is_counted(kind, dtype):
    model, pair = dora(kind, dtype), pair_of_tokens(600, 200)
    cost = footprint(model, itemsize=dtype.itemsize, packed=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        counted = kept_by_the_engine(model, *pair)
    assert 0.90 < counted / cost.kept_bytes(pair_shape(*pair)) < 1.05
    assert cost.pass_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_dropout_dora_keeps_the_weights_that_it_casts(dtype):
    """Of what dropout adds, the part that is the same for pairs of any length."""
    added = []
    for length in (100, 200):
        pair = pair_of_tokens(length)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            plain, dropped = (kept_by_the_engine(dora("llama", dtype, dropout=share), *pair) for share in (0.0, 0.1))
        added.append((pair_shape(*pair).stream, dropped - plain))
    (few, less), (many, more) = added
    same = less - few * (more - less) / (many - few)
    model = dora("llama", dtype, dropout=0.1)
    cost = footprint(model, itemsize=dtype.itemsize, packed=False)
    lowest = base_of(model).model.layers[0].self_attn  # what these read has no gradient, for which no weight is needed
    needless = sum(part.weight.numel() for part in (lowest.q_proj, lowest.k_proj, lowest.v_proj)) * 2
    assert same == pytest.approx(max(0, cost.pass_bytes() - needless), rel=0.001, abs=1)
    assert (cost.pass_bytes() > 0) == (dtype == torch.bfloat16)
    assert cost.gradient_bytes() == 0  # frozen: no stacked weight with an adapter


MIXTURES = ("qwen3_moe", "olmoe", "mixtral", "gpt_oss")


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("parameters", ["experts", ["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj"]])
def test_adapters_on_experts_keep_the_whole_weight_once_and_what_it_reads(kind, parameters):
    def kept(lora, length):
        small = small_copy(skeleton(kind))
        model = attach_lora(small.requires_grad_(False), LoraSection(rank=4, **lora), seed=0).train()
        cost = footprint(model, itemsize=4, packed=False)
        pair = pair_of_tokens(length)
        return kept_by_the_engine(model, *pair), cost.kept_bytes(pair_shape(*pair)), cost.pass_bytes()

    for length in (150, 300):
        counted, predicted, whole = kept({"parameters": parameters}, length)
        plain, plainly, none = kept({}, length)
        assert none == 0
        assert counted - plain == pytest.approx(predicted - plainly + whole, rel=1e-6)


def test_a_checkpointed_layer_keeps_no_merged_weight_but_while_it_is_run_again():
    model = attach_lora(small_copy(skeleton("qwen3_moe")), LoraSection(rank=4, parameters="experts"), seed=0)
    cost = footprint(model, itemsize=2, packed=False)
    layer = 4 * (96 * 128 + 128 * 48) * 2
    # when the lower of the two layers is run again, what the upper one kept is free
    assert [cost.pass_bytes(checkpointed=count) for count in (0, 1, 2)] == [2 * layer, layer, layer]
    assert cost.gradient_bytes() == 4 * 96 * 128 * 2


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in STREAMS]
)
def test_a_model_of_its_real_size_is_counted_without_its_weights(kind):
    model = attach_lora(skeleton(kind), LoraSection(rank=16), seed=0)
    cost = footprint(model, itemsize=2, packed=True)
    assert len(cost.layers) == model.config.num_hidden_layers
    assert all(layer.token_bytes > 0 for layer in cost.layers)
    assert cost.widest >= cost.hidden or kind == "nanochat"


def test_what_no_adapter_can_be_put_on_is_left_out_of_all_linear():
    model = attach_lora(skeleton("falcon_h1"), LoraSection(rank=4), seed=0)
    adapted = {name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "lora_A")}
    assert "out_proj" not in adapted
    assert {"in_proj", "q_proj", "down_proj"} <= adapted
