"""Settings of the adapter that decide how a run begins or what it trains, through whole runs on a tiny model."""

import json
import math

import pytest
import torch
from peft import PeftModel
from run_logs import logged
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_dpo.training.policy as policy
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError
from lora_dpo.events import Progress, Resolved, Stopped, StopSignal
from lora_dpo.serving.chat import open_chat
from lora_dpo.training.run import train


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(lora, **changes):
        settings = recipe_dict(**changes)
        settings["lora"] = {**settings.get("lora", {}), **lora}
        return check_recipe(settings)

    return make


def stopped_after(step, stop):
    def listen(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == step:
            stop.requested = True

    return listen


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("method", ["dpo", "sft", "kto"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_begins_with_a_of_what_the_layers_read(method, quantize, recipe):
    events = []
    steps = {"max_steps": 2, "learning_rate": 1e-3} | ({"loss_type": "sigmoid"} if method == "dpo" else {})
    changes = dict(model={"quantize": quantize}, method=method, trainer=steps)
    done = train(recipe({"init": "eva", "rank": 3}, **changes), name="eva", on_event=events.append)
    if method == "dpo":
        assert logged(done.folder)[1] == pytest.approx(math.log(2), abs=1e-5)
    assert done.model.peft_config["default"].init_lora_weights is True
    told = [event for event in events if isinstance(event, Progress) and event.stage == "A from what the layers read"]
    assert told[-1].done == told[-1].total == 14
    lines = next(event for event in events if isinstance(event, Resolved)).lines
    assert any("A from what the layers read (EVA)" in text for _, text in lines)
    stored = load_file(done.folder / "adapter_model.safetensors")
    before = [a for name, a in stored.items() if "lora_A" in name]
    assert all((a @ a.T - torch.eye(3)).abs().max() < 0.2 for a in before)  # two steps from rows of length 1
    assert any(value.abs().max() > 0 for name, value in stored.items() if "lora_B" in name)


def test_such_an_adapter_is_an_ordinary_one_elsewhere(recipe, tiny_model_folder):
    done = train(recipe({"init": "eva", "rank": 3}, trainer={"learning_rate": 1e-3}), name="eva")
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert not config.get("eva_config")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), done.folder)
    assert torch.allclose(logits(plain.eval()), logits(done.model), atol=1e-5)
    assert open_chat(done.folder) is not None
    with pytest.raises(ConfigError, match=r"lora \(.*init.*\) comes from the reference adapter"):
        train(recipe({"init": "eva"}, reference=f"adapter:{done.folder}"), name="on")


def test_a_run_that_goes_on_begins_nothing_anew(recipe, monkeypatch):
    settings = {"init": "eva", "rank": 3}, dict(trainer={"max_steps": 4, "learning_rate": 1e-3})
    whole = train(recipe(settings[0], **settings[1]), name="whole")
    stop = StopSignal()
    with pytest.raises(Stopped):
        train(recipe(settings[0], **settings[1]), name="cut", on_event=stopped_after(2, stop), stop=stop)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "init_from_inputs", lambda *args, **kwargs: pytest.fail("begun again"))
        resumed = train(recipe(settings[0], **settings[1]), name="cut", resume=True)
    assert logged(resumed.folder) == pytest.approx(logged(whole.folder), rel=1e-6)
    stored = load_file(resumed.folder / "adapter_model.safetensors")
    for name, value in load_file(whole.folder / "adapter_model.safetensors").items():
        assert torch.allclose(stored[name], value, atol=1e-7), name


def test_a_rank_without_as_many_directions_ends_the_run_before_the_first_step(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.init: eva: the input of .* has 64 numbers, fewer than the rank 65"):
        train(recipe({"init": "eva", "rank": 65}), name="eva")
    assert not list((tmp_path / "adapters").glob("*"))
