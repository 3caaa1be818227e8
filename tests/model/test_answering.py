"""Adapters while answers are written: the same answers in few kernels, and the trained weights as they were."""

import contextlib
import copy

import pytest
import torch
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dpo.config.recipe import LoraSection
from lora_dpo.model import answering
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling, decode
from lora_dpo.model.lora import attach_lora

PROMPTS = [[5, 6, 7], [20, 21, 22, 23, 24]]


class Kernels(TorchDispatchMode):
    """How many operations compute: no views and no empty tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
        self.count += not views and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def adapted(model, **lora):
    """An adapter whose B is drawn, in float32 as training holds it."""
    model = attach_lora(model, LoraSection(**{"rank": 4, "targets": "all-linear", **lora}), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def tokens_of(model, count=12):
    return list(decode(model, PROMPTS, frozenset(), Sampling(max_new_tokens=count)))


def logits_of(model, *, short):
    how = answering.AnsweringAdapter(model).on() if short else contextlib.nullcontext()
    with torch.no_grad(), how:
        return model(input_ids=torch.tensor([PROMPTS[1]])).logits


def kernels_of_a_step(model):
    with Kernels() as four:
        tokens_of(model, 4)
    with Kernels() as three:
        tokens_of(model, 3)
    return four.count - three.count


def test_with_an_adapter_a_token_takes_few_more_kernels_than_without(monkeypatch):
    model = tiny("llama").to(torch.bfloat16)
    base = kernels_of_a_step(copy.deepcopy(model))
    policy = adapted(model)
    short = kernels_of_a_step(policy)
    assert short <= 1.3 * base
    monkeypatch.setattr(answering, "plain_adapter", lambda layer: None)
    assert kernels_of_a_step(policy) > 1.6 * base  # peft's own


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma2"])
def test_in_float32_it_is_what_peft_computes(kind, monkeypatch):
    model = adapted(tiny(kind))
    theirs = logits_of(model, short=False)
    assert torch.allclose(logits_of(model, short=True), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    tokens = tokens_of(model)
    monkeypatch.setattr(answering, "plain_adapter", lambda layer: None)
    assert tokens == tokens_of(model)
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model, short=True), theirs, rtol=0.01)


def test_in_bf16_it_is_as_near_to_float32_as_peft():
    exact = adapted(tiny("llama"))
    rounded = adapted(tiny("llama").to(torch.bfloat16))
    truth = logits_of(exact, short=False)
    short, theirs = (logits_of(rounded, short=short).float() for short in (True, False))
    assert float((short - truth).norm()) < 1.2 * float((theirs - truth).norm())


def test_under_the_autocast_of_a_training_it_is_short_too():
    model = adapted(tiny("llama").to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Kernels() as theirs:
            expected = logits_of(model, short=False)
        with Kernels() as ours:
            found = logits_of(model, short=True)
    assert ours.count < 0.8 * theirs.count
    truth = logits_of(adapted(tiny("llama")), short=False)
    assert float((found - truth).norm()) < 1.2 * float((expected - truth).norm())


def test_training_state_is_untouched_bit_for_bit():
    model = adapted(tiny("llama").to(torch.bfloat16))
    before = {name: (value.data_ptr(), value.dtype, value.clone()) for name, value in model.named_parameters()}
    own = [part.forward for part in model.modules()]
    answers = decode(model, PROMPTS, frozenset(), Sampling(max_new_tokens=6))
    next(answers)
    assert [part.forward for part in model.modules()] == own  # between two tokens others may use the model
    list(answers)
    for name, value in model.named_parameters():
        address, dtype, old = before[name]
        assert (value.data_ptr(), value.dtype) == (address, dtype)
        assert torch.equal(value, old)
        assert value.requires_grad == ("lora_" in name)
    assert all("forward" not in vars(part) for part in model.modules())


def test_a_pass_that_breaks_leaves_the_layers_as_they_were(monkeypatch):
    model = adapted(tiny("llama"))
    monkeypatch.setattr(type(model.get_base_model()), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokens_of(model)
    assert all("forward" not in vars(part) for part in model.modules())


def count_short(model):
    return len(answering.AnsweringAdapter(model)._forwards)


def test_what_is_no_plain_lora_is_pefts():
    assert count_short(tiny("llama")) == 0
    assert count_short(adapted(tiny("llama"))) == 14
    assert count_short(adapted(tiny("llama"), dora=True)) == 0
    dropping = adapted(tiny("llama"), dropout=0.1)
    assert count_short(dropping) == 14
    assert count_short(dropping.train()) == 0
    two = adapted(tiny("llama"))
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    assert count_short(two) == 0


def test_what_is_switched_while_answers_are_written_counts():
    model = adapted(tiny("llama"))
    with_it, base = tokens_of(model), tokens_of(tiny("llama"))
    assert with_it != base
    answers = decode(model, PROMPTS[:1], frozenset(), Sampling(max_new_tokens=4))
    next(answers)
    adapter = answering.AnsweringAdapter(model)
    with torch.no_grad(), adapter.on():
        ids = torch.tensor([PROMPTS[1]])
        live = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, tiny("llama")(input_ids=ids).logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(input_ids=ids).logits.dtype == torch.bfloat16
        assert torch.equal(model(input_ids=ids).logits, live)
    with adapter.on():
        assert model(input_ids=ids).logits.requires_grad  # with gradients peft's own runs


def test_a_packed_base_has_it_too(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="nf4", packed=True)
    model = adapted(base.model)
    assert count_short(model) == 14
    theirs = logits_of(model, short=False)
    assert torch.allclose(logits_of(model, short=True), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_given_in_another_dtype_runs_through_peft():
    model = adapted(tiny("llama").to(torch.bfloat16))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    given = torch.randn(1, 3, layer.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = layer(given)
    with torch.no_grad(), answering.AnsweringAdapter(model).on(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(given), theirs)


def test_what_somebody_else_has_put_in_stays():
    model = adapted(tiny("llama"))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.forward = theirs = lambda given: given * 0
    with answering.AnsweringAdapter(model).on():
        assert layer.forward is theirs
    assert layer.forward is theirs


def test_two_adapters_at_once_are_pefts():
    model = adapted(tiny("llama"))
    model.add_adapter("other", model.peft_config["default"])
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.normal_(0, 0.1)
    model.base_model.set_adapter(["default", "other"])
    theirs = logits_of(model, short=False)
    assert torch.equal(logits_of(model, short=True), theirs)


def test_embeddings_that_are_trained_whole_in_float32_change_no_layers_dtype():
    model = adapted(tiny("llama").to(torch.bfloat16), modules_to_save=["embed_tokens"])
    calls = []
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A.default.register_forward_hook(
        lambda *_: calls.append(True)
    )
    tokens_of(model, 3)
    assert not calls
