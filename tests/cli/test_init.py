"""`lora-dpo init` and data in place of a recipe, as a new person would type them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from lora_dpo.cli.commands import main
from lora_dpo.config.reading import read_recipe
from lora_dpo.data import read_pairs
from lora_dpo.data.questions import read_questions
from lora_dpo.data.write import split_by_prompt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command; returns its exit status and what it says, on lines as long as they are. Nothing is fetched."""
    monkeypatch.setattr("lora_dpo.cli.commands.have_model", lambda name: None)

    def type_it(*words):
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, re.sub(r"[ \n]+", " ", said.out), said.err

    return type_it


@pytest.fixture
def spreadsheet():
    def write(name="pairs.csv", count=60, first=0):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "chosen", "rejected"])
            for number in range(first, first + count):
                writer.writerow([f"What comes after {number}?", f"{number + 1}.", f"After {number}, many things, so."])
        return name

    return write


def files(folder="."):
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


# --- a recipe for pairs ---------------------------------------------------------------------------


def test_sixty_pairs_become_a_recipe_beside_them_that_reads_and_explains_itself(run, spreadsheet):
    status, said, _ = run("init", spreadsheet())
    assert status == 0
    assert files() == ["pairs.csv", "pairs.yaml"]
    text = Path("pairs.yaml").read_text()
    assert yaml.safe_load(text) == {
        "model": {"name": "smollm2-135m"},
        "data": {"train": "pairs.csv", "hold_out": 12},
        "trainer": {
            "max_steps": 36,
            "warmup_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-4,
            "beta": 0.1,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 2.0],
            "max_length": 512,
        },
        "lora": {"rank": 4, "alpha": 32},
        "evaluation": {"answers": 12, "max_new_tokens": 96},
    }
    lines = text.splitlines()
    settings = [number for number, line in enumerate(lines) if re.match(r"  \w+:", line)]
    assert all(lines[number - 1].startswith("  # ") for number in settings), "each setting has a line above it"
    assert max(map(len, lines)) <= 120
    assert "lora-dpo train pairs.yaml " in text
    assert "60 pairs read, 0 dropped" in said
    assert "held out 12 of 60 different prompts, 12 pairs: never trained on" in said
    assert "36 steps of 4 pairs (3.0 passes over 48 pairs), preset balanced" in said
    assert said.endswith("lora-dpo train pairs.yaml ")


def test_no_prompt_is_on_both_sides_of_what_the_recipe_holds_out(run, spreadsheet):
    path = Path(spreadsheet(count=30))
    path.write_text(path.read_text() + path.read_text().split("\n", 1)[1])  # each prompt twice
    assert "7 of 30 different prompts, 14 pairs" in run("init", path)[1]
    pairs, _ = read_pairs(str(path))
    train, held_out = split_by_prompt(pairs, read_recipe("pairs.yaml").data.hold_out)
    assert (len(train), len(held_out)) == (46, 14)
    assert not {pair.prompt[0]["content"] for pair in train} & {pair.prompt[0]["content"] for pair in held_out}


def test_of_five_pairs_nothing_is_held_out_and_what_cannot_be_measured_is_said(run, spreadsheet):
    status, said, _ = run("init", spreadsheet(count=5))
    assert status == 0
    assert yaml.safe_load(Path("pairs.yaml").read_text())["data"] == {"train": "pairs.csv"}
    assert "evaluation" not in yaml.safe_load(Path("pairs.yaml").read_text())
    assert "held out nothing" in said
    assert (
        "warning: Of 5 different prompts none is held out (12 are the fewest), so the run cannot measure whether the "
        "adapter is better than its base" in said
    )
    assert "so nothing is" in Path("pairs.yaml").read_text()


def test_of_few_prompts_few_are_held_out_and_how_coarse_that_is_is_said(run, spreadsheet):
    said = run("init", spreadsheet(count=16))[1]
    assert "warning: 4 held-out prompts measure coarsely: each is 25 points of accuracy." in said
    assert "warning" not in run("init", spreadsheet("more.csv", 48))[1]


def test_a_second_init_overwrites_nothing_and_says_how_to_go_on(run, spreadsheet):
    run("init", spreadsheet())
    Path("pairs.yaml").write_text("mine")
    status, _, said = run("init", "pairs.csv")
    assert (status, Path("pairs.yaml").read_text()) == (1, "mine")
    assert said == (
        "error: pairs.yaml is there already and is never overwritten: lora-dpo train pairs.yaml runs it. For another "
        "recipe: lora-dpo init DATA --output NAME.yaml.\n"
    )
    assert run("init", "pairs.csv", "--output", "other.yaml")[0] == 0
    assert read_recipe("other.yaml").data.train == "pairs.csv"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('prompt,chosen,rejected\n"a,b,c\n', "error: pairs.csv: broken CSV (unexpected end of data).\n"),
        ("prompt,chosen\na,b\n", "error: pairs.csv: no column says that it is rejected. "),
        ("", "error: pairs.csv is empty. "),
        (None, "error: pairs.csv does not exist. "),
    ],
    ids=["broken", "no pair", "empty", "missing"],
)
def test_a_file_that_cannot_be_read_is_told_as_by_its_reader_and_nothing_is_written(run, content, said):
    if content is not None:
        Path("pairs.csv").write_text(content)
    before = files()
    status, _, error = run("init", "pairs.csv")
    assert status == 1
    assert error.startswith(said)
    assert files() == before


@pytest.mark.parametrize(
    ("source", "recipe"),
    [
        ("my pairs.csv", "my pairs.yaml"),
        ("deep/er/pairs.v2.jsonl", "deep/er/pairs.v2.yaml"),
        ("folder", "folder.yaml"),
        ("folder/", "folder.yaml"),
    ],
)
def test_the_recipe_lies_beside_the_data_by_its_name_and_the_path_works_from_here(
    run, write_pairs, source, recipe, tmp_path
):
    place = Path(source)
    (place if place.suffix == "" else place.parent).mkdir(parents=True, exist_ok=True)
    written = write_pairs("all.jsonl", 12)
    if place.suffix == ".csv":
        written.unlink()
        place.write_text("prompt,chosen,rejected\n" + "".join(f"q{n},a,b\n" for n in range(12)))
    else:
        written.rename(place if place.suffix else place / "all.jsonl")
    assert run("init", source)[0] == 0
    assert Path(recipe).is_file()
    train = read_recipe(recipe).data.train
    assert train == source
    assert len(read_pairs(train)[0]) == 12


def test_a_packed_file_gives_a_recipe_without_its_suffixes(run, write_pairs):
    import gzip

    Path("pairs.jsonl.gz").write_bytes(gzip.compress(write_pairs("x.jsonl").read_bytes()))
    assert run("init", "pairs.jsonl.gz")[0] == 0
    assert Path("pairs.yaml").is_file()


def test_a_file_name_cannot_write_settings_into_the_recipe(run, spreadsheet):
    name = "a\ntrust: yes\n# b.csv"
    assert run("init", spreadsheet(name))[0] == 0
    [recipe] = [path for path in Path().iterdir() if path.suffix == ".yaml"]
    assert read_recipe(recipe).data.train == name


@pytest.mark.parametrize(("preset", "steps"), [("quick", 12), ("balanced", 36), ("thorough", 96)])
def test_a_preset_says_how_long_and_how_hard(run, spreadsheet, preset, steps):
    assert run("init", spreadsheet(), "--preset", preset)[0] == 0
    assert read_recipe("pairs.yaml").trainer["max_steps"] == steps


def test_an_unknown_preset_is_named_with_the_nearest(run, spreadsheet):
    said = run("init", spreadsheet(), "--preset", "thorou")[2]
    assert said == "error: 'thorou' is no preset: there is quick, balanced, thorough. Did you mean thorough?\n"


def test_with_a_model_its_tokenizer_and_its_size_decide_and_it_is_planned(run, spreadsheet, tiny_model_folder):
    status, said, _ = run("init", spreadsheet(), "--model", tiny_model_folder)
    assert status == 0
    recipe = read_recipe("pairs.yaml")
    assert recipe.model.name == str(tiny_model_folder)
    assert "tokens (by the tokenizer of " in said
    assert "It fits: " in said
    assert recipe.trainer["max_length"] == 512  # what the tiny model can read
    assert "by the tokenizer of" in " ".join(Path("pairs.yaml").read_text().split())


def test_what_does_not_fit_is_made_to_fit_in_the_recipe_and_said(run, spreadsheet, tiny_model_folder, monkeypatch):
    from dataclasses import replace

    from lora_dpo.training.drafting import from_pairs
    from lora_dpo.training.planning.memory_plan import Fix

    real = from_pairs.plan

    def too_large(recipe):
        planned = real(recipe)
        fix = Fix(("engine.split_pairs=true", "trainer.max_length=256"), 1 << 30, pairs_lost=0, pairs_cut=2)
        return replace(planned, memory=replace(planned.memory, fits=False), fix=fix)

    monkeypatch.setattr(from_pairs, "plan", too_large)
    status, said, _ = run("init", spreadsheet(), "--model", tiny_model_folder)
    assert status == 0
    recipe = read_recipe("pairs.yaml")
    assert (recipe.engine.split_pairs, recipe.trainer["max_length"]) == (True, 256)
    text = Path("pairs.yaml").read_text()
    assert "  # So that it fits into memory here.\n  split_pairs: true\n" in text
    assert "  # So that it fits into memory here. Memory goes with the longest pair" in text
    assert "It does not fit into" in said
    assert "with: engine.split_pairs=true trainer.max_length=256 (written into the recipe)" in said


def test_pairs_that_are_longer_than_the_base_can_read_are_said_to_be_cut(run, tiny_model_folder):
    rows = "".join(f"What is {number}?,{'so ' * 300}{number},no\n" for number in range(12))
    Path("pairs.csv").write_text("prompt,chosen,rejected\n" + rows)
    said = run("init", "pairs.csv", "--model", tiny_model_folder)[1]
    assert read_recipe("pairs.yaml").trainer["max_length"] == 512  # its max_position_embeddings
    assert (
        "warning: Pairs of more than 512 tokens are cut at the end of their answers: lora-dpo plan pairs.yaml" in said
    )


def test_a_model_that_is_not_there_is_told_and_nothing_is_written(run, spreadsheet):
    status, _, said = run("init", spreadsheet(), "--model", "models/none")
    assert (status, files()) == (1, ["pairs.csv"])
    assert said.startswith("error: models/none is no model folder")


# --- the quickstart -------------------------------------------------------------------------------


def test_in_an_empty_folder_the_quickstart_is_written_and_can_be_read(run):
    status, said, _ = run("init")
    assert status == 0
    names = [f"data/quickstart{end}.jsonl" for end in ("-eval", "-questions", "")]
    assert files() == sorted(["configs/quickstart.yaml", *names])
    assert "lora-dpo train configs/quickstart.yaml" in said
    for name in files():
        assert Path(name).read_bytes() == (ROOT / name).read_bytes()
    recipe = read_recipe("configs/quickstart.yaml")
    assert len(read_pairs(recipe.data.train)[0]) == 267
    assert len(read_pairs(recipe.data.eval)[0]) == 61
    assert len(read_questions(recipe.evaluation.questions)) == 48


def test_the_quickstart_is_completed_where_a_part_is_missing_and_overwrites_nothing(run):
    run("init")
    Path("data/quickstart-eval.jsonl").unlink()
    assert run("init")[1].startswith("wrote data/quickstart-eval.jsonl Train")
    assert "are here already" in run("init")[1]
    Path("configs/quickstart.yaml").write_text("mine")
    Path("data/quickstart.jsonl").unlink()
    status, _, said = run("init")
    assert status == 1
    assert said.startswith("error: configs/quickstart.yaml already exists and is never overwritten.")
    assert not Path("data/quickstart.jsonl").exists()


@pytest.mark.parametrize("option", [("--model", "x"), ("--preset", "quick"), ("--output", "x.yaml")])
def test_an_option_that_goes_with_data_is_refused_without(run, option):
    status, _, said = run("init", *option)
    assert (status, files()) == (1, [])
    assert said == f"error: {option[0]} goes with a file of pairs: lora-dpo init DATA {' '.join(option)}.\n"


# --- from another tool's settings -----------------------------------------------------------------

THEIRS = """
stage: dpo
model_name_or_path: owner/chat
dataset: pairs
template: chatty
pref_beta: 0.2
learning_rate: 5.0e-6
warmup_ratio: 0.1
plot_loss: true
"""


def test_settings_of_another_tool_become_a_recipe_that_says_what_has_no_counterpart(run):
    Path("theirs.yaml").write_text(THEIRS)
    status, said, error = run("init", "--from", "theirs.yaml")
    assert (status, error) == (0, "")
    text = Path("theirs-lora-dpo.yaml").read_text()
    recipe = read_recipe("theirs-lora-dpo.yaml")
    assert (recipe.model.name, recipe.model.quantize) == ("owner/chat", "none")
    assert recipe.trainer["beta"] == 0.2
    assert "  beta: 0.2 # pref_beta\n" in text
    assert "  learning_rate: 5.0e-06\n" in text  # it has its own name there, too
    assert "  warmup_steps: 0.1 # warmup_ratio\n" in text
    head, _, rest = text.partition("\nmodel:\n")
    assert "It does not train the same" in head
    assert "#   template: chatty: the chat template is the base's own" in head
    assert "plot_loss" not in head
    assert "#   plot_loss: true: every run writes its curves and a report" in rest
    assert "theirs.yaml: settings of LLaMA-Factory Means something else here warmup_ratio: trainer.warmup_steps" in said
    assert "Left out, and nothing is lost plot_loss: true: every run" in said
    assert "NO COUNTERPART: it does not train the same template: chatty: the chat" in said
    assert said.endswith("lora-dpo train theirs-lora-dpo.yaml ")
    status, _, error = run("init", "--from", "theirs.yaml")
    assert status == 1
    assert error.startswith("error: theirs-lora-dpo.yaml already exists and is never overwritten.")
    assert run("init", "--from", "theirs.yaml", "--output", "other.yaml")[0] == 0


def test_settings_of_nobody_leave_nothing(run, spreadsheet):
    Path("theirs.yaml").write_text("a: 1\n")
    status, _, said = run("init", "--from", "theirs.yaml")
    assert (status, files()) == (1, ["theirs.yaml"])
    assert said.startswith("error: theirs.yaml is not known as settings of")
    said = run("init", spreadsheet(), "--from", "theirs.yaml")[2]
    assert said == (
        "error: pairs.csv and --from theirs.yaml are two beginnings. Give one; data.train names the pairs.\n"
    )


# --- data in place of a recipe --------------------------------------------------------------------

SMALL = ("trainer.max_steps=1", "evaluation.answers=1", "evaluation.show=1", "evaluation.max_new_tokens=4")


def test_from_a_spreadsheet_to_an_adapter_in_two_commands(run, spreadsheet, tiny_model_folder):
    assert run("init", spreadsheet(), "--model", tiny_model_folder)[0] == 0
    status, said, err = run("train", "pairs.yaml", *SMALL, "model.dtype=float32")
    assert status == 0, (said, err)
    passport = json.loads(Path("adapters/pairs/passport.json").read_text())
    assert (passport["data"]["train"]["pairs"], passport["data"]["eval"]["pairs"]) == (48, 12)
    assert passport["metrics"]["after"]["pairs"]["pairs"] == 12
    assert len(read_pairs("adapters/pairs/held-out.jsonl")[0]) == 12


def test_pairs_in_place_of_a_recipe_are_trained_on_and_the_next_time_by_the_recipe(run, spreadsheet, tiny_model_folder):
    named = f"model.name={tiny_model_folder}"
    status, said, err = run("train", spreadsheet(), named, *SMALL)
    assert status == 0, (said, err)
    assert "recipe pairs.yaml The next time: lora-dpo train pairs.yaml" in said
    assert "36 steps" not in said  # one was asked for
    recipe = read_recipe("pairs.yaml")  # it says everything that was typed
    assert recipe.model.name == str(tiny_model_folder)
    assert (recipe.trainer["max_steps"], recipe.evaluation.max_new_tokens) == (1, 4)
    assert recipe.trainer["warmup_steps"] == 0  # three of 36 steps would be more than all of one
    assert "Given on the command line." in Path("pairs.yaml").read_text()
    before = Path("pairs.yaml").read_bytes()
    spreadsheet(count=64)
    status, said, err = run("train", "pairs.csv")
    assert status == 0, (said, err)
    assert "The recipe for pairs.csv is pairs.yaml, and is used as it is." in said
    assert "changed pairs.csv since adapters/pairs was trained (" in said
    assert Path("pairs.yaml").read_bytes() == before
    assert Path("adapters/pairs-2/adapter_config.json").is_file()


def test_a_mistyped_setting_is_told_before_anything_is_written(run, spreadsheet):
    status, _, said = run("train", spreadsheet(), "trainer.betta=1")
    assert (status, files()) == (1, ["pairs.csv"])
    assert said.startswith("error: trainer.betta is not a field of TRL's DPOConfig. Did you mean beta?")
    assert run("train", "pairs.csv", "lora.rnak=1")[2].endswith("lora.rnak is not a setting. Did you mean lora.rank?\n")
    assert run("train", "pairs.csv", "data.train=other.csv")[2] == (
        "error: pairs.csv is what data.train names. Leave data.train= out, or give a recipe.\n"
    )
    assert files() == ["pairs.csv"]


def test_held_out_pairs_of_ones_own_are_taken_in_place_of_those_that_would_be_held_out(run, spreadsheet, monkeypatch):
    monkeypatch.setattr("lora_dpo.training.run.train", lambda *args, **more: None)
    spreadsheet("held.csv", 4, first=100)
    assert run("train", spreadsheet(), "data.eval=held.csv")[0] == 0
    assert read_recipe("pairs.yaml").data.model_dump(exclude_defaults=True) == {
        "train": "pairs.csv",
        "eval": "held.csv",
    }
    assert run("train", spreadsheet("other.csv"), "data.hold_out=0.5")[0] == 0
    assert read_recipe("other.yaml").data.hold_out == 0.5
    assert "60 pairs" in Path("other.yaml").read_text()
    assert "30 pairs to learn from." in Path("other.yaml").read_text()


def test_columns_with_names_of_their_own_are_named_once_and_stay_in_the_recipe(run, monkeypatch):
    seen = []
    monkeypatch.setattr("lora_dpo.training.run.train", lambda recipe, **more: seen.append(recipe))
    Path("mine.csv").write_text("Q;X;Y\n" + "".join(f"Say {n}.;Yes {n}.;No.\n" for n in range(60)))
    status, _, said = run("init", "mine.csv")
    assert status == 1
    assert "no column says that it is prompt or chosen or rejected" in said
    assert run("init", "mine.csv", "--columns", "prompt=Q, chosen=X, rejected=Y")[0] == 0
    recipe = read_recipe("mine.yaml")
    assert recipe.data.columns == {"prompt": "Q", "chosen": "X", "rejected": "Y"}
    assert run("train", "mine.csv")[0] == 0
    assert seen == [recipe]
    assert "set data.columns in it" in run("train", "mine.yaml", "--columns", "prompt=Q")[2]
    said = run("init", "--columns", "prompt=Q")[2]
    assert "--columns goes with a file of pairs: lora-dpo init DATA --columns prompt=Q." in said


def test_what_is_read_of_a_spreadsheet_is_said(run):
    rows = "".join(f"Frage {n}?;Ja {n}.;Vielleicht, wer weiß {n}.\n" for n in range(60))
    Path("fragen.csv").write_bytes(("Frage;Gute Antwort;Schlechte Antwort\n" + rows).encode("cp1252"))
    status, said, err = run("init", "fragen.csv")
    assert status == 0, err
    assert "'Gute Antwort' as chosen" in said
    assert "Windows-1252" in said
    assert read_recipe("fragen.yaml").data.train == "fragen.csv"


def test_a_recipe_takes_no_model_and_no_preset_beside_it(run, spreadsheet):
    run("init", spreadsheet())
    said = run("train", "pairs.yaml", "--model", "my model")[2]
    assert said == (
        "error: --model goes with a file of pairs. The recipe pairs.yaml says it itself: set model.name='my model'.\n"
    )
    assert "--preset goes with a file of pairs." in run("train", "pairs.yaml", "--preset", "quick")[2]
    said = run("train", "pairs.csv", "--preset", "quick")[2]
    assert said.startswith("error: pairs.yaml is there already for pairs.csv: change it, or write another with")


def test_a_recipe_of_that_name_for_other_data_is_not_run(run, spreadsheet):
    run("init", spreadsheet("other.csv"), "--output", "pairs.yaml")
    status, _, said = run("train", spreadsheet())
    assert status == 1
    assert said.startswith("error: pairs.yaml is there already and is never overwritten")


def test_json_may_be_pairs_or_a_recipe(run, write_pairs, monkeypatch):
    seen = []
    monkeypatch.setattr("lora_dpo.training.run.train", lambda recipe, **more: seen.append(recipe))
    rows = [json.loads(line) for line in write_pairs("x.jsonl").read_text().splitlines()]
    Path("rows.json").write_text(json.dumps(rows))
    Path("recipe.json").write_text(json.dumps({"model": {"name": "owner/m"}, "data": {"train": "rows.json"}}))
    assert run("train", "recipe.json")[0] == 0
    assert run("train", "rows.json")[0] == 0
    assert [recipe.model.name for recipe in seen] == ["owner/m", "smollm2-135m"]
    assert Path("rows.yaml").is_file()


def test_an_adapter_s_folder_is_no_pairs(run):
    Path("adapters/mine").mkdir(parents=True)
    Path("adapters/mine/recipe.yaml").write_text("model: {name: m}\ndata: {train: a.csv}\n")
    said = run("train", "adapters/mine")[2]
    assert said == (
        "error: adapters/mine is the folder of a run, not of pairs. Its recipe is adapters/mine/recipe.yaml.\n"
    )
