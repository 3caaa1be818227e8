"""Rounds of sample, judge, train on a tiny model: they chain, stop, go on, and leave the base as it was."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.cli.commands import main
from lora_dpo.config.improve_recipe import ImproveRecipe, ImproveSection, dump_improve_recipe, read_improve_recipe
from lora_dpo.config.reading import check_settings
from lora_dpo.errors import ConfigError, DataError, NoPairs, OutputError
from lora_dpo.events import Note, Progress, RoundsMeasured, Saved, StepLogged, Stopped, StopSignal
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Answer
from lora_dpo.model.lora import detach

rounds = importlib.import_module("lora_dpo.training.improve_rounds")
training = importlib.import_module("lora_dpo.training.run")
ROOT = Path(__file__).resolve().parents[2]

# High bytes are not words: this judge likes answers of ASCII characters.
JUDGE = """
def ascii(prompt, answers):
    return [sum(letter.isascii() for letter in answer.text) / max(1, len(answer.text)) for answer in answers]
"""


@pytest.fixture(autouse=True)
def its_own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.py").write_text(JUDGE)
    (tmp_path / "prompts.txt").write_text("".join(f"Say {number}.\n" for number in range(8)))
    (tmp_path / "held.txt").write_text("".join(f"Tell {number}.\n" for number in range(16)))
    # A random model hardly ever ends its turn: let some bytes do it.
    stops = frozenset({*range(120, 140), 257})
    module = importlib.import_module("lora_dpo.model.decoding")
    monkeypatch.setattr(module, "stop_token_ids", lambda model, tokenizer: stops)


@pytest.fixture
def settings(tiny_model_folder):
    def make(**changes):
        found = {
            "model": {"name": str(tiny_model_folder), "quantize": "none", "dtype": "float32"},
            "lora": {"rank": 8},
            "improve": {
                "prompts": "prompts.txt",
                "held_out": "held.txt",
                "judge": "my_judge:ascii",
                "rounds": 2,
                "answers": 6,
                "temperature": 1.0,
                "max_new_tokens": 12,
                "select": "gaps",
                "min_gap": 0.1,
            },
            "trainer": {
                "max_steps": 10,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-2,
                "loss_type": ["sigmoid", "sft"],
            },
        }
        for name, change in changes.items():
            found[name] = {**found.get(name, {}), **change} if isinstance(change, dict) else change
        return found

    return make


@pytest.fixture
def recipe(settings):
    return lambda **changes: check_settings(ImproveRecipe, settings(**changes), where="recipe")


def first_origin(path):
    return json.loads(Path(path).read_text(encoding="utf-8").splitlines()[0])["origin"]


def contents(folder):
    """What the rounds left, without what differs from run to run (times, file names)."""
    folder = Path(folder)
    weights = {path.parent.name: path.read_bytes() for path in folder.glob("*/adapter_model.safetensors")}
    measured = {path.name: path.read_text() for path in folder.glob("*.improve/*.heldout.json")}
    pairs = {path.name: path.read_text() for path in folder.glob("*.improve/*.pairs.jsonl")}
    return weights, measured, pairs


# --- the base -------------------------------------------------------------------------------------


def state_of(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    parts = [(name, type(part).__name__, part.training) for name, part in model.named_modules()]
    patched = [name for name, part in model.named_modules() if "forward" in vars(part)]
    hooks = [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]
    grads = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return tensors, parts, patched, hooks, grads, model.config.to_dict(), set(vars(model)) - {"model_tags"}


def test_training_gives_the_base_back_bit_for_bit(tiny_model_folder, recipe_dict):
    from lora_dpo.config.reading import check_recipe

    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = base.model(ids).logits
    before, model = state_of(base.model), base.model
    recipe = check_recipe(recipe_dict(output="first"))
    result = training.train(recipe, base=base)
    assert detach(result.model) is model
    continued = check_recipe(recipe_dict(reference="adapter:first", output="second"))
    detach(training.train(continued, base=base).model)  # policy and frozen copy come off together
    after = state_of(base.model)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert after[1:] == before[1:]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, logits)


# --- rounds ---------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch):
    """Let the given numbers be each round's scores on every held-out prompt, with a little spread."""

    def force(*means):
        real = rounds.measure_round

        def measure(run, number):
            found = real(run, number)
            scores = tuple(means[number] + 0.01 * number * (index % 2) for index in range(len(found.scores)))
            return rounds.Measurement(found.round, found.answers, scores, found.pairs)

        monkeypatch.setattr(rounds, "measure_round", measure)

    return force


def test_each_round_starts_from_the_last_and_is_held_to_it(recipe, forced):
    forced(0, 1, 2)
    events = []
    result = rounds.improve(recipe(), on_event=events.append)
    assert result.best == 2
    assert result.adapter == Path("adapters/improved-round2")
    assert read_passport(Path("adapters/improved-round1")).reference == "base"
    assert read_passport(Path("adapters/improved-round2")).reference == "adapter:adapters/improved-round1"
    origins = [first_origin(f"adapters/improved.improve/round{n}.pairs.jsonl") for n in (1, 2)]
    assert [origin["adapter"] for origin in origins] == [None, "adapters/improved-round1"]
    assert [origin["sampling"]["seed"] for origin in origins] == [1, 2]
    tables = [event.rows for event in events if isinstance(event, RoundsMeasured)]
    assert [len(table) for table in tables] == [2, 3, 4]
    assert [row[0] for row in tables[-1]] == ["round", "start", "1", "2"]
    assert tables[-1][3][2].startswith("+2.010 ± 0.003")
    assert [saved.folder for saved in events if isinstance(saved, Saved)] == [
        Path("adapters/improved-round1"),
        Path("adapters/improved-round2"),
    ]
    listed = json.loads(Path("adapters/improved.improve/rounds.json").read_text())
    assert [row["adapter"] for row in listed] == [None, "adapters/improved-round1", "adapters/improved-round2"]


def test_it_stops_when_a_round_does_not_raise_the_score(recipe, forced):
    forced(0, 1, 0.994)  # the mean gain is 0.994 + 0.01 - 1.005 = -0.001
    result = rounds.improve(recipe(improve={"rounds": 5}), on_event=(events := []).append)
    assert [found.round for found in result.measured] == [0, 1, 2]
    assert result.best == 1
    assert result.adapter == Path("adapters/improved-round1")
    notes = [event.text for event in events if isinstance(event, Note)]
    assert re.match(r"prompts: \d+ of \d+ rows of ", notes[0])
    assert re.match(r"held-out prompts: \d+ of \d+ rows of ", notes[1])
    assert notes[-1].startswith("Round 2 did not raise the score: gain -0.001")


def test_without_a_better_round_the_start_is_the_best(recipe, forced):
    forced(1, 0, 2)
    result = rounds.improve(recipe())
    assert (result.best, result.adapter, len(result.measured)) == (0, None, 2)


def test_the_first_round_may_start_from_an_adapter(recipe, forced):
    forced(0, 1)
    rounds.improve(recipe(improve={"rounds": 1}, output="first"))
    settings = recipe(improve={"rounds": 1}, output="more", reference="adapter:first-round1")
    rounds.improve(settings.model_copy(update={"lora": type(settings.lora)()}))
    assert read_passport(Path("more-round1")).reference == "adapter:first-round1"
    assert first_origin("more.improve/round1.pairs.jsonl")["adapter"] == "first-round1"


def test_a_judge_that_is_followed_raises_its_own_score_on_prompts_that_were_not_trained_on(recipe):
    result = rounds.improve(recipe(improve={"rounds": 1}))
    gain, error = result.measured[1].gain_over(result.measured[0])
    assert gain > 2 * error > 0
    assert result.best == 1


def scores(*values):
    return rounds.Measurement(1, (Answer("a", 1, True),) * len(values), values)


def test_the_gain_is_the_mean_difference_prompt_by_prompt():
    # differences 1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt(3)
    gain, error = scores(2, 3, 4, None).gain_over(scores(1, 1, 1, 7))
    assert (gain, error) == (2, pytest.approx(3**-0.5))
    assert scores(1, None).gain_over(scores(0, 0)) == (0, 0)  # one prompt says nothing


def test_a_judge_that_compares_gives_the_share_won_against_the_start(recipe, monkeypatch):
    """Alone, an answer has no score from such a judge: it is shown beside the start's."""
    Path("my_judge.py").write_text(
        "def ascii(prompt, answers):\n"
        "    rows = [sum(letter.isascii() for letter in a.text) / max(1, len(a.text)) for a in answers]\n"
        "    return [sum((r > o) + 0.5 * (r == o) for o in rows) - 0.5 for r in rows] if len(rows) > 1 else [None]\n"
    )
    import sys

    monkeypatch.delitem(sys.modules, "my_judge", raising=False)
    result = rounds.improve(recipe(improve={"rounds": 1}))
    assert set(result.measured[0].scores) == {0.5}
    assert set(result.measured[1].scores) <= {0.0, 0.5, 1.0}


# --- stop and go on -------------------------------------------------------------------------------


def stop_at(condition):
    """A stop signal and a listener that requests it at the first event that meets the condition."""
    stop = StopSignal()

    def listen(event):
        if not stop.requested and condition(event):
            stop.requested = True

    return stop, listen


MOMENTS = {
    "held-out answers": lambda event: isinstance(event, Progress) and event.stage.startswith("held-out answers"),
    "judging held-out": lambda event: isinstance(event, Progress) and event.stage.startswith("judging held-out"),
    "start measured": lambda event: isinstance(event, RoundsMeasured),
    "sampling": lambda event: isinstance(event, Progress) and event.stage == "sampling answers" and event.done > 0,
    "judging": lambda event: isinstance(event, Progress) and event.stage == "judging prompts" and event.done > 2,
    "before training": lambda event: isinstance(event, Note) and "training" in event.text,
    "training": lambda event: isinstance(event, StepLogged) and event.step == 3,
    "trained": lambda event: isinstance(event, Saved),
}


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.mark.parametrize(
    "moment", [pytest.param(one, marks=() if one == "training" else pytest.mark.slow) for one in MOMENTS]
)
def test_stopped_at_any_step_the_same_call_goes_on_to_the_same_result(recipe, uninterrupted, moment):
    settings = recipe(improve={"rounds": 1}, output="out/x")
    if not uninterrupted:
        rounds.improve(recipe(improve={"rounds": 1}, output="out/x"))
        uninterrupted["whole"] = contents("out")
        shutil.rmtree("out")
    stop, listen = stop_at(MOMENTS[moment])
    with pytest.raises(Stopped):
        rounds.improve(settings, on_event=listen, stop=stop)
    assert stop.requested
    result = rounds.improve(settings)
    assert len(result.measured) == 2
    weights, measured, pairs = contents("out")
    assert measured == uninterrupted["whole"][1]
    assert pairs == uninterrupted["whole"][2]
    assert weights == uninterrupted["whole"][0]


def test_a_finished_run_loads_no_model_and_says_the_same(recipe, monkeypatch):
    first = rounds.improve(recipe(improve={"rounds": 1}))
    monkeypatch.setattr(rounds, "load_recipe_base", None)
    assert rounds.improve(recipe(improve={"rounds": 1})).measured == first.measured


def test_more_rounds_may_be_asked_for_later(recipe, forced):
    forced(0, 1, 2)
    rounds.improve(recipe(improve={"rounds": 1}))
    assert len(rounds.improve(recipe(improve={"rounds": 2})).measured) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"improve": {"rounds": 1, "seed": 5}}, "now: seed: 5"),
        ({"trainer": {"learning_rate": 1e-3}}, "learning_rate: 0.001"),
    ],
)
def test_rounds_of_other_settings_are_never_mixed(recipe, change, says):
    rounds.improve(recipe(improve={"rounds": 1}))
    with pytest.raises(ConfigError, match=re.escape(says)):
        rounds.improve(recipe(**{"improve": {"rounds": 1}, **change}))


def test_a_judge_that_was_taken_out_is_another_setting(recipe):
    rounds.improve(recipe(improve={"rounds": 1, "judge": ["my_judge:ascii", "rules:json"]}))
    with pytest.raises(ConfigError, match="without - rules:json"):
        rounds.improve(recipe(improve={"rounds": 1, "judge": ["my_judge:ascii"]}))


def test_an_adapter_of_another_run_is_never_taken_for_a_round(recipe):
    Path("adapters/improved-round2").mkdir(parents=True)
    with pytest.raises(OutputError, match="improved-round2 already exists"):
        rounds.improve(recipe())
    assert not Path("adapters/improved.improve/round0.heldout.json").exists()


def test_an_adapter_of_another_run_that_appears_later_is_never_taken_for_a_round(recipe):
    rounds.improve(recipe(improve={"rounds": 1}))
    shutil.move("adapters/improved-round1", "mine")
    rounds.improve(recipe(improve={"rounds": 1}, output="adapters/other"))
    shutil.move("adapters/other-round1", "adapters/improved-round1")
    with pytest.raises(OutputError, match="improved-round1 already exists and is not of this run"):
        rounds.improve(recipe(improve={"rounds": 1}))


def test_a_later_round_without_a_pair_is_the_end_and_no_error(recipe, forced, monkeypatch):
    forced(0, 1)
    real = rounds.make_pairs

    def none(*arguments, **named):
        if "round2" in str(arguments[3]):
            raise NoPairs("No prompt gave a pair (8 with answers scored alike).")
        return real(*arguments, **named)

    monkeypatch.setattr(rounds, "make_pairs", none)
    events = []
    result = rounds.improve(recipe(), on_event=events.append)
    assert (result.best, len(result.measured)) == (1, 2)
    assert any("Round 2 has nothing to learn from." in event.text for event in events if isinstance(event, Note))
    monkeypatch.setattr(rounds, "make_pairs", lambda *a, **n: (_ for _ in ()).throw(NoPairs("none")))
    with pytest.raises(DataError):
        rounds.improve(recipe(output="first"))


# --- what is refused ------------------------------------------------------------------------------


def test_held_out_prompts_that_are_trained_on_are_refused(recipe):
    with Path("held.txt").open("a") as file:
        file.write("Say 3.\n")
    with pytest.raises(DataError, match="1 of the 17 held-out prompts are trained on, too"):
        rounds.improve(recipe())


def test_a_leak_is_a_whole_conversation_whatever_its_case_and_space(recipe):
    other = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Say 3."}]
    same = [{"role": "user", "content": " say  3."}]
    held = [{"prompt": f"Tell {number}."} for number in range(8)]
    Path("held.jsonl").write_text("\n".join(map(json.dumps, [*held, {"prompt": other}, {"prompt": same}])))
    with pytest.raises(DataError, match=r"1 of the 10 held-out prompts are trained on, too \(the first is .* row 10"):
        rounds.improve(recipe(improve={"held_out": "held.jsonl"}))


@pytest.mark.parametrize("change", ["fewer", "accepted"])
def test_answers_to_other_held_out_prompts_are_not_compared(recipe, change):
    rows = [{"prompt": f"Tell {number}.", "accepted": "x"} for number in range(9)]
    Path("held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = recipe(improve={"rounds": 1, "held_out": "held.jsonl"})
    rounds.improve(settings)
    rows = rows[:8] if change == "fewer" else [{**row, "accepted": "y"} for row in rows]
    Path("held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        OutputError, match=r"round0\.heldout\.json holds answers to other held-out prompts: held\.jsonl"
    ):
        rounds.improve(settings)


def test_too_few_held_out_prompts_are_refused(recipe):
    Path("held.txt").write_text("One?\nTwo?\n")
    with pytest.raises(DataError, match="holds 2 prompts: too few"):
        rounds.improve(recipe())


def test_a_missing_file_of_prompts_is_all_that_is_said(tmp_path):
    """In a process of its own: a library that is imported first has advice about kernels that nobody needs here."""
    recipe = {"model": {"name": "m"}, "improve": {"prompts": "no.txt", "held_out": "no.txt", "judge": "rules:json"}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "lora_dpo", "improve", "r.yaml"]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == "error: no.txt does not exist. Give a file of prompts.\n"


@pytest.mark.linux
def test_an_output_that_cannot_be_is_refused_before_a_model_is_loaded(recipe):
    with pytest.raises(OutputError, match=r"Cannot write .*Nothing can be made there: choose another folder"):
        rounds.improve(recipe(output="/proc/x/y", model={"name": "no-such-model"}))


def test_the_implicit_judge_cannot_measure_rounds(recipe):
    with pytest.raises(ConfigError, match="changes with every round"):
        rounds.improve(recipe(improve={"judge": "implicit"}))


def test_rounds_do_not_go_on_with_whole_modules_in_16_bits(recipe, settings):
    lora = {"rank": 4, "modules_to_save": ["lm_head"]}
    with pytest.raises(ConfigError, match=r"not done in 16 bits\. Set model\.dtype: float32, or improve\.rounds: 1"):
        rounds.improve(recipe(lora=lora, model={**settings()["model"], "dtype": "auto"}))
    rounds.read_rounds(recipe(lora=lora, model={**settings()["model"], "dtype": "float32"}))
    one = {"improve": {**settings()["improve"], "rounds": 1}}
    rounds.read_rounds(recipe(lora=lora, model={**settings()["model"], "dtype": "auto"}, **one))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainer": {"learing_rate": 1e-3}}, "Did you mean learning_rate?"),
        ({"improve": {"questions": "none.jsonl", "judge": "rules:fun"}}, "There is no rule 'fun'"),
        ({"reference": "adapter:some"}, "lora (rank) comes from the reference adapter"),
    ],
)
def test_what_training_would_refuse_is_refused_before_anything_is_sampled(recipe, change, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        rounds.improve(recipe(**change))
    assert not Path("adapters").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"improve": {"round": 2}}, "Did you mean improve.rounds?"),
        ({"improve": {"rounds": 0}}, "improve.rounds is 0"),
        ({"data": {"train": "x"}}, "data is not a setting"),
        ({"reference": "adapters/x"}, "allowed: base, or adapter:PATH"),
        ({"improve": {"judge_prices": [1.0]}}, "improve.judge_prices is [1.0]"),
        ({"improve": {"judge_prices": [1.0, -1.0]}}, "improve.judge_prices.1 is -1.0"),
        ({"improve": {"judge_prices": [1.0, float("nan")]}}, "improve.judge_prices.1 is nan"),
    ],
)
def test_a_wrong_setting_is_named(recipe, change, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        recipe(**change)


def test_a_recipe_is_read_back_as_it_was_written(recipe, tmp_path):
    (tmp_path / "r.yaml").write_text(dump_improve_recipe(recipe()))
    assert read_improve_recipe(tmp_path / "r.yaml") == recipe()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "improve").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_that_comes_with_the_project_is_valid_and_says_its_command(path, monkeypatch):
    from lora_dpo.config.trl_dpo import trainer_settings
    from lora_dpo.judging.specs import check_specs

    monkeypatch.chdir(ROOT)
    recipe = read_improve_recipe(path)
    check_specs(recipe.improve.judges)
    trainer_settings(recipe.training(reference="base", pairs=Path("p.jsonl"), output=Path("x")))
    assert f"lora-dpo improve configs/improve/{path.name}" in path.read_text()
    for source in (recipe.improve.prompts, recipe.improve.held_out, recipe.improve.questions):
        assert source is None or Path(source).is_file()


def test_the_page_has_every_setting():
    page = (ROOT / "docs" / "improve.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `improve\.(\w+)` \| (.*?) \|", page, re.MULTILINE))
    for name, info in ImproveSection.model_fields.items():
        default = "required" if info.is_required() else yaml.safe_dump(info.default).split("\n")[0]
        assert rows.pop(name) == default
    assert rows == {}


# --- the command ----------------------------------------------------------------------------------


def test_the_command_runs_rounds_and_names_the_best(settings, capsys):
    Path("ascii.yaml").write_text(yaml.safe_dump(settings()))
    assert main(["improve", "ascii.yaml", "improve.rounds=1"]) == 0
    said = capsys.readouterr().out
    assert "held-out prompts, by round" in said
    assert "best round 1: adapters/ascii-round1" in said
    assert main(["chat", "adapters/ascii-round1", "--prompt", "Hi", "--max-new-tokens", "3"]) == 0


def test_strict_refuses_a_start_from_an_adapter_of_another_base(recipe, settings, forced, capsys):
    forced(0, 1)
    rounds.improve(recipe(improve={"rounds": 1}, output="first"))
    passport = read_passport(Path("first-round1"))
    write_passport(Path("first-round1"), replace(passport, chat_template_sha256="0" * 64))
    given = {key: value for key, value in settings().items() if key != "lora"}
    Path("more.yaml").write_text(yaml.safe_dump({**given, "reference": "adapter:first-round1", "output": "more"}))
    assert main(["improve", "more.yaml", "improve.rounds=1", "--strict"]) == 1
    assert "chat template is another one" in capsys.readouterr().err
    assert not Path("more-round1").exists()
    assert main(["improve", "more.yaml", "improve.rounds=1"]) == 0


def test_a_training_recipe_is_not_taken_for_one_with_rounds(settings, capsys):
    plain = {key: value for key, value in settings().items() if key != "improve"}
    Path("plain.yaml").write_text(yaml.safe_dump(plain))
    assert main(["improve", "plain.yaml"]) == 1
    assert "improve is missing" in capsys.readouterr().err
