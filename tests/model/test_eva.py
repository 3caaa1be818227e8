"""A from the inputs of the adapted layers (`lora.init: eva`)."""

import numpy
import pytest
import torch
from kinds import STREAMS, skeleton

from lora_dpo.config.recipe import LoraSection
from lora_dpo.engine.small_copy import small_copy
from lora_dpo.errors import ConfigError
from lora_dpo.model.base import load_base
from lora_dpo.model.eva import TOKENS, drawn_batch, init_from_inputs
from lora_dpo.model.lora import attach_lora, is_reference

draws = numpy.random.default_rng(0)
ROWS = [draws.integers(0, 250, size).tolist() for size in (40, 7, 23)]


@pytest.fixture
def model(tiny_model_folder):
    def make(**lora):
        base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
        return attach_lora(base.model, LoraSection(**{"rank": 5, "init": "eva", **lora}), seed=0)

    return make


def inputs_of(model, rows):
    """What each adapted layer reads, `[tokens, in]`, row after row without padding."""
    found = {}
    layers = {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}
    for row in rows:
        handles = [
            part.register_forward_hook(
                lambda part, given, out, name=name: found.setdefault(name, []).append(
                    given[0].reshape(-1, given[0].shape[-1]).double().numpy()
                )
            )
            for name, part in layers.items()
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        for handle in handles:
            handle.remove()
    return {name: numpy.concatenate(parts) for name, parts in found.items()}


def test_a_worked_example_by_hand():
    from lora_dpo.model.eva import directions

    # around their mean (1, 1, 0): most along (0, 0, 1), then along (1, -1, 0) / √2
    x_ND = torch.tensor([[1.0, 1, 5], [1, 1, -5], [2, 0, 0], [0, 2, 0]])
    first, second = directions(x_ND)[:2]
    assert torch.allclose(first, torch.tensor([0.0, 0, 1]))
    assert torch.allclose(second.abs(), torch.tensor([0.5, 0.5, 0]).sqrt())
    assert len(directions(x_ND)) == 2  # and nothing along (1, 1, 0)


@pytest.mark.parametrize("lora", [{}, {"rslora": True}, {"rank_pattern": {"down_proj": 9}}, {"layers": "top-1"}])
def test_a_spans_the_first_directions_of_what_its_layer_reads(model, lora):
    policy = model(**lora)
    before = inputs_of(policy, ROWS)
    base = {name: p.clone() for name, p in policy.named_parameters() if "lora_" not in name}
    init_from_inputs(policy, ROWS)
    assert before
    for name, x_ND in before.items():
        a_RD = policy.get_submodule(name).lora_A["default"].weight.detach().double().numpy()
        rank = 9 if "rank_pattern" in lora and name.endswith("down_proj") else 5
        assert a_RD.shape[0] == rank
        _, _, v_DD = numpy.linalg.svd(x_ND - x_ND.mean(axis=0), full_matrices=False)
        v_RD = v_DD[:rank]
        assert numpy.abs(a_RD @ a_RD.T - numpy.eye(rank)).max() < 1e-5
        assert numpy.abs(a_RD.T @ a_RD - v_RD.T @ v_RD).max() < 1e-4, name
    assert is_reference(policy)
    assert all(torch.equal(p, base[name]) for name, p in policy.named_parameters() if "lora_" not in name)


def test_it_is_what_peft_computes_without_its_rounding(model):
    from peft import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    policy = model(rank=3, targets=["q_proj", "down_proj"])
    config = policy.peft_config["default"]
    config.eva_config = EvaConfig(rho=1.0)
    batch = {"input_ids": torch.tensor([ROWS[0]]), "attention_mask": torch.ones(1, len(ROWS[0]), dtype=torch.long)}
    theirs = get_eva_state_dict(policy, [batch], config, show_progress_bar=False)
    read = inputs_of(policy, ROWS[:1])
    init_from_inputs(policy, ROWS[:1])
    for name, a_RD in theirs.items():
        x_ND = torch.tensor(read[name] - read[name].mean(axis=0))
        caught, ours = (
            float((x_ND @ each.double().T).square().sum())
            for each in (a_RD, policy.get_submodule(name).lora_A["default"].weight.detach())
        )
        assert 0.97 * ours < caught <= ours * (1 + 1e-6)  # peft's vectors are drawn ones, of rows counted repeatedly


def test_the_same_rows_make_the_same_adapter(model):
    def made(rows):
        policy = model(rank=4)
        init_from_inputs(policy, rows)
        return {name: p.detach().clone() for name, p in policy.named_parameters() if "lora_" in name}

    first, again, other = made(ROWS), made(ROWS), made(ROWS[:2])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in ("llama", "falcon_h1") else pytest.mark.slow)
                                  for kind in STREAMS])  # fmt: skip
def test_padding_is_left_out_in_every_kind_of_layer(kind):
    small = small_copy(skeleton(kind)).requires_grad_(False)
    policy = attach_lora(small, LoraSection(rank=2, init="eva"), seed=0)
    init_from_inputs(policy, ROWS)
    for name, x_ND in inputs_of(policy, ROWS).items():
        a_RD = policy.get_submodule(name).lora_A["default"].weight.detach().double().numpy()
        spread = numpy.linalg.svd(x_ND - x_ND.mean(axis=0), compute_uv=False)
        caught = numpy.linalg.svd((x_ND - x_ND.mean(axis=0)) @ a_RD.T, compute_uv=False)
        assert (caught**2).sum() == pytest.approx((spread[:2] ** 2).sum(), rel=1e-3), name


@pytest.mark.parametrize(
    ("lora", "rows", "said"),
    [
        ({"rank": 80}, ROWS, r"the input of \S+ has 64 numbers, fewer than the rank 80.*lora.rank_pattern"),
        ({"rank": 8}, [[1, 2, 3, 4]], r"no more than 3 directions, fewer than the rank 8"),
        ({"targets": ["lm_head"], "rank": 70}, ROWS, r"the input of lm_head has 64"),
        ({"targets": ["embed_tokens"]}, ROWS, r"embed_tokens is no linear layer"),
    ],
)
def test_what_has_no_such_directions_is_refused(model, lora, rows, said):
    with pytest.raises(ConfigError, match=rf"lora\.init: eva.*{said}"):
        init_from_inputs(model(**lora), rows)


def test_experts_are_refused():
    kind = skeleton("qwen3_moe")
    with pytest.raises(ConfigError, match=r"lora\.init: eva is not possible with lora\.parameters"):
        attach_lora(kind, LoraSection(rank=2, init="eva", parameters="experts"), seed=0)


def test_rows_are_drawn_from_everywhere_and_fill_one_pass():
    rows = [[number] * (10 + number % 7) for number in range(1000)]
    some = drawn_batch(rows)
    assert some == drawn_batch(rows)
    assert len(some) == TOKENS // 15  # 10 to 16 tokens, the longest quarter cut to 15
    assert min(row[0] for row in some) < 100 < 900 < max(row[0] for row in some)
    assert drawn_batch([[1] * 5000]) == [[1] * (TOKENS // 4)]


@pytest.mark.parametrize("lengths", [[30] * 9 + [1800], [20, 40, 60, 3000, 6000], [8] * 9 + [2000], [900], [2]])
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_mixed_lengths_fill_the_pass_too(lengths, seed):
    draw = numpy.random.default_rng(seed)
    some = drawn_batch([[1] * int(draw.choice(lengths)) for _ in range(2000)])
    assert max(map(len, some)) * len(some) <= TOKENS
    assert sum(map(len, some)) > TOKENS / 4
