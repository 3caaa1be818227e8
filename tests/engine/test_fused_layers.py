"""A norm and an adapter by one autograd function each: against float64, against transformers' and PEFT's own."""

import math

import pytest
import torch
from kinds import STREAMS, skeleton
from peft import LoraConfig, get_peft_model
from tiny import tiny
from torch._decomp import decomposition_table
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_dpo.engine import fused_layers, products
from lora_dpo.engine.fused_layers import FusedLayers, frozen_weight, fused_rms_norm, fusible, is_norm, norm_offset

EPS = 1e-2  # where it counts


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(kind, width=12):
    made = kind(width, eps=EPS)
    made.weight = torch.nn.Parameter(drawn(width, seed=1), requires_grad=False)
    return made


def gradient(function, hidden, slope):
    hidden = hidden.clone().requires_grad_()
    result = function(hidden)
    result.backward(slope)
    return result.detach(), hidden.grad


# ---- norms


def test_worked_example_of_a_norm():
    # x = (3, 4), ε = 0: mean square 12.5, so x̂ = (3, 4) / 3.5355339; w = (2, 1)
    hidden = torch.tensor([3.0, 4.0], requires_grad=True)
    found = fused_rms_norm(hidden, torch.tensor([2.0, 1.0]), eps=0.0)
    assert found.tolist() == pytest.approx([1.6970563, 1.1313708])
    found[0].backward()
    # ∂y_0/∂x = w_0·ρ·(e_0 - x̂·x̂_0/2) = 2·0.2828427·(1 - 0.36, -0.48)
    assert hidden.grad.tolist() == pytest.approx([0.3620387, -0.2715290])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_and_its_gradient_equal_float64(offset):
    hidden, weight, slope = drawn(2, 5, 12), drawn(12, seed=1), drawn(2, 5, 12, seed=2)

    def exact(hidden):
        scale = (hidden.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return hidden * scale * (weight.double() + offset)

    wanted = gradient(exact, hidden.double(), slope.double())
    found = gradient(lambda x: fused_rms_norm(x, weight, eps=EPS, offset=offset), hidden, slope)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-6)


@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_rounds_where_the_models_own_does(kind, offset, dtype):
    own = norm(kind).to(dtype)
    hidden = drawn(7, 12).to(dtype)
    assert torch.equal(fused_rms_norm(hidden, own.weight, eps=EPS, offset=offset), own(hidden))


@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_a_gpu_are_called_with_what_they_want(kind, offset, dtype, monkeypatch):
    # torch's own description of the backward kernel, in terms of other operations, runs on a CPU
    slope_of = decomposition_table[torch.ops.aten._fused_rms_norm_backward.default]
    asked = []

    def on_cpu(grad, hidden, scale, weight):
        asked.append({grad.dtype, hidden.dtype, weight.dtype})
        return slope_of(grad, hidden, weight.shape, scale, weight, [True, False])[0]

    own = norm(kind).to(dtype)
    hidden, slope = drawn(7, 12).to(dtype), drawn(7, 12, seed=2).to(dtype)
    wanted = gradient(own, hidden, slope)
    monkeypatch.setattr(fused_layers, "has_norm_kernels", lambda device: True)
    monkeypatch.setattr(fused_layers, "norm_slope_kernel", on_cpu)
    found = gradient(lambda x: fused_rms_norm(x, own.weight, eps=EPS, offset=offset), hidden, slope)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.allclose(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert [len(dtypes) for dtypes in asked] == [1]


def test_a_norm_keeps_its_input_and_one_number_a_row():
    hidden = drawn(7, 12).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fused_rms_norm(hidden, norm(LlamaRMSNorm).bfloat16().weight, eps=EPS)
    assert sorted(kept) == [7 * 4, 7 * 12 * 2]


class Centred(LlamaRMSNorm):
    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class WithoutEps(LlamaRMSNorm):
    def forward(self, hidden):
        return self.weight * hidden * hidden.square().mean(-1, keepdim=True).rsqrt()


def test_a_norm_is_known_by_what_it_computes():
    assert norm_offset(norm(LlamaRMSNorm)) == 0.0
    assert norm_offset(norm(Gemma2RMSNorm)) == 1.0
    assert norm_offset(norm(Centred)) is None
    assert norm_offset(norm(WithoutEps)) is None
    trained = norm(LlamaRMSNorm)
    trained.weight.requires_grad_()
    assert not is_norm(trained)
    assert not is_norm(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("kind", STREAMS)
def test_the_norms_of_every_architecture_are_known_or_left_alone(kind):
    for part in skeleton(kind).requires_grad_(False).modules():
        if is_norm(part) and type(part).__name__.endswith("RMSNorm"):
            # Those with a scale of its own kind are few, and must not be taken for one of the two
            assert norm_offset(part) in (0.0, 1.0), type(part).__name__


class Gated(LlamaRMSNorm):
    def forward(self, hidden, gate=None):
        return super().forward(hidden if gate is None else hidden * torch.sigmoid(gate))


def test_a_norm_that_is_given_a_gate_runs_as_it_is():
    model = torch.nn.Sequential(gated := norm(Gated))
    hidden, gate = drawn(7, 12), drawn(7, 12, seed=3)
    wanted = gated(hidden, gate), gated(hidden)
    FusedLayers(model).install()
    assert "forward" in vars(gated)
    assert torch.equal(gated(hidden, gate), wanted[0])
    assert torch.allclose(gated(hidden), wanted[1], atol=1e-6)


# ---- adapters


class Two(torch.nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 20, bias=bias), torch.nn.Linear(20, 8, bias=bias)

    def forward(self, hidden):
        return self.second(torch.tanh(self.first(hidden)))


def adapted(*, bias=False, dtype=torch.float32, lora=(), **moves):
    torch.manual_seed(0)
    model = Two(bias).to(dtype).requires_grad_(False)
    made = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], **dict(lora)))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = drawn(*parameter.shape, seed=len(name)) * 0.3
    return made.train()


def passed(model, hidden, slope):
    """Its output, and the gradients of its input and of all that is trained."""
    model.zero_grad()
    result, of_input = gradient(model, hidden, slope)
    return [result, of_input, *(p.grad for p in model.parameters() if p.requires_grad)]


def fused(model):
    layers = FusedLayers(model)
    layers.install()
    return layers


HIDDEN, SLOPE = drawn(2, 5, 12), drawn(2, 5, 8, seed=2)


def test_worked_example_of_an_adapter():
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)), LoraConfig(r=1, lora_alpha=2, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    layer.base_layer.weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]), requires_grad=False)
    layer.lora_A.default.weight.data = torch.tensor([[3.0, 1.0]])
    layer.lora_B.default.weight.data = torch.tensor([[0.5]])
    fused(model)
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = layer(hidden)
    assert found.item() == 4.0  # 1 - 2 + 2·0.5·(3 + 2)
    found.backward()
    assert hidden.grad.tolist() == [[4.0, 0.0]]  # (1, -1) + 2·0.5·(3, 1)
    assert layer.lora_A.default.weight.grad.tolist() == [[1.0, 2.0]]  # 2·0.5·x
    assert layer.lora_B.default.weight.grad.tolist() == [[10.0]]  # 2·(3 + 2)


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_and_its_gradients_equal_pefts(bias):
    model = adapted(bias=bias)
    wanted = passed(model, HIDDEN, SLOPE)
    layers = fused(model)
    assert fusible(model.base_model.model.first, HIDDEN) is not None
    for ours, theirs in zip(passed(model, HIDDEN, SLOPE), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    layers.remove()
    assert all(torch.equal(*two) for two in zip(passed(model, HIDDEN, SLOPE), wanted, strict=True))


def test_a_frozen_input_gets_no_gradient_and_costs_no_product():
    model = adapted()
    fused(model)
    model(HIDDEN).backward(SLOPE)
    assert HIDDEN.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_only_what_is_trained_gets_a_gradient(trained):
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    wanted = passed(model, HIDDEN, SLOPE)
    fused(model)
    found = passed(model, HIDDEN, SLOPE)
    assert all(torch.allclose(*two, atol=1e-6) for two in zip(found, wanted, strict=True))


def distance(found, exact):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def test_under_autocast_an_adapter_is_nearer_to_float64_than_pefts():
    model = adapted(dtype=torch.bfloat16)
    exact = passed(adapted(dtype=torch.bfloat16).double(), HIDDEN.double(), SLOPE.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = distance(passed(model, HIDDEN.bfloat16(), SLOPE.bfloat16()), exact)
        fused(model)
        ours = distance(passed(model, HIDDEN.bfloat16(), SLOPE.bfloat16()), exact)
    assert max(ours) < 0.02
    assert sum(ours) < 1.2 * sum(theirs)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_rounded_copies_are_of_the_weights_as_they_now_are():
    model = adapted(dtype=torch.bfloat16)
    layers = FusedLayers(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            layers.install()  # before each pass
            found = passed(model, HIDDEN.bfloat16(), SLOPE.bfloat16())
            layers.remove()
            wanted = passed(model, HIDDEN.bfloat16(), SLOPE.bfloat16())
        assert max(distance(found, [part.double() for part in wanted])) < 0.03
        for parameter in model.parameters():
            parameter.data += 0.5 * parameter.requires_grad


def test_sums_that_a_gpu_need_not_round_are_not(monkeypatch):
    monkeypatch.setattr(products, "widens", lambda device: True)
    monkeypatch.setattr(products, "wide_product", lambda left, right: (left.double() @ right.double()).float())
    model = adapted(dtype=torch.bfloat16)
    fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        passed(model, HIDDEN.bfloat16(), SLOPE.bfloat16())
    slopes = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert any(not torch.equal(slope, slope.bfloat16().float()) for slope in slopes)


def test_a_base_in_4_bits():
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    inner = torch.nn.Sequential(Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")).to(
        "cpu"
    )
    inner.is_loaded_in_4bit = True
    model = get_peft_model(inner, LoraConfig(r=3, lora_alpha=6, target_modules=["0"])).train()
    layer = model.base_model.model[0]
    layer.lora_B.default.weight.data = drawn(128, 3)
    hidden, slope = drawn(4, 64), drawn(4, 128, seed=2)
    wanted = passed(model, hidden, slope)
    fused(model)
    assert fusible(layer, hidden) is not None
    assert all(
        torch.allclose(*two, rtol=1e-5, atol=1e-5) for two in zip(passed(model, hidden, slope), wanted, strict=True)
    )
    assert torch.allclose(layer.base_layer(hidden), hidden @ frozen_weight(layer.base_layer).float().t(), atol=1e-5)


def two_adapters(model):
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])


def another_forward(model):
    for part in model.modules():
        if hasattr(part, "base_layer"):
            part.base_layer.forward = part.base_layer.forward


ODD = {
    "dropout": (dict(lora_dropout=0.5), lambda model: None),
    "dora": (dict(use_dora=True), lambda model: None),
    "a bias of its own": (dict(lora_bias=True), lambda model: None),
    "two at once": ({}, two_adapters),
    "merged": ({}, lambda model: model.merge_adapter()),
    "switched off": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "a trained base": ({}, lambda model: model.requires_grad_(True)),
    "another's forward": ({}, another_forward),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_what_is_not_plain_runs_through_peft(odd):
    lora, change = ODD[odd]
    model = adapted(lora=lora)
    change(model)
    torch.manual_seed(1)
    wanted = model(HIDDEN)
    fused(model)
    assert fusible(model.base_model.model.first, HIDDEN) is None
    torch.manual_seed(1)
    assert torch.equal(model(HIDDEN), wanted)


def test_without_autocast_a_float32_adapter_on_a_16_bit_base_runs_through_peft():
    model = adapted(dtype=torch.bfloat16)
    assert fusible(model.base_model.model.first, HIDDEN.bfloat16()) is None


def test_dropout_that_is_off_in_an_evaluation_changes_nothing():
    model = adapted(lora=dict(lora_dropout=0.5)).eval()
    assert fusible(model.base_model.model.first, HIDDEN) is not None


def test_what_somebody_else_has_put_in_stays():
    model = adapted()
    layer = model.base_model.model.first
    layer.forward = theirs = lambda hidden: hidden[..., :1].expand(*hidden.shape[:-1], 20)
    layers = fused(model)
    assert layer.forward is theirs
    layers.remove()
    assert layer.forward is theirs


def test_after_a_step_the_model_has_its_own_forward_passes(tiny_model_folder, tmp_path):
    from tiny import PAIRS, build, columns

    from lora_dpo import DPOTrainer

    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = trainer.state.logging_steps = 1
    trainer.training_step(trainer.model, trainer.data_collator(columns(PAIRS)))
    ours = trainer.engine.forward.model
    assert not [name for name, part in trainer.model.named_modules() if "forward" in vars(part) and part is not ours]
    assert math.isfinite(sum(float(p.grad.sum()) for p in trainer.model.parameters() if p.requires_grad))
