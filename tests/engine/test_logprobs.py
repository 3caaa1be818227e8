"""The output head's values and their gradient, against float64 autograd and against TRL's kernel."""

import pytest
import torch
from tiny import PAIRS, build, columns, gradients_of, tiny
from trl.kernels import ChunkedLogProbFunction

from lora_dpo import DPOTrainer
from lora_dpo.engine import logprobs
from lora_dpo.engine.logprobs import EXTRAS, head_values


def inputs(tokens=7, width=5, vocabulary=11, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=draw) * 2 for s in ((tokens, width), (vocabulary, width), (vocabulary,))
    )
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), torch.randint(vocabulary, (tokens,), generator=draw)


def test_worked_example():
    # one token, h = 1, W = (0, ln 3): p = (1/4, 3/4)
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0]]).log()
    hidden.requires_grad_()
    values = head_values(hidden, weight, None, torch.tensor([1]), extras=EXTRAS)
    assert values.log_probs.item() == pytest.approx(-0.2876821, abs=1e-6)
    assert values.entropy.item() == pytest.approx(0.5623351, abs=1e-6)  # ln 4 - 3/4 ln 3
    assert values.log_sum_sq_probs.item() == pytest.approx(-0.4700036, abs=1e-6)  # ln(10/16)
    assert values.mean_logits.item() == pytest.approx(0.5493061, abs=1e-6)
    assert values.is_top1.item()
    values.log_probs.sum().backward()
    assert hidden.grad.item() == pytest.approx(0.2746531, abs=1e-6)  # W_1 - 3/4 W_1


@pytest.mark.parametrize("tile", [11 * 3, 1 << 25], ids=["tiles of 3 tokens", "one tile"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradient_equal_float64_autograd(tile, scale, softcap, with_bias, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE", tile)
    hidden, weight, bias, label = inputs()
    bias = bias if with_bias else None
    ours = hidden.clone().requires_grad_()
    weights = torch.arange(1.0, 8.0)
    values = head_values(ours, weight, bias, label, scale=scale, softcap=softcap, extras=EXTRAS)
    (values.log_probs * weights).sum().backward()
    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().t() + (bias.double() if with_bias else 0.0)
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1)
    picked = logps.gather(1, label[:, None]).squeeze(1)
    (picked * weights).sum().backward()
    assert torch.allclose(values.log_probs.double(), picked, atol=1e-5)
    assert torch.allclose(ours.grad.double(), exact.grad, atol=1e-5)
    assert torch.allclose(values.entropy.double(), -(logps.exp() * logps).sum(-1), atol=1e-5)
    assert torch.allclose(values.log_sum_sq_probs.double(), logps.exp().square().sum(-1).log(), atol=1e-5)
    assert torch.allclose(values.mean_logits.double(), logits.mean(-1), atol=1e-5)
    assert torch.equal(values.is_top1, logits.argmax(-1) == label)


def test_values_equal_trls_kernel():
    hidden, weight, _, label = inputs(tokens=20)
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, label, 1.0, 4, None, 1.0, EXTRAS)
    ours = head_values(hidden, weight, None, label, extras=EXTRAS)
    for name, value in zip(("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), theirs, strict=True):
        assert torch.allclose(getattr(ours, name).float(), value.float(), atol=1e-5), name


def test_what_is_not_asked_for_is_not_there_and_no_label_is_no_error():
    hidden, weight, _, label = inputs()
    assert head_values(hidden, weight, None, label)[1:] == (None, None, None, None)
    empty = head_values(hidden[:0].requires_grad_(), weight, None, label[:0], extras=EXTRAS)
    assert empty.log_probs.shape == (0,)
    empty.log_probs.sum().backward()


def test_under_autocast_products_run_in_bf16_and_values_in_float32():
    hidden, weight, _, label = inputs()
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = head_values(hidden, weight, None, label)
    assert values.log_probs.dtype == torch.float32
    values.log_probs.sum().backward()
    exact = hidden.detach().clone().requires_grad_()
    head_values(exact, weight, None, label).log_probs.sum().backward()
    assert torch.allclose(hidden.grad, exact.grad, atol=0.1)
    assert not torch.equal(hidden.grad, exact.grad)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_rematerialised_results_change_memory_not_a_bit_of_the_gradient(kind, tiny_model_folder, tmp_path):
    found, kept = [], []
    for remade in (True, False):
        trainer = build(DPOTrainer, tiny(kind), tiny_model_folder, tmp_path)
        rematerialiser = trainer.engine.forward.rematerialiser
        if not remade:
            rematerialiser.note = lambda *_: None  # counts on, keeps everything
        batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
        with trainer.engine.forward.count_kept() as bytes_kept:
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append(gradients_of(trainer))
        kept.append(sum(bytes_kept.values()))
    assert kept[0] < 0.9 * kept[1]
    for name, gradient in found[1].items():
        assert torch.equal(found[0][name], gradient), name
