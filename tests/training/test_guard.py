"""The guard on real runs of tiny models: what provokes it, what it goes back to, and that it changes nothing else."""

import json
import math
import re

import pytest
import torch
from run_logs import log_rows, logged

from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError, ModelError, OutputError
from lora_dpo.events import Alarmed, Note, Progress, Sampled, StepLogged, Stopped, StopSignal
from lora_dpo.training.dpo_trainer import DPOTrainer
from lora_dpo.training.run import train

pytestmark = pytest.mark.outcome


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**changes):
        return check_recipe(recipe_dict(**changes))

    return make


def weights(result):
    """The policy's own tensors; what TRL adds for its reference is none of them."""
    return {name: value for name, value in result.model.named_parameters() if ".default." in name}


def assert_same(one, other, atol=1e-7):
    theirs = weights(other)
    assert theirs
    for name, value in weights(one).items():
        assert torch.allclose(theirs[name], value, atol=atol, rtol=0), name


RUINOUS = {"learning_rate": 1e-3, "loss_type": "sigmoid", "max_steps": 40, "lr_scheduler_type": "constant"}


# --- it changes nothing ---------------------------------------------------------------------------


def test_a_guarded_run_has_the_losses_and_weights_of_an_unguarded_one(recipe):
    runs = [
        train(recipe(trainer={"max_steps": 6}, health={"every": 2, "action": action}, output=action))
        for action in ("none", "warn")
    ]
    assert logged(runs[0].folder) == logged(runs[1].folder)
    assert_same(*runs, atol=0.0)
    assert not any("answers" in row for row in log_rows(runs[0].folder))
    assert [row["step"] for row in log_rows(runs[1].folder) if "answers" in row] == [2, 4, 6]


def test_a_candidate_is_not_looked_at_shortly_before_its_search_measures_it(recipe, tmp_path):
    for steps, every, looks in ((6, 2, [2, 4]), (7, 3, [3]), (8, 3, [3, 6])):
        settings, events = recipe(trainer={"max_steps": steps}, health={"every": every}), []
        result = train(settings, candidate_of=tmp_path, on_event=events.append)
        assert not (result.folder / "verify.json").exists()
        assert [event.step for event in events if isinstance(event, Sampled)] == looks
        assert [row["step"] for row in log_rows(result.folder) if "answers" in row] == looks


def test_candidates_share_what_the_base_answers_and_only_to_the_same_question(recipe, tmp_path):
    def answers_before(prompts, more=None, **options):
        events = []
        health = {"every": 2, "prompts": prompts, **(more or {})}
        settings = recipe(trainer={"max_steps": 4}, health=health, evaluation={"answers": 0})
        train(settings, on_event=events.append, **options)
        first = next(event for event in events if isinstance(event, Sampled))
        return [before for _, before, _ in first.rows]

    alone = answers_before(2)
    assert answers_before(2, candidate_of=tmp_path) == alone
    path = tmp_path / "base-health.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["sample"]["texts"] == alone
    stored["sample"]["texts"] = ["seen before"] * 2
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert answers_before(2, candidate_of=tmp_path) == ["seen before"] * 2
    kept = path.read_text(encoding="utf-8")
    for prompts, more in ((3, {}), (2, {"max_new_tokens": 9}), (2, {"judge": "rules:length<=9"})):
        path.write_text(kept, encoding="utf-8")
        others = answers_before(prompts, more, candidate_of=tmp_path)
        assert len(others) == prompts
        assert "seen before" not in others, more


def test_samples_go_to_the_events_the_log_and_the_trackers(recipe, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    tracked = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            tracked.append(dict(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    events = []
    settings = recipe(trainer={"max_steps": 4, "report_to": ["tensorboard"]}, health={"every": 2})
    result = train(settings, name="tiny", on_event=events.append)
    sampled = [event for event in events if isinstance(event, Sampled)]
    assert [event.step for event in sampled] == [2, 4]
    assert all(len(event.rows) == 2 for event in sampled)  # those that are answered before training anyway
    assert {"health/answer_tokens", "health/finished", "health/kl"} <= set(sampled[0].numbers)
    at_two = next(row for row in tracked if "health/kl" in row)
    assert at_two["loss"] == logged(result.folder)[2]
    assert isinstance(at_two["health/answer_1"], str)
    told = [event for event in events if isinstance(event, StepLogged)]
    assert all(isinstance(value, float) for event in told for value in event.metrics.values())


def test_tensorboards_files_outlive_the_run(recipe, monkeypatch):
    from transformers.integrations import integration_utils

    made = []

    class Writer:
        def __init__(self, log_dir):
            self.scalars, self.texts = {}, {}
            made.append((log_dir, self))

        def add_scalar(self, name, value, step):
            self.scalars[name, step] = value

        def add_text(self, name, text, step=None):
            self.texts[name, step] = text

        def flush(self):
            pass

        def close(self):
            pass

    class OnWriter(integration_utils.TensorBoardCallback):
        def __init__(self):  # its own wants the package
            self._SummaryWriter, self.tb_writer, self.logging_dir = Writer, None, None

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", OnWriter)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    train(recipe(trainer={"max_steps": 2, "report_to": ["tensorboard"]}, health={"every": 2}), name="tiny")
    [(folder, writer)] = made
    assert folder == "runs/tiny"
    assert {("train/loss", 1), ("train/health/kl", 2)} <= writer.scalars.keys()
    assert any(name.startswith("train/health/answer_1") for name, _ in writer.texts)


def test_trackers_that_take_numbers_alone_get_no_texts(recipe, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Numbers(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Numbers)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["mlflow"])
    train(recipe(trainer={"max_steps": 2, "report_to": ["mlflow"]}, health={"every": 1}), name="tiny")
    assert any("health/kl" in row for row in seen)
    assert [value for row in seen for value in row.values() if isinstance(value, str)] == []


# --- alarms that act ------------------------------------------------------------------------------


def test_a_ruinous_recipe_stops_and_goes_back_to_a_healthy_step(recipe):
    events = []
    result = train(recipe(trainer=RUINOUS), name="tiny", on_event=events.append)
    outcome = result.outcome
    assert outcome.steps < 40
    assert outcome.kept < outcome.steps
    assert outcome.sentence.startswith(f"Stopped at step {outcome.steps} of 40 because of ")
    assert [event.step for event in events if isinstance(event, Alarmed)][-1] == outcome.steps
    assert any(isinstance(event, Note) and event.text == outcome.sentence for event in events)
    measured = json.loads((result.folder / "measured.json").read_text())
    assert measured["health"]["sentence"] == outcome.sentence
    assert outcome.sentence in (result.folder / "README.md").read_text()
    assert outcome.sentence.split(":")[0] in (result.folder / "report.html").read_text()
    assert max(logged(result.folder)) == outcome.steps


def test_what_is_kept_is_the_adapter_of_that_step(recipe):
    kept = train(recipe(trainer=RUINOUS), name="tiny").outcome.kept
    assert kept > 0
    guarded = train(recipe(trainer=RUINOUS, output="guarded"))
    short = train(recipe(trainer={**RUINOUS, "max_steps": kept}, health={"action": "none"}, output="short"))
    assert_same(guarded, short)


def test_stop_keeps_the_step_it_stopped_at_and_warn_goes_on(recipe):
    stopped = train(recipe(trainer=RUINOUS, health={"action": "stop"}, output="stopped")).outcome
    assert stopped.kept == stopped.steps < 40
    assert stopped.sentence.endswith("the adapter is that of this step.")
    warned = train(recipe(trainer=RUINOUS, health={"action": "warn"}, output="warned")).outcome
    assert (warned.kept, warned.steps, warned.sentence) == (40, 40, None)
    assert warned.alarms


def test_lower_lr_halves_the_rate_three_times_at_most(recipe):
    events = []
    settings = recipe(trainer=RUINOUS, health={"action": "lower-lr"})
    result = train(settings, name="tiny", on_event=events.append)
    rates = {row["step"]: row["learning_rate"] for row in log_rows(result.folder) if "loss" in row}
    told = [event.text for event in events if isinstance(event, Note) and "halved" in event.text]
    lowered = [int(re.match(r"Step (\d+): the learning rate is halved", text)[1]) for text in told]
    assert 1 <= len(lowered) <= 3
    assert lowered[0] < max(rates), "no step was taken at the lower rate"
    assert rates == {step: 1e-3 / 2 ** sum(one < step for one in lowered) for step in rates}


def test_nan_in_training_ends_in_the_last_good_state(recipe, monkeypatch):
    original = DPOTrainer.training_step

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 9:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(DPOTrainer, "training_step", poisoned)
    result = train(recipe(trainer={"max_steps": 20}), name="tiny")
    assert result.outcome.alarms[0].name == "not a number"
    assert 0 < result.outcome.kept <= 9
    assert all(bool(value.isfinite().all()) for value in result.model.parameters())
    with pytest.raises(ModelError, match="NaN"):
        train(recipe(trainer={"max_steps": 20}, health={"action": "warn"}, output="warned"))


def test_a_reference_that_moves_is_noticed(recipe):
    from lora_dpo.model.base import load_base

    base = load_base(recipe().model.name, quantize="none", dtype="float32")

    def disturb(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 3:
            with torch.no_grad():
                base.model.lm_head.weight.mul_(1.5)

    settings = recipe(trainer={"max_steps": 8}, health={"every": 4})
    outcome = train(settings, name="tiny", base=base, on_event=disturb).outcome
    assert "reference drift" in [alarm.name for alarm in outcome.alarms]
    assert outcome.steps == 4


def test_identical_ways_to_answer_are_stuck_at_ln_2(recipe):
    outcome = train(recipe(trainer={"max_steps": 26, "learning_rate": 1e-9}), name="tiny").outcome
    assert [alarm.name for alarm in outcome.alarms] == ["stuck at ln 2"]
    assert outcome.kept == outcome.steps == 26


# --- keeping the best -----------------------------------------------------------------------------


def test_the_best_held_out_accuracy_is_kept(recipe, monkeypatch):
    from lora_dpo.training.guard.training_guard import Guard

    accuracies = iter([0.6, 0.9, 0.8])
    original = Guard.logged

    def scripted(self, step, logs, *, texts):
        if "eval_rewards/accuracies" in logs:
            logs["eval_rewards/accuracies"] = next(accuracies)
        return original(self, step, logs, texts=texts)

    monkeypatch.setattr(Guard, "logged", scripted)
    outcome = train(recipe(trainer={"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}), name="tiny").outcome
    assert outcome.kept == 4
    assert "step 4 of 6" in outcome.sentence
    assert "0.900" in outcome.sentence


def test_a_judge_of_the_samples_chooses_the_step(recipe, monkeypatch):
    from lora_dpo.training.guard.completion_sampler import CompletionSampler

    scores = iter([None, 0.2, 0.7, 0.7, 0.1])  # before the first step, then every second step
    monkeypatch.setattr(CompletionSampler, "_score", lambda self, answers: next(scores))
    health = {"every": 2, "judge": "rules:chars<=9"}
    outcome = train(recipe(trainer={"max_steps": 8}, health=health), name="tiny").outcome
    assert outcome.kept == 6  # of equals the later one


def test_a_judge_scores_the_sampled_answers(recipe):
    events = []
    health = {"every": 2, "judge": ["rules:chars>=1", "rules:no-repeat"]}
    train(recipe(trainer={"max_steps": 2}, health=health), name="tiny", on_event=events.append)
    [sampled] = [event for event in events if isinstance(event, Sampled)]
    assert 0 <= sampled.numbers["health/judge"] <= 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"health": {"judge": "implicit"}}, "health.judge is implicit"),
        ({"health": {"judge": "rules:lenght<=3"}}, "Did you mean length"),
        (
            {"health": {"judge": "rules:json"}, "data": {"eval": None}, "evaluation": {"answers": 0, "show": 0}},
            "data.eval",
        ),
        ({"health": {"judge": "rules:json", "prompts": 0}}, "health.prompts"),
        ({"health": {"every": 0}}, "allowed: auto, or 1 or more"),
        ({"health": {"action": "panic"}}, "health.action"),
        ({"health": {"shortest": 1.5}}, "health.shortest"),
    ],
)
def test_settings_that_could_not_work_are_refused(recipe, changes, says):
    with pytest.raises(ConfigError, match=says):
        train(recipe(**changes), name="tiny")


# --- interrupted ----------------------------------------------------------------------------------


def stop_at(step):
    stop = StopSignal()

    def hear(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == step:
            stop.requested = True

    return {"on_event": hear, "stop": stop}


def test_a_resumed_ruinous_run_ends_as_an_uninterrupted_one(recipe):
    whole = train(recipe(trainer=RUINOUS), name="whole")
    cut = whole.outcome.kept + 1
    assert cut < whole.outcome.steps
    with pytest.raises(Stopped):
        train(recipe(trainer=RUINOUS), name="cut", **stop_at(cut))
    resumed = train(recipe(trainer=RUINOUS), name="cut", resume=True)
    assert (resumed.outcome.steps, resumed.outcome.kept) == (whole.outcome.steps, whole.outcome.kept)
    assert resumed.outcome.sentence == whole.outcome.sentence
    assert_same(resumed, whole)


def test_a_run_that_the_guard_ended_is_not_trained_further_when_resumed(recipe):
    stop = StopSignal()

    def stop_late(event):
        if isinstance(event, Progress) and "after training" in event.stage:
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe(trainer=RUINOUS), name="cut", on_event=stop_late, stop=stop)
    events = []
    resumed = train(recipe(trainer=RUINOUS), name="cut", resume=True, on_event=events.append)
    assert not any(isinstance(event, StepLogged) for event in events)
    whole = train(recipe(trainer=RUINOUS), name="whole")
    assert resumed.outcome == whole.outcome
    assert_same(resumed, whole)


def test_a_checkpoint_that_lost_the_guards_state_does_not_count(recipe):
    with pytest.raises(Stopped) as stopped:
        train(recipe(trainer={"max_steps": 6}), name="cut", **stop_at(3))
    for path in stopped.value.output.with_name("cut.partial").rglob("health.json"):
        path.unlink()
    with pytest.raises(OutputError, match="No interrupted run of cut"):
        train(recipe(trainer={"max_steps": 6}), name="cut", resume=True)
