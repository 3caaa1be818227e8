"""What a step asks of a GPU, counted without one: kernels, traffic, bytes kept, waits, and what is left on the CPU.

The bounds are for eight pairs of HH-RLHF's lengths (1,888 stream tokens) on a Llama of 8B in NF4 under bf16 autocast.
Counted the same way before norms and adapters were one function each: 15,110 kernels, 318 GB, 4.50 MB a token.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import build, columns, pair, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lora_dpo import DPOTrainer
from lora_dpo.engine import attention, fused_layers
from lora_dpo.engine.cost_model import footprint, pair_shape
from lora_dpo.training.planning.memory_plan import part_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no part of the package
from step_counts import Counting, Counts, counted_step, fake_nf4_llama, hh_rows, meta_llama


def counted_of_8b(layers):
    with FakeTensorMode():
        return counted_step(fake_nf4_llama("8b", layers), hh_rows())


def of_all_layers(two, three, layers=32):
    """What so many layers make of it, each like the third: its own share is added for each."""
    more = layers - 2

    def of(few, many):
        names = few.kernels.keys() | many.kernels.keys()
        kernels = {name: few.kernels[name] + more * (many.kernels[name] - few.kernels[name]) for name in names}
        return Counts(Counter(kernels), traffic=few.traffic + more * (many.traffic - few.traffic))

    return of(two[0], three[0]), of(two[1], three[1]), two[2] + more * (three[2] - two[2])


@pytest.fixture(scope="module")
def eight_billion():
    return of_all_layers(counted_of_8b(2), counted_of_8b(3))


@pytest.mark.slow
@pytest.mark.long
def test_all_32_layers_are_counted_as_the_third_is(eight_billion):
    for ours, counted in zip(eight_billion, counted_of_8b(32), strict=True):
        if isinstance(counted, Counts):
            assert ours.kernels == counted.kernels
            assert ours.traffic == counted.traffic
        else:
            assert ours == pytest.approx(counted, rel=1e-12)


def test_a_step_of_an_8b_model_is_lean(eight_billion):
    ahead, back, kept = eight_billion
    assert ahead.launches + back.launches < 7_200
    assert ahead.traffic + back.traffic < 115e9
    assert kept < 0.76 * 4.5e6


def test_attention_is_given_no_mask_that_turns_flash_attention_off(eight_billion):
    for counts in eight_billion[:2]:
        assert not [name for name in counts.kernels if "masked" in name and "attention" in name]
        assert [count for name, count in counts.kernels.items() if "flash_attention" in name] == [256, 256]


def test_a_mask_would_be_seen(monkeypatch):
    def with_mask(query, key, value, scale):
        mask = query.new_zeros(query.shape[2], key.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    import step_counts

    monkeypatch.setattr(step_counts, "flash_attention", with_mask)
    with FakeTensorMode():
        ahead, back, _ = counted_step(fake_nf4_llama("8b", 1), hh_rows())
    assert all(any("masked" in name for name in counts.kernels) for counts in (ahead, back))


def test_without_flash_attention_the_memory_efficient_kernel_takes_its_place_without_a_mask(monkeypatch):
    """As with torch's wheels for Windows, which are published without it. (Its backward pass has values alone.)"""

    def bias(*sizes):
        with _disable_current_modes():  # a class of tensors of its own, which no mode can make
            return causal_lower_right(*sizes)

    monkeypatch.setattr(attention, "causal_lower_right", bias)
    monkeypatch.setattr(torch.nn.attention.bias, "can_use_flash_attention", lambda params: False)
    monkeypatch.setattr(torch.nn.attention.bias, "can_use_efficient_attention", lambda params: True)
    with FakeTensorMode(), Counting() as counting:
        query, key = (torch.empty(2, 4, tokens, 16, dtype=torch.bfloat16) for tokens in (5, 9))
        attention.lower_right(query, key, key, None)
    assert counting.counts.kernels == {"_efficient_attention_forward": 1}  # a mask would be seen in its name


def test_without_any_fused_kernel_the_last_tokens_see_what_they_should():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, tokens, 16, generator=draw) for tokens in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(diagonal=4)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.allclose(attention.lower_right(query, key, value, None), wanted, atol=1e-6)


def on_another_device():
    """A model whose tensors are on no CPU, and have no values to wait for. In bf16: autocast knows no such device."""
    model = fake_nf4_llama("8b", 2, "meta")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def test_forward_and_backward_never_leave_the_device_nor_wait_for_a_value():
    ahead, back, _ = counted_step(on_another_device(), hh_rows())
    assert ahead.launches > 100
    assert back.launches > 100


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch):
    monkeypatch.setattr(
        attention.StreamPlan, "seen", lambda plan, device: torch.tensor([0] * sum(map(len, seen(plan))))
    )
    with pytest.raises(RuntimeError, match=r"cpu.*meta"):
        counted_step(on_another_device(), hh_rows())


def seen(plan):
    return [span.seen for span in plan.spans]


def test_a_wait_for_a_value_in_a_layer_is_found(monkeypatch):
    norm = fused_layers.fused_rms_norm

    def waiting(hidden, *args, **kwargs):
        hidden.abs().max().item()
        return norm(hidden, *args, **kwargs)

    monkeypatch.setattr(fused_layers, "fused_rms_norm", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        counted_step(on_another_device(), hh_rows())


class Waits(TorchFunctionMode):
    """Counts the calls that wait for a GPU: values that are read, tensors that come to the CPU, indexing by a mask.

    A tensor is on the CPU if it came there (`cpu`), was made of Python's numbers, or of nothing but such tensors.
    """

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__iter__")
    READS_TOO = ("masked_select", "equal", "allclose", "unique")

    def __init__(self):
        super().__init__()
        self.seen, self.host = Counter(), WeakIdKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        at_home = all(one in self.host for one in given)
        masks = args[1:2] if name in ("__getitem__", "__setitem__", "index_put_") else ()
        mask = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool and one.dim() for one in masks)
        if given and not at_home and (name in self.READS + self.READS_TOO or mask):
            self.seen[name] += 1
        if (at_home and (given or name == "tensor")) or name == "cpu":
            for one in tree_leaves(result):
                if isinstance(one, torch.Tensor):
                    self.host[one] = True
        return result


def test_a_step_of_16_pairs_waits_for_the_gpu_at_most_20_times(tiny_model_folder, tmp_path):
    pairs = [pair([5, 6, 7 + n], [8, 9, 10 + n % 3], [11, 12 + n % 4]) for n in range(16)]
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, pairs=pairs, per_device_train_batch_size=16)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 10, 10
    batch = trainer.data_collator(columns(pairs))
    trainer.training_step(trainer.model, dict(batch))  # references are scored, memory is measured
    trainer.state.global_step += 1
    with Waits() as waits:
        trainer.training_step(trainer.model, dict(batch))
    assert 0 < sum(waits.seen.values()) <= 20, waits.seen


@pytest.mark.parametrize("size", ["1b", "8b"])
@pytest.mark.parametrize("length", [1024, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("checkpointed", "offload"), [(0, False), (3, False), (6, False), (6, True)])
def test_the_plan_is_near_what_lives_at_the_peak_of_a_step(size, length, checkpointed, offload):
    prompt, answer = list(range(128)), list(range(200, 200 + length - 128))
    rows = [{"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[::-1]}]
    with FakeTensorMode():
        model = fake_nf4_llama(size, 6)
        ahead, back, _ = counted_step(model, rows, logged=True, checkpointed=checkpointed, offload=offload)
    cost = footprint(meta_llama(size, 6), itemsize=2, packed=True)
    held = cost.weight_bytes + 12 * cost.trainable  # weights of the adapter, Adam's moments; gradients are counted
    plan = part_bytes(cost, [pair_shape(prompt, answer, answer[::-1])], checkpointed, offload=offload)
    counted = held + max(ahead.peak, back.peak)
    assert 0.90 < counted / (held + 4 * cost.trainable + cost.rounded_bytes() + sum(plan)) < 1.05


@pytest.mark.parametrize(("size", "checkpointed"), [("1b", 0), ("1b", 3), ("8b", 0)])
def test_the_plan_is_near_what_dora_makes_of_it(size, checkpointed):
    prompt, answer = list(range(128)), list(range(200, 200 + 1024 - 128))
    pair = [{"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[::-1]}]
    with FakeTensorMode():
        model = fake_nf4_llama(size, 4, dora=True)
        ahead, back, kept = counted_step(model, pair, logged=True, checkpointed=checkpointed)
    cost = footprint(meta_llama(size, 4, dora=True), itemsize=2, packed=True)
    shape = pair_shape(prompt, answer, answer[::-1])
    held = cost.weight_bytes + 12 * cost.trainable
    plan = part_bytes(cost, [shape], checkpointed)
    counted = held + max(ahead.peak, back.peak)
    assert 0.90 < counted / (held + 4 * cost.trainable + cost.rounded_bytes() + sum(plan)) < 1.05
    if not checkpointed:
        assert 0.90 < kept * shape.stream / cost.kept_bytes(shape) < 1.05


GIB = 1 << 30


def counted_peak(layers, stream):
    """Bytes that a step of 8B at 1,024 tokens has at its peak by count, and by plan, Adam's moments in float32.

    All layers are computed again, and their inputs wait in main memory. Without what CUDA and its libraries take.
    """
    prompt, answer = list(range(128)), list(range(200, 200 + 1024 - 128))
    rows = [{"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[::-1]}]
    with FakeTensorMode():
        model = fake_nf4_llama("8b", layers)
        options = dict(logged=True, checkpointed=layers, offload=True, stream=stream)
        ahead, back, _ = counted_step(model, rows, **options)
    cost = footprint(meta_llama("8b", layers), itemsize=2, packed=True, streamed=stream)
    visitors = 2 * cost.held.layer if stream == "on" else 0  # their coming is counted
    counted = cost.weight_bytes - visitors + 12 * cost.trainable + max(ahead.peak, back.peak)
    pairs = [pair_shape(prompt, answer, answer[::-1])]
    plan = sum(part_bytes(cost, pairs, layers, offload=True)) + 16 * cost.trainable + cost.rounded_bytes()
    return counted, cost.weight_bytes + plan


@pytest.mark.parametrize(("stream", "most"), [("embeddings", 5.0), ("on", 2.5)])
def test_8b_streamed_takes_little_of_a_card(stream, most):
    # each layer more takes as much as the one before: of three and of four it is known of all
    few, more = counted_peak(3, stream), counted_peak(4, stream)
    counted, plan = (few[at] + 29 * (more[at] - few[at]) for at in (0, 1))
    assert 0.5 * most * GIB < counted < most * GIB
    assert 0.90 < counted / plan < 1.05
    assert 0.90 < few[0] / few[1] < 1.05


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("stream", "most"), [("embeddings", 5.0), ("on", 2.5)])
def test_the_whole_8b_is_what_four_layers_say(stream, most):
    few, more = counted_peak(3, stream), counted_peak(4, stream)
    assert counted_peak(32, stream)[0] == pytest.approx(few[0] + 29 * (more[0] - few[0]), rel=0.01)
