"""The whole path on a tiny model: recipe to adapter folder, interrupted and resumed, loaded elsewhere."""

import contextlib
import shutil
import sqlite3

import pytest
import torch
from conftest import COMMIT, OLD_COMMIT
from elsewhere import as_windows
from peft import PeftModel
from run_logs import logged
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lora_dpo
from lora_dpo import places
from lora_dpo.adapters.passport import read_passport
from lora_dpo.adapters.stored_run import read_run
from lora_dpo.config.reading import check_recipe
from lora_dpo.data import Origin, TokenPair
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import AdapterError, ConfigError, OutputError
from lora_dpo.events import Compared, Note, Progress, Resolved, Saved, StepLogged, Stopped, StopSignal
from lora_dpo.files import sha256_of
from lora_dpo.model.base import load_base
from lora_dpo.model.identity import weight_fingerprint
from lora_dpo.model.origin import CARRIED, origin_sample, to_text
from lora_dpo.serving.chat import open_chat
from lora_dpo.training.run import train


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**changes):
        settings = recipe_dict()
        for dotted, value in changes.items():
            part = settings
            *parents, last = dotted.split("__")
            for parent in parents:
                part = part.setdefault(parent, {})
            part[last] = value
        return check_recipe(settings)

    return make


def test_a_run_leaves_a_whole_adapter_folder_and_nothing_else(recipe, tmp_path):
    events = []
    result = train(recipe(trainer__max_steps=2), name="tiny", on_event=events.append)
    assert result.folder.name == "tiny"
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curves.png", "measured.json", "metrics.jsonl",
        "pair-margins.json", "passport.json", "recipe.yaml", "report.html", "verify.json",
    ]  # fmt: skip
    assert sorted(path.name for path in result.folder.parent.iterdir()) == ["tiny"]
    assert (result.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    kinds = [type(event) for event in events]
    assert kinds.index(Resolved) < next(
        i for i, e in enumerate(events) if isinstance(e, Progress) and "loading" in e.stage
    )
    assert {Compared, Saved, StepLogged} <= set(kinds)
    assert set(logged(result.folder)) == {1, 2}


def test_second_run_takes_the_next_free_name_and_a_given_output_is_never_overwritten(recipe):
    first, second = (train(recipe(trainer__max_steps=1), name="tiny").folder for _ in range(2))
    assert (first.name, second.name) == ("tiny", "tiny-2")
    with pytest.raises(OutputError, match="already exists"):
        train(recipe(output=str(first)))


def test_the_saved_recipe_runs_again_to_the_same_losses(recipe):
    from lora_dpo.config.reading import read_recipe

    first = train(recipe(trainer__max_steps=2), name="tiny").folder
    again = train(read_recipe(first / "recipe.yaml", ["output=adapters/again"])).folder
    assert logged(again) == logged(first)


def test_resumed_losses_equal_uninterrupted_ones(recipe):
    whole = train(recipe(trainer__max_steps=6), name="whole")
    stop = StopSignal()

    def stop_after_three(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 3:
            stop.requested = True

    with pytest.raises(Stopped) as stopped:
        train(recipe(trainer__max_steps=6), name="cut", on_event=stop_after_three, stop=stop)
    assert stopped.value.resumable
    assert not stopped.value.output.exists()
    resumed = train(recipe(trainer__max_steps=6), name="cut", resume=True)
    assert logged(resumed.folder) == pytest.approx(logged(whole.folder), rel=1e-6)
    assert list(logged(resumed.folder)) == [1, 2, 3, 4, 5, 6]
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], value, atol=1e-7), name
    assert resumed.after.pairs == whole.after.pairs
    assert not resumed.folder.with_name("cut.partial").exists()


@pytest.mark.linux
def test_where_open_files_keep_their_folders_a_run_is_resumed_and_leaves_the_adapter_alone(recipe, monkeypatch):
    """As on Windows: what the guard and the trainer read from a checkpoint may not keep it from being removed."""
    import matplotlib.font_manager  # noqa: F401 - libraries look at the platform when they are imported

    stop, some = StopSignal(), {"trainer__max_steps": 4, "trainer__save_steps": 1, "trainer__save_total_limit": 1}

    def stop_after_two(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 2:
            stop.requested = True

    with pytest.raises(Stopped) as stopped:
        train(recipe(**some), name="cut", on_event=stop_after_two, stop=stop)
    kept = [path.name for path in (stopped.value.output.with_name("cut.partial") / "checkpoints").glob("checkpoint-*")]
    assert kept == ["checkpoint-2"]
    as_windows(monkeypatch)
    done = train(recipe(**some), name="cut", resume=True)
    assert list(logged(done.folder)) == [1, 2, 3, 4]
    assert [path.name for path in done.folder.parent.iterdir()] == ["cut"]


def test_stopped_before_the_first_step_leaves_nothing(recipe, tmp_path):
    stop = StopSignal()

    def stop_early(event):
        if isinstance(event, Progress) and "before training" in event.stage:
            stop.requested = True

    with pytest.raises(Stopped) as stopped:
        train(recipe(), name="tiny", on_event=stop_early, stop=stop)
    assert not stopped.value.resumable
    assert list((tmp_path / "adapters").iterdir()) == []


def test_stopped_during_the_last_evaluation_resumes_without_training_again(recipe):
    stop = StopSignal()

    def stop_late(event):
        if isinstance(event, Progress) and "after training" in event.stage:
            stop.requested = True

    with pytest.raises(Stopped) as stopped:
        train(recipe(trainer__max_steps=2), name="tiny", on_event=stop_late, stop=stop)
    assert stopped.value.resumable
    steps = []
    train(
        recipe(trainer__max_steps=2),
        name="tiny",
        resume=True,
        on_event=lambda e: steps.append(e) if isinstance(e, StepLogged) else None,
    )
    assert not any("loss" in event.metrics for event in steps)


def test_resuming_with_other_settings_is_refused(recipe):
    stop = StopSignal()

    def stop_at_once(event):
        if isinstance(event, Progress) and event.stage == "training":
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe(trainer__max_steps=4), name="tiny", on_event=stop_at_once, stop=stop)
    with pytest.raises(ConfigError, match="beta"):
        train(recipe(trainer__max_steps=4, trainer__beta=0.7), name="tiny", resume=True)


def test_a_crash_in_training_leaves_no_adapter(recipe, monkeypatch, tmp_path):
    from lora_dpo.training.dpo_trainer import DPOTrainer

    def crash(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DPOTrainer, "training_step", crash)
    with pytest.raises(OutputError, match="No space left"):
        train(recipe(), name="tiny")
    assert list((tmp_path / "adapters").iterdir()) == []


def test_the_base_is_loaded_once_across_train_evaluate_and_chat(recipe, monkeypatch):
    loads = []
    original = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):  # every way to load weights ends here
        loads.append(args[0])
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    result = train(recipe(), name="tiny")
    chat = lora_dpo.Chat(result.base, result.model)
    "".join(chat.say("hello"))
    chat.use_adapter = False
    "".join(chat.say("hello"))
    score_pairs(result.model, [TokenPair([257, 5], [6, 258], [7, 258], Origin("t", 1), False)], pad_id=258)
    assert len(loads) == 1


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_plain_peft_loads_the_adapter_with_the_same_scores(recipe, quantize, tiny_model_folder):
    result = train(recipe(model__quantize=quantize), name="tiny")
    ids = torch.tensor([[257, 5, 6, 7, 8]])
    base = lora_dpo.load_base(str(tiny_model_folder), quantize=quantize)
    plain = PeftModel.from_pretrained(base.model, str(result.folder))
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, result.model(input_ids=ids).logits, atol=1e-5)


def test_passport_says_what_the_adapter_was_made_from(recipe, tiny_model_folder):
    folder = train(recipe(), name="tiny").folder
    passport = read_passport(folder)
    assert passport.base == str(tiny_model_folder)
    assert passport.base_fingerprint
    assert passport.reference == "base"
    assert passport.data["train"]["pairs"] > 0
    assert set(passport.metrics) == {"before", "after"}
    assert passport.versions["trl"]


def test_an_adapter_for_another_base_is_refused_with_both_names(recipe, tiny_model_folder, tmp_path):
    folder = train(recipe(), name="tiny").folder
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="was made for") as error:
        open_chat(folder, model=str(tmp_path / "other"))
    assert "other" in str(error.value)
    assert str(tiny_model_folder) in str(error.value)


def test_continuing_from_an_adapter_starts_at_ln_2_and_differs_from_it_after(recipe):
    first = train(recipe(trainer__learning_rate=1e-2), name="first").folder
    settings = dict(trainer__loss_type="sigmoid", trainer__learning_rate=1e-2)
    second = train(recipe(reference=f"adapter:{first}", **settings), name="second")
    assert logged(second.folder)[1] == pytest.approx(0.6931472, abs=1e-5)
    assert second.before.pairs.accuracy == 0.5
    assert not (second.folder / "ref").exists()
    barely = train(reference_recipe := recipe(reference=f"adapter:{first}", trainer__learning_rate=1e-9), name="barely")
    assert abs(barely.after.pairs.chosen_logratio) < 1e-3  # measured against the frozen copy, not the base
    assert reference_recipe.reference_adapter == first
    third = train(recipe(reference=f"adapter:{first}", **settings), name="third")
    assert logged(third.folder) == logged(second.folder)


def test_a_run_with_another_adapter_finds_the_references_of_the_one_before(recipe):
    def stored():
        found = {}
        for path in places.references().glob("*.sqlite"):
            with contextlib.closing(sqlite3.connect(path)) as database:
                found[path.name] = database.execute("SELECT count(*) FROM logps").fetchone()[0]
        return found

    first = train(recipe(), name="one")
    assert "ref" not in first.model.peft_config  # no frozen copy of what changes nothing yet
    assert read_run(first.folder).measured["reference_seconds"] > 0
    before = stored()
    assert len(before) == 1
    train(recipe(trainer__seed=7), name="another-order")
    assert stored().keys() == before.keys()  # and other pairs: it is no whole epoch
    before = stored()
    for number, changes in enumerate(
        [
            {"lora__rank": 3},
            {"lora__targets": ["q_proj"]},
            {"lora__layers": [0]},
            {"lora__dora": True},
            {"lora__init": "eva"},
            {"lora__modules_to_save": ["model.norm"]},
        ]
    ):
        other = train(recipe(**changes), name=f"other-{number}")
        assert stored() == before, changes
        assert read_run(other.folder).measured["reference_seconds"] == 0, changes


def test_continuing_run_resumes_with_the_same_losses(recipe):
    first = train(recipe(trainer__learning_rate=1e-2), name="first").folder
    settings = dict(reference=f"adapter:{first}", trainer__max_steps=4, trainer__learning_rate=1e-2)
    whole = train(recipe(**settings), name="whole").folder
    stop = StopSignal()

    def stop_at_two(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 2:
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe(**settings), name="cut", on_event=stop_at_two, stop=stop)
    resumed = train(recipe(**settings), name="cut", resume=True).folder
    assert logged(resumed) == pytest.approx(logged(whole), rel=1e-5)


def test_lora_settings_beside_a_reference_adapter_are_refused(recipe):
    first = train(recipe(), name="first").folder
    with pytest.raises(ConfigError, match="rank"):
        train(recipe(reference=f"adapter:{first}", lora__rank=2), name="second")


def test_leaked_prompts_are_said(recipe, recipe_dict):
    file = recipe_dict()["data"]["train"]
    notes = []
    train(recipe(data__eval=file), name="tiny", on_event=lambda e: notes.append(e) if isinstance(e, Note) else None)
    assert any("also trained on" in note.text and note.warning for note in notes)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_base_that_is_handed_in_fits_the_recipe_and_its_commit_is_in_the_passport(hub_model, revision, recipe):
    settings = recipe(model__name=hub_model, model__quantize="none", model__revision=revision)
    result = train(settings, base=load_base(hub_model, revision=revision, quantize="none"))
    assert read_passport(result.folder).base_revision == COMMIT


def test_a_hub_base_of_another_commit_than_the_recipe_s_is_refused(hub_model, recipe):
    base = load_base(hub_model, quantize="none")
    with pytest.raises(ConfigError, match=f"revision {COMMIT}; the recipe says none, {OLD_COMMIT}"):
        train(recipe(model__name=hub_model, model__quantize="none", model__revision="old"), base=base)


@pytest.mark.parametrize(("size", "gathered", "drop"), [(5, 1, False), (5, 1, True), (2, 3, False), (5, 2, True)])
def test_the_steps_that_a_run_announces_are_those_that_it_takes(size, gathered, drop, recipe):
    events = []
    settings = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": size}
    settings |= {"dataloader_drop_last": drop, "gradient_accumulation_steps": gathered}
    train(recipe(trainer=settings, health={"action": "none"}), on_event=events.append)
    said = dict(next(event for event in events if isinstance(event, Resolved)).lines)["steps"]
    last = max(event.step for event in events if isinstance(event, StepLogged))
    assert said.startswith(f"{last} of ")


@pytest.mark.parametrize("change", ["moved", "replaced"])
def test_a_base_and_a_reference_that_move_meanwhile_cost_no_finished_run(
    recipe, tiny_model_folder, tiny_adapter, tmp_path, change
):
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    (base / "LICENSE").write_text("Licence of the base")
    reference = shutil.copytree(tiny_adapter, tmp_path / "reference")
    settings = {"model__name": str(base), "reference": f"adapter:{reference}", "trainer__max_steps": 1}

    def look(step, *_):
        if step == 1 and base.exists():
            shutil.rmtree(base)
            shutil.rmtree(reference)
            if change == "replaced":
                base.mkdir()
                (base / "config.json").write_text("{")
                (base / "model.safetensors").write_text("not whole")

    passport = read_passport(train(recipe(**settings), name="late", look=look).folder)
    assert not reference.exists()
    assert passport.base_licence == "Licence of the base"
    assert passport.reference_sha256 == sha256_of(tiny_adapter / "adapter_model.safetensors")
    sample = to_text(origin_sample(str(tiny_model_folder), most=CARRIED))
    assert (passport.base_fingerprint, passport.base_sample) == (weight_fingerprint(str(tiny_model_folder)), sample)
