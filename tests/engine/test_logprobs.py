"""The output head's values and their gradient, against float64 autograd and against TRL's kernel."""

import pytest
import torch
from tiny import PAIRS, build, columns, gradients_of, tiny
from trl.kernels import ChunkedLogProbFunction

from lora_dpo import DPOTrainer
from lora_dpo.engine import logprobs, products
from lora_dpo.engine.logprobs import EXTRAS, chunked_head_values, head_values


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


def chunks_of(weight, read):
    """The weight in chunks of at most so many rows; each is noted in `read`."""

    def chunks(count):
        for start in range(0, len(weight), count):
            read.append(len(weight[start : start + count]))
            yield start, weight[start : start + count]

    return chunks


@pytest.mark.parametrize("rows", [1, 3, 4, 11, 64])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.4, None), (1.0, 1.5), (0.4, 1.5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_head_in_chunks_of_the_vocabulary_is_the_same(rows, scale, softcap, with_bias, monkeypatch):
    monkeypatch.setattr(logprobs, "rows_at_once", lambda labels: rows)
    hidden, weight, bias, label = inputs()
    bias = bias if with_bias else None
    weights, read, found = torch.arange(1.0, 8.0), [], []
    for in_chunks in (False, True):
        given = hidden.clone().requires_grad_()
        function = chunked_head_values if in_chunks else head_values
        head = chunks_of(weight, read) if in_chunks else weight
        values = function(given, head, bias, label, scale=scale, softcap=softcap, extras=EXTRAS)
        (values.log_probs * weights).sum().backward()
        found.append((values, given.grad))
    (whole, slope), (chunked, chunked_slope) = found
    for name, one, other in zip(("log_probs", *EXTRAS), chunked, whole, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5), name
    assert torch.allclose(chunked_slope, slope, rtol=1e-5, atol=1e-5)
    assert sum(read) == 2 * 11
    exact = (hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double())) * scale
    exact = (exact if softcap is None else softcap * torch.tanh(exact / softcap)).log_softmax(-1)
    assert torch.allclose(chunked.log_probs.double(), exact.gather(1, label[:, None]).squeeze(1), atol=1e-5)


@pytest.mark.parametrize("extra", EXTRAS)
def test_chunks_give_one_extra_at_a_time_and_no_other(extra, monkeypatch):
    monkeypatch.setattr(logprobs, "rows_at_once", lambda labels: 3)
    hidden, weight, _, label = inputs(tokens=30)
    hidden *= 40  # exp of most is nothing: what was summed before a larger logit came must shrink
    ours = chunked_head_values(hidden, chunks_of(weight, read := []), None, label, extras=(extra,))
    theirs = head_values(hidden, weight, None, label, extras=(extra,))
    assert torch.allclose(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-4)
    assert torch.allclose(getattr(ours, extra).float(), getattr(theirs, extra).float(), rtol=1e-5, atol=1e-4)
    assert [name for name in EXTRAS if getattr(ours, name) is not None] == [extra]
    assert sum(read) == 11  # no gradient was asked for


def test_the_first_of_equal_logits_is_the_top_one_in_chunks_too(monkeypatch):
    monkeypatch.setattr(logprobs, "rows_at_once", lambda labels: 1)
    hidden, weight = torch.ones(2, 1), torch.zeros(3, 1)
    found = chunked_head_values(hidden, chunks_of(weight, []), None, torch.tensor([0, 1]), extras=("is_top1",))
    assert found.is_top1.tolist() == [True, False]


def test_chunks_and_no_label_are_no_error():
    hidden, weight, _, label = inputs()
    empty = chunked_head_values(hidden[:0].requires_grad_(), chunks_of(weight, []), None, label[:0], extras=EXTRAS)
    empty.log_probs.sum().backward()
    assert empty.log_probs.shape == (0,)


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


def test_a_token_that_is_nearly_certain_has_its_gradient_in_16_bits():
    # p > 0.99: what is left of 1 - p must not be lost in the rounding of p
    _, weight, _, label = inputs(tokens=200, width=32, vocabulary=64, dtype=torch.bfloat16)
    hidden = 0.09 * weight[label]  # a label's logit is then some 12
    exact = hidden.double().requires_grad_()
    logps = (exact @ weight.double().t()).log_softmax(-1).gather(1, label[:, None]).squeeze(1)
    logps.sum().backward()
    certain = (logps.exp() > 0.99) & (logps.exp() < 0.9999)
    assert int(certain.sum()) > 50
    ours = hidden.clone().requires_grad_()
    head_values(ours, weight, None, label).log_probs.sum().backward()
    off = (ours.grad.double() - exact.grad)[certain].norm() / exact.grad[certain].norm()
    assert float(off) < 0.06  # rounded before the label was taken off: 0.6


def test_logits_that_a_gpu_need_not_round_are_not(monkeypatch):
    hidden, weight, _, label = inputs(tokens=50, width=64, vocabulary=99, dtype=torch.bfloat16)
    wanted = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, label[:, None]).squeeze(1)
    rounded = head_values(hidden, weight, None, label).log_probs
    monkeypatch.setattr(products, "widens", lambda device: True)
    monkeypatch.setattr(products, "wide_product", lambda left, right: (left.double() @ right.double()).float())
    exact = head_values(hidden, weight, None, label).log_probs
    assert float((exact - wanted).abs().mean()) < 1e-4 < 1e-2 < float((rounded - wanted).abs().mean())
