"""Cards by name, and how long a run's steps take on them."""

import pytest
import torch

from lora_dpo.cli.commands import main
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError
from lora_dpo.training.planning.cards import CARDS, GB, find_cards, unknown_card
from lora_dpo.training.planning.lines import time_line
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.planning.step_time import LAYER_SECONDS, TRAFFIC_BYTES

WHITE_PAPERS = {  # TFLOP/s of 16-bit tensor products summed in float32, dense, as NVIDIA's white papers print them
    "RTX 2080 Ti": 53.8,
    "RTX 2080": 40.3,
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 4070 Ti": 80.2,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5070": 61.7,
    "RTX 5070 Ti": 87.9,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
}


def named(name):
    return next(card for card in CARDS if card.name == name)


def of_kind(kind):
    return [card for card in CARDS if card.kind == kind]


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHITE_PAPERS)
def test_what_follows_from_cores_and_clock_is_what_the_white_paper_says(name):
    assert named(name).tflops == pytest.approx(WHITE_PAPERS[name], rel=0.005)


def test_a_geforce_card_by_hand():
    # 16,384 cores at 2.52 GHz, 2 FLOPs each, twice that on tensor cores
    assert named("RTX 4090").tflops == round(16384 * 2.52e9 * 2 * 2 / 1e12, 1) == 165.2


def test_all_that_are_usual_are_there():
    assert len(CARDS) >= 30
    assert len({card.name for card in CARDS}) == len(CARDS)
    for series in ("20", "30", "40", "50"):
        assert {f"RTX {series}{tier}" for tier in ("60", "70", "80")} <= {card.name for card in CARDS}
    assert {"T4", "L4", "A10G", "A100 80GB", "H100 SXM", "RX 7900 XTX"} <= {card.name for card in CARDS}
    assert sum("Laptop" in card.name for card in CARDS) >= 10


def test_no_card_has_impossible_values():
    for card in CARDS:
        assert 6 <= card.gigabytes <= 192, card
        assert 10 < card.tflops < 1000, card
        # FLOPs a byte: from 51 (RTX 5060 Laptop, at its lowest clock) to 419 (L40S)
        assert 50 < card.tflops * 1e12 / (card.bandwidth * 1e9) < 420, card
        # the whole memory is read 12.5 (L4) to 76 times (RTX 3080) a second
        assert 12 < card.bandwidth / card.gigabytes < 77, card
        assert card.dtype == ("float16" if card.name.startswith(("RTX 20", "T4", "V100")) else "bfloat16"), card


@pytest.mark.parametrize("series", ["20", "30", "40", "50"])
@pytest.mark.parametrize("laptop", [False, True])
def test_a_series_gets_faster_from_card_to_card(series, laptop):
    cards = [card for card in of_kind("geforce") if card.name.startswith(f"RTX {series}")]
    cards = [card for card in cards if ("Laptop" in card.name) == laptop]
    assert len(cards) > 3 or (series == "20" and laptop)
    speeds = [card.tflops for card in cards]
    assert speeds == sorted(speeds)


def test_a_laptop_card_is_slower_than_the_desktop_card_of_its_name():
    desktop = {f"{card.name} Laptop": card.tflops for card in CARDS}
    pairs = [(card.tflops, desktop[card.name]) for card in CARDS if card.name in desktop]
    assert len(pairs) > 10
    assert all(slower < faster for slower, faster in pairs)


def test_error_correction_takes_a_sixteenth():
    assert named("T4").memory == 15 * GB  # what the driver shows of its 16 GB
    assert named("L4").memory == 22.5 * GB
    assert named("A100 40GB").memory == 40 * GB  # has memory of its own for it


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("RTX 4090", ["RTX 4090"]),
        ("3060", ["RTX 3060", "RTX 3060 8GB"]),
        ("4060ti", ["RTX 4060 Ti", "RTX 4060 Ti 16GB"]),
        ("rtx-4060 ti 16 GB", ["RTX 4060 Ti 16GB"]),
        ("4070 Ti Super", ["RTX 4070 Ti Super"]),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", ["RTX 3080 Laptop", "RTX 3080 Laptop 16GB"]),
        ("GeForce RTX 3060 Mobile", ["RTX 3060 Laptop"]),
        ("NVIDIA RTX 6000 Ada Generation", ["RTX 6000 Ada"]),
        ("Tesla T4", ["T4"]),
        ("a100", ["A100 40GB", "A100 80GB"]),
        ("NVIDIA A100-SXM4-80GB", ["A100 80GB"]),
        ("H100", ["H100 PCIe", "H100 SXM"]),
        ("NVIDIA H100 80GB HBM3", ["H100 PCIe", "H100 SXM"]),
        ("h100 sxm5", ["H100 SXM"]),
        ("Radeon RX 7900 XTX", ["RX 7900 XTX"]),
        *((text, []) for text in ("24GB", "12", "512MB", "", "GTX 1080", "4060 Ti 12GB", "RTX", "M3 Max", "big")),
    ],
)
def test_names_are_understood(text, names):
    assert [card.name for card in find_cards(text)] == names


def test_each_card_is_found_by_its_own_name():
    assert [find_cards(card.name)[0] for card in CARDS] == list(CARDS)


@pytest.mark.parametrize(
    ("text", "near"), [("RTX 4090 TI", "RTX 4090"), ("3061", "RTX 3060"), ("4060 Ti 12GB", "RTX 4060 Ti")]
)
def test_an_unknown_name_gets_the_nearest(text, near):
    said = str(unknown_card(text))
    assert f"--card is {text!r}: no card of that name is known here. The nearest: " in said
    assert near in said.partition("nearest: ")[2].partition(". ")[0].split(", ")


def test_what_is_like_no_name_gets_none():
    assert "nearest" not in str(unknown_card("M3 Max"))


@pytest.mark.parametrize("text", ["3061", "big", "0GB", "-1"])
def test_a_plan_refuses_what_is_no_card_before_it_reads_data(text, recipe_dict):
    recipe = check_recipe(recipe_dict(data={"train": "not/there.jsonl"}))
    with pytest.raises(ConfigError, match="no card of that name"):
        plan(recipe, card=text)


def test_the_list_needs_no_recipe(capsys):
    assert main(["plan", "--cards"]) == 0
    said = capsys.readouterr().out
    rows = {line[:20].strip(): line.split()[-4:] for line in said.splitlines()}
    assert rows["RTX 4090"] == ["24", "1,008", "165.2", "bfloat16"]
    assert rows["RX 7900 XTX"] == ["XTX", "24", "960", "bfloat16"]  # no speed is claimed
    assert all(card.name in rows for card in CARDS)


# --- time -----------------------------------------------------------------------------------------


def test_time_is_products_and_traffic_at_the_assumed_shares(tmp_path, tokenizer):
    from published import long_pairs, published_model

    model = published_model(tmp_path / "granite", "granite-4.1-3b", tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 4, answer=400)
    recipe = check_recipe(
        {
            "model": {"name": str(model)},
            "data": {"train": str(pairs)},
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 4},
        }
    )
    small, large = (plan(recipe, card=name) for name in ("A100 40GB", "A100 80GB"))
    assert small.memory.checkpointed == large.memory.checkpointed == 0
    flops = large.time.flops
    assert small.time.flops == flops
    # the cards differ in bandwidth alone: the difference is the traffic
    traffic = (small.time.seconds - large.time.seconds) / (1 / 1555e9 - 1 / 1935e9) * 0.8
    assert large.time.seconds == pytest.approx(flops / (0.6 * 312e12) + traffic / (0.8 * 1935e9))
    # the policy's two passes over the pairs, and half of one for the reference, which only goes forward
    assert 1.2 < traffic / (TRAFFIC_BYTES * large.tokens.stream * 40 * 2560) < 1.3
    assert (large.time.published, large.time.flops_per_second) == (312e12, flops / large.time.seconds)
    assert 0.2 < large.time.flops_per_second / 312e12 < 0.45


def test_a_small_model_is_as_fast_as_kernels_are_launched(recipe_dict):
    planned = plan(check_recipe(recipe_dict()), card="RTX 4090")
    assert planned.time.seconds == pytest.approx(2 * 1 * 2 * LAYER_SECONDS)  # 2 steps of one part, 2 layers


def test_nothing_is_claimed_of_amds_cards(recipe_dict):
    planned = plan(check_recipe(recipe_dict()), card="7900 XTX")
    assert planned.machine.memory == 24 * GB
    assert planned.time.seconds is None
    assert "is not claimed" in planned.notes[-1]


def test_nothing_is_claimed_of_apples_gpus(recipe_dict, monkeypatch):
    monkeypatch.setattr("lora_dpo.training.planning.make_plan.pick_device", lambda: torch.device("mps"))
    planned = plan(check_recipe(recipe_dict()))
    assert planned.time.seconds is None
    assert "not known here" in time_line(planned)
    assert "no time is claimed" in planned.notes[-1]


def test_a_card_before_ampere_computes_in_float16(recipe_dict):
    recipe = check_recipe(recipe_dict(model={"dtype": "auto"}))
    assert plan(recipe, card="2080 Ti").machine.dtype == "float16"
    assert plan(recipe, card="3060").machine.dtype == "bfloat16"
