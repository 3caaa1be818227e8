"""`model.stream`: whole runs on a base whose weights visit the device, and what such a base is refused for."""

import pytest
import torch
from run_logs import logged
from tiny import LORA, build, tiny

import lora_dpo
from lora_dpo import DPOTrainer
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.events import Note
from lora_dpo.model.base import load_base
from lora_dpo.model.visiting import VisitingWeights
from lora_dpo.training.run import train


@pytest.fixture
def losses(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(stream, **model):
        events = []
        recipe = check_recipe(recipe_dict(model={"stream": stream, **model}, engine={"reference_cache": "off"}))
        result = train(recipe, name=f"run-{stream}", on_event=events.append)
        said = [event.text for event in events if isinstance(event, Note)]
        found = [event for event in events if isinstance(event, lora_dpo.events.Compared)]
        rows = logged(result.folder)
        return [rows[step] for step in sorted(rows)], said, found

    return run


@pytest.mark.parametrize("model", [{}, {"quantize": "nf4", "packed": True}], ids=["float32", "packed"])
def test_a_run_on_a_streamed_base_has_the_same_losses_and_answers(losses, model):
    plain, said, compared = losses("off", **model)
    assert not [text for text in said if "main memory" in text]
    for stream in ("embeddings", "on"):
        ours, said, found = losses(stream, **model)
        assert ours == pytest.approx(plain, rel=1e-5)
        assert [text for text in said if "live in main memory, which costs time and no more on a CPU" in text]
        assert [str(event)[:500] for event in found] == [str(event)[:500] for event in compared]


def test_on_a_cpu_auto_is_off(losses, tiny_model_folder):
    assert load_base(str(tiny_model_folder), quantize="none", stream="auto").streamed == "off"
    assert load_base(str(tiny_model_folder), quantize="none", stream="on").streamed == "on"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(method="sft"), r"model\.stream is on, which is for method: dpo, not sft"),
        (dict(lora={"dora": True}), r"does not go together with lora\.dora"),
        (dict(lora={"modules_to_save": ["model.norm"]}), r"lora\.modules_to_save"),
        (dict(lora={"parameters": "experts"}), r"lora\.parameters"),
    ],
)
def test_what_needs_the_weights_all_the_time_is_refused_early(recipe_dict, changes, match):
    with pytest.raises(ConfigError, match=match):
        train(check_recipe(recipe_dict(model={"stream": "on"}, **changes)))


@pytest.mark.parametrize("held", ["off", "embeddings"])
def test_a_base_that_is_handed_in_otherwise_is_refused(recipe_dict, tiny_model_folder, held):
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32", stream=held)
    with pytest.raises(ConfigError, match=rf"says model\.stream: on, and of the base handed in that is {held}"):
        train(check_recipe(recipe_dict(model={"stream": "on", "quantize": "none"})), base=base)


def test_trls_own_passes_are_refused(tiny_model_folder, tmp_path):
    model = tiny("llama").requires_grad_(False)
    VisitingWeights(model, torch.device("cpu"), layers=True)
    with pytest.raises(ConfigError, match=r"model\.stream.*but neftune_noise_alpha draws noise.*model\.stream to off"):
        build(DPOTrainer, model, tiny_model_folder, tmp_path, neftune_noise_alpha=5.0)


def test_dora_on_weights_that_are_away_is_refused(tiny_model_folder, tmp_path):
    model = tiny("llama").requires_grad_(False)
    VisitingWeights(model, torch.device("cpu"), layers=True)
    with pytest.raises(ConfigError, match="has DoRA, which needs them all the time"):
        build(DPOTrainer, model, tiny_model_folder, tmp_path, lora=type(LORA)(**{**LORA.to_dict(), "use_dora": True}))


def test_weights_that_cannot_visit_are_named():
    model = tiny("llama").requires_grad_(False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="no plain embeddings and head"):
        VisitingWeights(model, torch.device("cpu"), layers=True)


def test_apples_gpus_are_refused(tiny_model_folder):
    with pytest.raises(ConfigError, match=r"model\.stream is on, which is for NVIDIA GPUs"):
        load_base(str(tiny_model_folder), quantize="none", device="mps", dtype="float32", stream="on")


def test_on_a_gpu_auto_is_on_where_the_base_does_not_fit(monkeypatch):
    from lora_dpo.model import held_size

    skeleton = tiny("llama")
    needed = sum(weight.numel() for weight in skeleton.parameters()) * 2
    for free, expected in ((needed, "off"), (needed - 1, "on")):
        skeleton.requires_grad_(True)  # as it is when it is new
        monkeypatch.setattr(held_size, "free_bytes", lambda place, free=free: free)
        place = torch.device("cuda")
        found = held_size.streamed_for("auto", place, lambda: skeleton, torch.bfloat16, None, packed=False)
        assert found == expected
