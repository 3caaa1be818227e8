"""Searches and sweeps on a small model that was taught two ways to answer."""

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from taught import write_pairs

from lora_dpo.adapters.loading import load_policy
from lora_dpo.cli.commands import main
from lora_dpo.cli.tune import NOTHING
from lora_dpo.cli.views import RunView
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import ConfigError, DataError, OutputError
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.events import Answered, Note, Progress, Stopped, StopSignal, Tabulated
from lora_dpo.model.base import load_base
from lora_dpo.tuning import sweep, tune
from lora_dpo.tuning.grid import grid
from lora_dpo.tuning.space import parse_axis
from lora_dpo.tuning.table import candidate_rows, read_trials

STEPS = [parse_axis("trainer.max_steps=6..24"), parse_axis("trainer.learning_rate=2e-4..1e-3")]


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return load_base(str(tiny_model_folder), quantize="none", dtype="float32")


@pytest.fixture(scope="module")
def taught_base(taught):
    return load_base(str(taught), quantize="none", dtype="float32")


@pytest.fixture(autouse=True)
def its_own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(tiny_model_folder, tmp_path):
    """Settings of a run on pairs that prefer the short answer."""

    def make(*, base=None, shuffled=None, numbers=range(10, 16), **trainer):
        data = write_pairs(tmp_path / "pairs.jsonl", numbers, shuffled=shuffled)
        return {
            "model": {"name": base.name if base else str(tiny_model_folder), "quantize": "none", "dtype": "float32"},
            "lora": {"rank": 4},
            "data": {"train": str(data)},
            "evaluation": {"max_new_tokens": 32 if base else 8},
            "trainer": {
                "max_steps": 16,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3 if base else 4e-4,
                **trainer,
            },
        }

    return make


def the_same(result):
    """What does not depend on how fast it went."""
    return [(one.values, one.looks, one.ended, one.measured, one.curves) for one in result.trials]


def test_from_data_to_an_adapter_that_is_proven(settings, base, tmp_path):
    seen = []
    recipe = check_recipe(settings())
    result = tune(recipe, name="brief", axes=STEPS, trials=3, base=base, on_event=seen.append)
    assert result.verdict == "better"
    assert result.adapter == Path("adapters/brief")
    assert result.folder == Path("adapters/brief.search")
    assert [trial.number for trial in result.trials] == [0, 1, 2]
    assert result.trials[0].values == {"trainer.max_steps": 16, "trainer.learning_rate": 4e-4}
    assert 0 < result.trials[0].scoring < result.trials[0].seconds - result.trials[0].measuring
    assert set(result.reported) == {"base", "default", "chosen"}
    fresh = result.reported["chosen"].measured
    assert fresh.accuracy.low > 0.5
    assert len(fresh.right) == 12 == result.gain.n
    # no prompt is in two parts
    prompts = [
        {json.loads(line)["prompt"][-1]["content"] for line in (result.folder / "parts" / f"{name}.jsonl").open()}
        for name in ("train", "choose", "report")
    ]
    assert [len(part) for part in prompts] == [36, 12, 12]
    assert len(set.union(*prompts)) == 60
    # the adapter is one that loads, and the base is as it was
    assert load_policy(adapter=result.adapter).adapter == result.adapter
    checked = verify(result.adapter)  # by pairs that it was not trained on
    assert checked.ok, checked.reason
    assert checked.pairs == 8
    assert checked.adapter_drift < 1e-5 < checked.effect
    assert not any("lora_" in name for name, _ in base.model.named_parameters())
    # the page, the tables, and a recipe that can be run again on the data as it was named
    page = (result.folder / "search.html").read_text()
    assert "Every candidate" in page
    assert "<script" not in page
    again = yaml.safe_load((result.folder / "chosen.yaml").read_text())
    assert again["data"]["train"] == recipe.data.train
    assert again["trainer"]["max_steps"] == result.chosen.values["trainer.max_steps"]
    tables = [event for event in seen if isinstance(event, Tabulated)]
    assert [len(table.rows) for table in tables] == [2, 3, 4, len(tables[-1].rows)]
    said = [event.text for event in seen if isinstance(event, Note)]
    assert f"Chosen: candidate {result.chosen.number}, {result.chosen.text}." in said
    assert said[-1] == result.reason
    # adapters that will not be chosen are not kept
    kept = {path.name for path in (result.folder / "trials").iterdir() if path.is_dir()}
    assert {"000", f"{result.chosen.number:03d}"} <= kept


def test_a_search_is_over_in_the_minutes_that_it_has(settings, base):
    now, said = [0.0], []

    def heard(event):
        said.append(event)
        now[0] += 0.5 * (isinstance(event, Progress) and event.done > 0)

    def searched(name, minutes):
        recipe = check_recipe({**settings(), "output": f"adapters/{name}"})
        axes, began = [parse_axis("trainer.max_steps=6..24")], now[0]
        found = tune(recipe, axes=axes, minutes=minutes, base=base, on_event=heard, clock=lambda: now[0])
        assert found.seconds == now[0] - began
        return found

    short = searched("short", 2)
    assert 60 < short.seconds <= 120
    assert len(short.trials) >= 3
    texts = [event.text for event in said if isinstance(event, Note)]
    assert f"The time is used up after {len(short.trials)} candidates." in texts
    assert len(searched("longer", 4).trials) > len(short.trials)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))])
@pytest.mark.parametrize("how", ["drawn at random", "half of them swapped"])
def test_labels_without_a_rule_are_nothing_to_learn_from(settings, taught_base, tmp_path, how, seed):
    recipe = settings(base=taught_base, numbers=range(10, 18), shuffled=seed)
    if how == "drawn at random":
        path, draws = Path(recipe["data"]["train"]), random.Random(seed)
        rows = [json.loads(line) for line in path.open()]
        for row in rows:
            if draws.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = tune(check_recipe(recipe), trials=8, base=taught_base, seed=seed)
    assert result.verdict == "nothing to learn"
    assert "Nothing to learn here" in result.reason
    assert result.adapter is None
    assert not Path("adapters/tuned").exists()


def test_a_search_without_hope_ends_early_and_names_the_likely_reason(settings, base):
    recipe = settings(numbers=range(10, 13), shuffled=3, max_steps=1)
    path = Path(recipe["data"]["train"])
    path.write_text(path.read_text() * 2)  # the other way round, too
    with path.open("a") as file:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            file.write(json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) + "\n")
    seen = []
    result = tune(check_recipe(recipe), axes=[parse_axis("trainer.max_steps=1,2")], trials=9, base=base,
                  on_event=seen.append)  # fmt: skip
    assert len(result.trials) == 6
    assert any("the search ends here" in getattr(event, "text", "") for event in seen)
    assert result.verdict == "nothing to learn"
    assert "contradict" in result.reason


def test_that_the_longer_answer_is_better_is_nothing_to_learn(settings, base):
    recipe = settings(numbers=range(10, 13))
    path = Path(recipe["data"]["train"])
    rows = [json.loads(line) for line in path.open()]
    path.write_text(
        "".join(json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in rows)
    )
    result = tune(check_recipe(recipe), axes=STEPS, trials=1, base=base)
    assert result.verdict == "nothing to learn"
    assert "but length: 'the longer answer is the better one'" in result.reason
    assert result.adapter is None
    again = next(word for word in result.reason.split() if word.endswith("chosen.yaml."))
    assert Path(again[:-1]).is_file(), "for one who wants them longer"


@pytest.mark.slow
def test_what_suspicious_pairs_cost_is_tried_and_said(settings, base, tmp_path):
    recipe = settings(max_steps=24)
    path = Path(recipe["data"]["train"])
    rows = [json.loads(line) for line in path.open()]
    for row in rows[::9]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = {row["prompt"] for row in rows[::9]}
    seen = []
    result = tune(check_recipe(recipe), axes=STEPS, trials=1, base=base, without_suspicious=True, on_event=seen.append)
    first, second = result.trials
    assert second.values == first.values
    file = result.folder / "parts" / "without-suspicious.jsonl"
    kept = {json.loads(line)["prompt"][-1]["content"] for line in file.open()}
    train = {json.loads(line)["prompt"][-1]["content"] for line in (result.folder / "parts" / "train.jsonl").open()}
    assert len(train) - len(kept) == second.left_out
    assert train - kept
    assert len((train - kept) & wrong) > len(train - kept) / 2, "most of those that are left out are wrong"
    assert any(f"Without the {second.left_out} training pairs" in getattr(event, "text", "") for event in seen)


def test_few_prompts_are_two_parts_and_fewer_the_recipe_alone(settings, base):
    seen = []
    result = tune(check_recipe(settings(numbers=range(10, 13))), axes=STEPS, trials=1, base=base, on_event=seen.append)
    assert any("flatter" in getattr(event, "text", "") for event in seen)
    assert "it was chosen by" in result.reason
    alone = tune(check_recipe(settings(numbers=range(10, 12), max_steps=2)), trials=1, base=base, on_event=seen.append)
    assert alone.verdict == "too little data"
    assert "24 are the fewest" in alone.reason
    assert alone.adapter.is_dir()
    assert alone.trials == ()


@pytest.mark.slow
def test_a_judge_decides_where_there_is_one(settings, taught_base):
    recipe = check_recipe(settings(base=taught_base, numbers=range(10, 30)))
    result = tune(recipe, axes=STEPS, trials=1, base=taught_base, judge=["rules:chars<=12"])
    chosen = result.reported["chosen"]
    assert chosen.measured.outcomes
    assert chosen.score.quality.value == sum(chosen.measured.outcomes) / len(chosen.measured.outcomes)
    assert result.verdict == "better"


@pytest.mark.slow
def test_labels_that_the_judge_does_not_share_are_no_gain(settings, taught_base):
    result = tune(
        check_recipe(settings(base=taught_base)), axes=STEPS, trials=1, base=taught_base, judge=["rules:chars>=16"]
    )
    assert result.verdict == "nothing to learn"
    assert "the judge does not prefer" in result.reason


@pytest.mark.slow
def test_ruinous_settings_are_ended_before_a_third_of_their_steps(settings, taught_base):
    axes = [parse_axis("trainer.learning_rate=0.02,0.03"), parse_axis("sft_weight=0,0.001")]
    recipe = check_recipe(settings(base=taught_base, max_steps=24, learning_rate=0.02, loss_type="sigmoid"))
    result = tune(recipe, axes=axes, trials=2, base=taught_base)
    assert result.verdict == "no healthy run"
    for trial in result.trials:
        assert trial.ended
        assert trial.steps <= trial.planned / 3, trial


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_same_choice(settings, taught_base):
    recipe = check_recipe({**settings(base=taught_base), "output": "adapters/whole"})
    whole = tune(recipe, axes=STEPS, trials=3, base=taught_base)
    recipe = check_recipe({**settings(base=taught_base), "output": "adapters/parts"})
    draws, stops = random.Random(0), 0
    for attempt in range(12):
        stop, left = StopSignal(), draws.randrange(4, 60) if attempt < 10 else 10**9

        def tell(event, stop=stop, left=left):
            tell.seen += isinstance(event, Progress)
            stop.requested = stop.requested or tell.seen > left

        tell.seen = 0
        begun = Path("adapters/parts.search/search.json").exists()
        try:
            parts = tune(recipe, axes=STEPS, trials=3, base=taught_base, resume=begun, on_event=tell, stop=stop)
        except Stopped:
            stops += 1
        else:
            break
    assert stops >= 3
    assert the_same(parts) == the_same(whole)
    assert parts.chosen.number == whole.chosen.number
    assert parts.reported["chosen"].measured == whole.reported["chosen"].measured
    assert parts.seconds > sum(trial.seconds for trial in parts.trials), "earlier sittings count, too"


def test_a_search_is_gone_on_with_as_it_was_begun(settings, base):
    recipe = check_recipe({**settings(), "output": "adapters/x"})
    tune(recipe, axes=STEPS, trials=1, base=base)
    shutil.rmtree("adapters/x")
    with pytest.raises(OutputError, match="Go on with --resume"):
        tune(recipe, axes=STEPS, trials=1, base=base)
    with pytest.raises(ConfigError, match="another seed"):
        tune(recipe, axes=STEPS, trials=1, base=base, resume=True, seed=1)
    with pytest.raises(ConfigError, match="another axes"):
        tune(recipe, axes=STEPS[:1], trials=1, base=base, resume=True)
    more = tune(recipe, axes=STEPS, trials=2, base=base, resume=True)
    assert len(more.trials) == 2
    with pytest.raises(OutputError, match="Start it without --resume"):
        tune(check_recipe(settings()), name="other", resume=True)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"method": "sft"}, {}, "method is sft"),
        ({}, {"trials": 0}, "--trials is 0"),
        ({}, {"minutes": 0}, "--minutes is 0"),
        ({}, {"judge": ["implicit"]}, "implicit judge"),
        ({}, {"judge": ["rules:lenght<=4"]}, "no rule"),
    ],
)
def test_what_cannot_be_searched(settings, changes, options, said):
    with pytest.raises(ConfigError, match=said):
        tune(check_recipe({**settings(), **changes}), **options)


def test_every_combination_the_last_fastest():
    axes = [parse_axis("trainer.beta=0.1,0.3"), parse_axis("lora.rank=2,4")]
    assert [tuple(values.values()) for values in grid(axes)] == [(0.1, 2), (0.1, 4), (0.3, 2), (0.3, 4)]
    assert list(grid([])) == [{}]


# --- the grid -------------------------------------------------------------------------------------


def test_a_grid_with_seeds(settings, base):
    seen = []
    axes = [parse_axis("lora.rank=2,4")]
    found = sweep(check_recipe(settings(max_steps=2)), axes, seeds=2, base=base, on_event=seen.append)
    assert [trial.values for trial in found.trials] == [{"lora.rank": 2}, {"lora.rank": 2}, {"lora.rank": 4},
                                                        {"lora.rank": 4}]  # fmt: skip
    assert [trial.seed for trial in found.trials] == [42, 43, 42, 43]
    assert len(found.scores) == 2
    assert all(score.n == 2 for score in found.scores.values())
    assert len({trial.measured.margin for trial in found.trials}) == 4
    last = [event for event in seen if isinstance(event, Tabulated)][-1]
    assert last.title == "4 of 4"
    assert [row[1] for row in last.rows[1:]] == ["2", "2"]
    assert "±" in last.rows[1][2]
    assert all((found.folder / "trials" / f"{number:03d}").is_dir() for number in range(4)), "every adapter is kept"
    assert "By combination" in (found.folder / "search.html").read_text()
    # the table needs no model, and has what the sweep itself came to
    rows = candidate_rows(read_trials(found.folder))
    assert [row["kind"] for row in rows] == ["candidate"] * 4 + ["mean"] * 2
    assert [row["accuracy"] for row in rows[:4]] == [trial.measured.accuracy.value for trial in found.trials]
    for row, mean in zip(rows[4:], found.scores.values(), strict=True):
        assert (row["runs"], row["score"], row["score"] + row["score_half"]) == (
            2,
            mean.value,
            pytest.approx(mean.high),
        )


def test_weights_that_are_no_numbers_end_one_run_and_not_the_sweep(settings, base):
    axes = [parse_axis("trainer.learning_rate=4e-4,1e38")]
    found = sweep(check_recipe(settings(max_steps=3, max_grad_norm=0.0)), axes, base=base)
    assert [bool(trial.measured) for trial in found.trials] == [True, False]
    assert found.trials[1].ended
    assert not any("lora_" in name for name, _ in base.model.named_parameters())


@pytest.mark.slow
def test_a_search_that_is_stopped_keeps_what_is_there(settings, base):
    stop, seen = StopSignal(), []

    def tell(event):
        seen.append(event)
        stop.keep = stop.keep or (
            isinstance(event, Progress) and event.stage == "trial 1: training" and event.done == 2
        )

    recipe = check_recipe({**settings(), "evaluation": {"max_new_tokens": 8}})
    result = tune(recipe, axes=STEPS, trials=5, base=base, on_event=tell, stop=stop)
    assert [bool(trial.measured) for trial in result.trials] == [True, False]
    assert result.trials[1].ended.startswith("stopped by hand at step")
    assert result.chosen.number == 0


@pytest.mark.slow
def test_held_out_data_that_is_named_is_what_a_sweep_measures_on(settings, base, tmp_path):
    held_out = write_pairs(tmp_path / "eval.jsonl", range(60, 62))
    recipe = settings(max_steps=1)
    recipe["data"]["eval"] = str(held_out)
    found = sweep(check_recipe(recipe), [parse_axis("trainer.beta=0.1,0.3")], base=base)
    assert all(len(trial.measured.right) == 20 for trial in found.trials)
    train = (found.folder / "parts" / "train.jsonl").read_text()
    assert train.count("\n") == 60, "all of it is trained on"


@pytest.mark.parametrize(
    ("axes", "seeds", "said"),
    [
        (["trainer.beta=0.1..0.3"], 1, "is a range"),
        ([], 1, "Nothing is varied"),
        (["trainer.beta=0.1,0.3"], 0, "--seeds is 0"),
        (["trainer.beta=0.1,0.3"], 501, "1,002 runs"),
        (["lora.rank=4,0"], 1, "rank"),
    ],
)
def test_what_is_no_grid(settings, axes, seeds, said):
    with pytest.raises(ConfigError, match=said):
        sweep(check_recipe(settings()), [parse_axis(text) for text in axes], seeds=seeds)


def test_a_sweep_needs_something_to_compare_by(settings):
    with pytest.raises(DataError, match="too few different prompts"):
        sweep(check_recipe(settings(numbers=range(10, 12))), [parse_axis("trainer.beta=0.1,0.3")])


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_what_came_of_it(settings, tmp_path, capsys):
    Path("brief.yaml").write_text(yaml.safe_dump(settings(max_steps=8)))
    assert main(["tune", "brief.yaml", "--trials", "1", "trainer.beta=0.05..0.5"]) == 0
    said = capsys.readouterr().out
    assert "36 to train on, 12 to choose by, 12 to report from" in said
    assert "page  adapters/brief.search/search.html" in said
    assert "saved adapters/brief" in said
    Path("random.yaml").write_text(yaml.safe_dump(settings(shuffled=3, max_steps=8)))
    assert main(["tune", "random.yaml", "--trials", "1", "trainer.beta=0.3", "sft_weight=0"]) == NOTHING
    assert "Nothing to learn here" in capsys.readouterr().out
    axes = json.loads(Path("adapters/random.search/search.json").read_text())["axes"]
    assert not {"trainer.beta", "sft_weight"} & {axis["key"] for axis in axes}, "these have one value"
    trainer = yaml.safe_load(Path("adapters/random.search/recipe.yaml").read_text())["trainer"]
    assert (trainer["beta"], trainer["loss_type"]) == (0.3, ["sigmoid"])
    assert main(["sweep", "random.yaml", "trainer.beta=0.1,0.2", "trainer.max_steps=2"]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_a_table_that_is_too_wide_for_the_terminal_is_told_row_by_row():
    rows = (
        ("candidate", "beta", "score", "KL", ""),
        ("0", "0.1", "0.91", "0.1", ""),
        ("1", "0.3", "-", "-", "length collapse"),
    )
    for width, told in ((80, " 0.91 │"), (30, "candidate 1, beta 0.3, length collapse\n")):
        console = Console(width=width, file=io.StringIO())
        RunView(console)(Tabulated("candidates", rows, grows=True))
        assert told in console.file.getvalue()
        assert ("0.91" in console.file.getvalue()) == (width == 80)


def test_what_is_told_once_is_told_whole_in_a_narrow_terminal():
    rows = (
        ("", "base", "default", "chosen"),
        ("reward accuracy", "0.500 (0.341 to 0.659)", "0.985 (0.874 to 0.998)", "0.956 (0.829 to 0.990)"),
        ("KL a token", "0.000", "0.089", "0.201"),
    )
    console = Console(width=60, file=io.StringIO())
    view = RunView(console)
    view(Tabulated("on the reporting part", rows))
    view(Answered((("How are you?", "Well, that depends.", "Fine."),), ("base", "chosen")))
    told = console.file.getvalue()
    assert all(number in told for number in ("0.500", "0.985", "0.956", "0.201"))
    assert [word for word in ("base", "chosen", "before") if word in told] == ["base", "chosen"]


def test_a_slip_on_the_command_line_is_said_before_anything_is_loaded(settings, capsys, loads):
    Path("brief.yaml").write_text(yaml.safe_dump(settings()))
    Path("sft.yaml").write_text(yaml.safe_dump({**settings(), "method": "sft"}))
    for arguments, said in (
        (["tune", "brief.yaml", "beta=0.1..0.5"], "no setting"),
        (["tune", "brief.yaml", "trainer.betta=0.1,0.2"], "betta"),
        (["sweep", "brief.yaml", "trainer.beta=0.1..0.2"], "is a range"),
        (["tune", "sft.yaml", "sft_weight=0"], "settings of dpo"),
        (["sweep", "sft.yaml", "sft_weight=0", "trainer.max_steps=1,2"], "settings of dpo"),
    ):
        assert main(arguments) == 1
        assert said in capsys.readouterr().err
    assert loads == []
    assert not Path("adapters").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.posix
def test_a_search_that_is_killed_at_random_moments_goes_on_to_the_same_choice(settings, base):
    recipe = {**settings(), "output": "adapters/whole"}
    whole = tune(check_recipe(recipe), axes=STEPS, trials=4, base=base)
    Path("killed.yaml").write_text(yaml.safe_dump({**settings(), "output": "adapters/killed"}))
    axes = [f"{axis.key}={axis.text}" for axis in STEPS]
    command = [sys.executable, "-m", "lora_dpo", "tune", "killed.yaml", "--trials", "4", *axes]
    draws, kills = random.Random(1), 0
    while not Path("adapters/killed").exists():
        begun = Path("adapters/killed.search/search.json").exists()
        process = subprocess.Popen([*command, *(["--resume"] if begun else [])], stdout=subprocess.DEVNULL)
        until = time.monotonic() + (draws.uniform(3, 14) if kills < 10 else 600)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 10
    result = json.loads(Path("adapters/killed.search/result.json").read_text())
    trials = json.loads(Path("adapters/killed.search/trials.json").read_text())
    assert [(one["values"], one["ended"], one["looks"]) for one in trials] == [
        (one.values, one.ended, list(one.looks)) for one in whole.trials
    ]
    assert result["chosen"] == whole.chosen.number
    assert result["reported"]["chosen"]["measured"] == whole.reported["chosen"].measured.to_json()
