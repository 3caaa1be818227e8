"""What a plan reserves, how sure it is, and what loading takes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import long_pairs, published_model

from lora_dpo.cli.commands import main
from lora_dpo.config.reading import check_recipe
from lora_dpo.engine.cost_model import footprint
from lora_dpo.model.base import load_base, load_skeleton
from lora_dpo.model.decoding import rows_in, rows_that_fit
from lora_dpo.model.lora import attach_lora
from lora_dpo.model.stored_size import StoredSize, stored_size
from lora_dpo.training.planning.answer_memory import Asked, answer_bytes
from lora_dpo.training.planning.cards import GB
from lora_dpo.training.planning.lines import lines, verdict
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.planning.memory_plan import DESKTOP, Fix

MB = 1 << 20


def on_card(recipe, size):
    """The plan for a card of so many bytes."""
    return plan(recipe, card=f"{size / MB:.3f}MB")


@pytest.fixture
def costs(tiny_model_folder):
    recipe = check_recipe({"model": {"name": str(tiny_model_folder)}, "data": {"train": "none"}})
    skeleton = attach_lora(load_skeleton(str(tiny_model_folder)), recipe.lora, seed=0)
    return footprint(skeleton, itemsize=4, packed=False)


# --- what is set aside ----------------------------------------------------------------------------


def test_a_card_at_home_leaves_room_for_cuda_and_a_desktop(recipe_dict):
    memory = plan(check_recipe(recipe_dict()), card="3060").memory
    assert (memory.libraries, memory.desktop) == (512 * MB, 600 * MB)


def test_no_desktop_shows_on_a_servers_card(recipe_dict):
    memory = plan(check_recipe(recipe_dict()), card="T4").memory
    assert (memory.libraries, memory.desktop, memory.available) == (512 * MB, 0, 15 * GB)


def test_the_peak_is_the_sum_of_its_lines(recipe_dict):
    for options in ({"card": "3060"}, {"card": "T4"}, {"memory": "8GB"}):
        memory = plan(check_recipe(recipe_dict()), **options).memory
        held = memory.libraries + memory.desktop + memory.weights + memory.adapter
        # answers are written while nothing is kept for a backward pass
        training = memory.activations + memory.working + memory.gaps
        assert memory.total == pytest.approx(held + max(training, memory.answers), abs=2)
        assert (memory.gaps > 0) == ("memory" in options)


# --- answers --------------------------------------------------------------------------------------


def test_keys_and_values_are_those_of_transformers(costs, tiny_model_folder):
    from transformers import DynamicCache

    model = load_base(str(tiny_model_folder), quantize="none", dtype="float32").model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(3, 50, dtype=torch.long), past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # no prompt, so that nothing but keys, values and logits is left: 259 words in float32, twice
    needed, rows = answer_bytes([Asked(3, 0, 50, at_once=True)], costs, free=0)
    assert rows == 3
    assert needed == kept * (1 + 1 / 2) + 3 * 259 * 8  # of one of two layers there is a copy at a time


def test_as_many_prompts_are_answered_as_the_decoder_takes(costs, tiny_model_folder, monkeypatch):
    model = load_base(str(tiny_model_folder), quantize="none", dtype="float32").model
    monkeypatch.setattr("lora_dpo.model.decoding.free_bytes", lambda device: 4 * MB)
    taken = rows_that_fit(model, 100 + 28)
    assert taken == 16  # of 4 MB a quarter; a token has 2 layers · 2 heads · 16 numbers · 4 bytes, twice
    assert answer_bytes([Asked(64, 100, 28, at_once=False)], costs, free=4 * MB)[1] == taken
    assert rows_in(0, 1) == 1
    assert rows_in(1e12, 1) == 128


def test_a_look_answers_all_its_prompts_at_once(costs):
    needed, rows = answer_bytes([Asked(6, 100, 32, at_once=True)], costs, free=0)
    assert rows == 6
    one, _ = answer_bytes([Asked(1, 100, 32, at_once=True)], costs, free=0)
    assert needed == pytest.approx(6 * one, abs=6)


def test_without_prompts_nothing_is_answered(recipe_dict):
    settings = recipe_dict(evaluation={"answers": 0}, health={"action": "none"})
    planned = plan(check_recipe(settings), card="3060")
    assert (planned.memory.answers, planned.memory.answered) == (0, 0)
    assert "  answers" not in dict(lines(planned))


def test_longer_answers_need_more(recipe_dict):
    needed = [
        plan(check_recipe(recipe_dict(evaluation={"max_new_tokens": limit})), card="3060").memory.answers
        for limit in (100, 1000)
    ]
    assert needed[1] > 2 * needed[0]


def test_answers_are_the_peak_where_they_need_more_than_training(recipe_dict):
    memory = plan(check_recipe(recipe_dict(evaluation={"max_new_tokens": 50_000})), card="3060").memory
    assert memory.answers > memory.activations + memory.working
    assert memory.total == memory.libraries + memory.desktop + memory.weights + memory.adapter + memory.answers


# --- the verdict ----------------------------------------------------------------------------------


def test_the_least_memory_is_the_least_that_fits(recipe_dict):
    recipe = check_recipe(recipe_dict(trainer={"gradient_checkpointing": True}))
    least = plan(recipe, card="3060").memory.least
    assert on_card(recipe, least + MB).memory.fits
    assert on_card(recipe, least - MB).memory.verdict == "does not fit"


@pytest.mark.parametrize(("share", "word"), [(0.86, "tight"), (0.84, "fits")])
def test_from_85_percent_on_it_is_tight(recipe_dict, share, word):
    recipe = check_recipe(recipe_dict())
    total = plan(recipe, card="3060").memory.total
    planned = on_card(recipe, total / share)
    assert planned.memory.total == total
    assert planned.memory.verdict == word
    said = verdict(planned)
    assert f"({share:.0%}), computed, not measured on a card." in said
    assert said.startswith({"tight": "It is tight: 1.1 GB", "fits": "It fits: 1.1 GB"}[word])


def test_what_is_tight_says_what_makes_room(recipe_dict):
    planned = plan(check_recipe(recipe_dict()), card="3060")
    tight = replace(planned.memory, total=11 * GB)

    def said(least, roomier):
        return verdict(replace(planned, memory=replace(tight, least=least), roomier=roomier)).partition("card. ")[2]

    assert said(8 * GB, None) == (
        "Training fills what is free, and takes smaller parts by itself if that runs out: 8.0 GB do."
    )
    room = Fix(("engine.split_pairs=true", "trainer.max_length=512"), 9 * GB, pairs_lost=1, pairs_cut=3)
    assert "With engine.split_pairs=true trainer.max_length=512 it takes 9.0 GB (75%, 3 more pairs cut and 1 drop" in (
        said(11 * GB, room)
    )
    assert "A smaller model would leave room" in said(11 * GB, None)


def test_settings_that_make_room_are_looked_for_where_it_is_tight(tmp_path, tokenizer):
    model = published_model(tmp_path / "llama", "llama-3.1-8b", tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 4, answer=2000)
    settings = {"model": {"name": str(model)}, "data": {"train": str(pairs)}, "trainer": {"max_length": 2048}}
    found = plan(check_recipe(settings), card="10GB")
    assert found.memory.verdict == "tight"
    assert found.roomier.overrides
    assert found.roomier.total <= 0.85 * found.memory.available
    assert plan(with_overrides(settings, found.roomier.overrides), card="10GB").memory.verdict == "fits"


def with_overrides(settings, overrides):
    """The recipe with settings as a plan names them."""
    changed = {name: dict(section) for name, section in settings.items()}
    for one in overrides:
        name, value = one.split("=")
        section, key = name.split(".")
        plain = {"true": True}.get(value, int(value) if value.isdigit() else value)
        changed.setdefault(section, {})[key] = plain
    return check_recipe(changed)


@pytest.mark.parametrize(
    ("card", "tokens", "first", "roomy"),
    [
        ("8GB", 1024, ("engine.offload=true",), ("engine.offload=true", "model.stream=on")),
        # NF4 weights alone are more than is free: auto lets the layers visit
        ("6GB", 1024, (), ()),
        ("6GB", 2048, (), ()),
    ],
)
def test_weights_visit_a_card_that_they_do_not_fit_on(card, tokens, first, roomy, tmp_path, tokenizer):
    model = published_model(tmp_path / "llama", "llama-3.1-8b", tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 2, answer=2000)
    settings = {"model": {"name": str(model)}, "data": {"train": str(pairs)}, "trainer": {"max_length": tokens}}
    found = plan(check_recipe(settings), card=card)
    assert (found.fix.overrides if found.fix else ()) == first
    tight = plan(with_overrides(settings, first), card=card)
    assert (tight.roomier.overrides if tight.roomier else ()) == roomy[len(first) :]
    again = plan(with_overrides(settings, roomy), card=card)
    assert again.memory.verdict == "fits"
    assert again.loading.visiting > 1.9 * GB


def test_8b_fits_on_8_gb_with_embeddings_and_head_in_main_memory(tmp_path, tokenizer):
    model = published_model(tmp_path / "llama", "llama-3.1-8b", tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 2, answer=2000)
    settings = {
        "model": {"name": str(model), "stream": "embeddings"},
        "data": {"train": str(pairs)},
        "trainer": {"max_length": 1024},
        "engine": {"offload": True},
    }
    memory = plan(check_recipe(settings), card="8GB").memory
    assert memory.fits
    assert memory.least <= 0.82 * memory.available  # training fills more, and gives it up where it runs out


def test_what_is_carried_to_a_card_takes_time(recipe_dict):
    seconds = {}
    for stream in ("off", "embeddings", "on"):
        recipe = check_recipe(recipe_dict(model={"stream": stream}))
        found = plan(recipe, card="3060")
        seconds[stream] = found.time.seconds
        assert (found.loading.visiting > 0) == (stream != "off")
        assert ("visit the card stay here" in dict(lines(found))["main memory"]) == (stream != "off")
    assert seconds["off"] <= seconds["embeddings"] <= seconds["on"]


def test_with_weights_that_are_needed_all_the_time_no_stream_is_named(tmp_path, tokenizer):
    model = published_model(tmp_path / "llama", "llama-3.1-8b", tokenizer)
    pairs = long_pairs(tmp_path / "pairs.jsonl", 2, answer=2000)
    settings = {"model": {"name": str(model), "stream": "off"}, "data": {"train": str(pairs)}, "lora": {"dora": True}}
    fix = plan(check_recipe(settings), card="8GB").fix
    assert fix is None or not [one for one in fix.overrides if "stream" in one]


def test_a_desktop_that_is_in_the_way_is_named(recipe_dict):
    recipe = check_recipe(recipe_dict(trainer={"gradient_checkpointing": True}, engine={"split_pairs": True}))
    least = plan(recipe, card="3060").memory.least
    planned = on_card(recipe, least - DESKTOP / 2)
    assert planned.fits_without_desktop
    assert "It would if no desktop showed on the card." in verdict(planned)
    assert not on_card(recipe, least - 1.5 * DESKTOP).fits_without_desktop
    assert not plan(recipe, card="3060").fits_without_desktop


def test_settings_that_fit_only_just_are_said_to(recipe_dict):
    recipe = check_recipe(recipe_dict(trainer={"gradient_checkpointing": False, "per_device_train_batch_size": 6}))
    whole = plan(recipe, card="3060").memory
    planned = on_card(recipe, whole.least - MB)
    assert planned.fix.overrides
    taken = planned.fix.total / planned.memory.available
    assert taken > 0.85
    assert f"It does, tightly ({planned.fix.total / GB:.1f} GB, {taken:.0%}, " in verdict(planned)


# --- loading --------------------------------------------------------------------------------------


def test_a_folder_has_its_weights(tiny_model_folder):
    size = (tiny_model_folder / "model.safetensors").stat().st_size
    found = stored_size(str(tiny_model_folder), load_skeleton(str(tiny_model_folder)))
    assert found == StoredSize(size, size, "files")


def test_a_folder_without_weights_is_known_by_its_parameters(tiny_model_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    skeleton = load_skeleton(str(folder))
    numbers = sum(parameter.numel() for parameter in skeleton.parameters())
    assert stored_size(str(folder), skeleton) == StoredSize(4 * numbers, 0, "parameters")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    assert stored_size(str(folder), skeleton) == StoredSize(1000, 1000, "files")


def test_of_a_hub_model_the_cache_is_looked_at(hub_model, tiny_model_folder):
    from huggingface_hub import constants

    snapshots = list((Path(constants.HF_HUB_CACHE) / "models--someone--tiny" / "snapshots").iterdir())
    skeleton = load_skeleton(str(tiny_model_folder))
    size = (tiny_model_folder / "model.safetensors").stat().st_size
    assert stored_size(hub_model, skeleton) == StoredSize(size, size, "files")
    for snapshot in snapshots:
        (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        index = {"metadata": {"total_size": 3 * size}, "weight_map": shards}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_size(hub_model, skeleton) == StoredSize(3 * size, size, "index")
    for snapshot in snapshots:
        (snapshot / "model.safetensors.index.json").unlink()
    numbers = sum(parameter.numel() for parameter in skeleton.parameters())
    assert stored_size(hub_model, skeleton) == StoredSize(4 * numbers, 0, "parameters")


def test_main_memory_for_a_card_is_one_tensor_at_a_time(recipe_dict, tiny_model_folder):
    recipe = check_recipe(recipe_dict())
    loading = plan(recipe, card="3060").loading
    embeddings = 259 * 64 * 4  # the largest matrix, stored in float32
    assert loading.tensors == 4 * embeddings  # unquantised: four are read at once
    assert plan(check_recipe(recipe_dict(model={"quantize": "nf4"})), card="3060").loading.tensors == embeddings
    assert loading.libraries == 3 * GB
    assert loading.main_memory == 3 * GB + max(loading.tensors, loading.states)


def test_main_memory_on_a_cpu_is_the_weights_and_one_tensor(recipe_dict):
    planned = plan(check_recipe(recipe_dict()))
    loading = planned.loading
    assert loading.main_memory == planned.memory.libraries + planned.memory.weights + 259 * 64 * 4


# --- what is said ---------------------------------------------------------------------------------


def test_each_amount_has_its_line_and_its_place_in_json(recipe_dict, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_dict()), encoding="utf-8")
    assert main(["plan", str(path), "--card", "3060"]) == 0
    said = capsys.readouterr().out
    rows = {line[:15].strip(): line[15:].strip() for line in said.splitlines()}
    assert rows["CUDA"] == "512 MB for its context and libraries (assumed)"
    assert rows["desktop"] == "600 MB, if one shows on this card (assumed)"
    for name in ("memory", "weights", "adapter", "activations", "working", "answers", "download", "main memory"):
        assert rows[name], name
    assert rows["download"].startswith("none: ")
    assert "half or twice that is possible" in rows["time"]
    assert "It fits: 1.1 GB of 12.0 GB (9%), computed, not measured on a card." in said
    assert main(["plan", str(path), "--card", "3060", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["desktop"] == 600 * MB
    assert told["memory"]["verdict"] == "fits"
    assert told["memory"]["least"] < told["memory"]["available"] == 12 * GB
    assert told["memory"]["answers"] > 0
    assert told["machine"]["card"]["tflops"] == 25.5
    assert told["loading"]["download"] == 0
    assert told["loading"]["main_memory"] > 3 * GB
    assert 0 < told["time"]["flops_per_second"] < told["time"]["published"] == 25.5e12
