from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_dpo.config.improve_recipe import read_improve_recipe
from lora_dpo.config.reading import check_recipe, describe_fields, dump_recipe, nearest, read_recipe, read_settings
from lora_dpo.config.recipe import LoraSection, Recipe
from lora_dpo.errors import ConfigError

MINIMAL = "model:\n  name: some-model\ndata:\n  train: pairs.jsonl\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_text(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return read_recipe(path, overrides)

    return read_text


def with_settings(**sections: Any) -> dict[str, Any]:
    return {"model": {"name": "some-model"}, "data": {"train": "pairs.jsonl"}, **sections}


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_recipe(with_settings(**sections))
    return str(caught.value)


def test_a_minimal_recipe_gets_every_default(read):
    recipe = read(MINIMAL)
    assert recipe.model.quantize == "auto"
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (16, 32, "all-linear")
    assert (recipe.reference, recipe.output, recipe.trainer) == ("base", None, {})


# --- unknown keys and wrong values ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "wrong", "right"),
    [
        ({"lora": {"rnak": 8}}, "lora.rnak", "Did you mean lora.rank?"),
        ({"model": {"name": "m", "quantise": "nf4"}}, "model.quantise", "Did you mean model.quantize?"),
        ({"data": {"train": "a", "on_bad_rows": "drop"}}, "data.on_bad_rows", "Did you mean data.on_bad_row?"),
        ({"evaluation": {"answer": 3}}, "evaluation.answer", "Did you mean evaluation.answers?"),
        ({"trainr": {}}, "trainr", "Did you mean trainer?"),
        ({"refrence": "base"}, "refrence", "Did you mean reference?"),
        ({"rank": 8}, "rank", "Did you mean lora.rank?"),
        ({"train": "a.jsonl"}, "train", "Did you mean data.train?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(sections, wrong, right):
    message = refusal(**sections)
    assert wrong in message
    assert right in message


def test_a_field_of_trl_at_top_level_is_sent_to_the_trainer_section():
    message = refusal(learning_rate=1e-5)
    assert "learning_rate" in message
    assert "trainer" in message


def test_nearest_stays_silent_when_nothing_is_near():
    assert nearest("learning_rate", ["rank", "alpha"]) == ""
    assert nearest("alhpa", ["rank", "alpha"]) == " Did you mean alpha?"


@pytest.mark.parametrize(
    ("sections", "key", "value", "allowed"),
    [
        ({"lora": {"rank": "8"}}, "lora.rank", "'8'", "integer"),
        ({"lora": {"rank": 8.0}}, "lora.rank", "8.0", "integer"),
        ({"lora": {"rank": True}}, "lora.rank", "True", "integer"),
        ({"lora": {"rank": 0}}, "lora.rank", "0", "greater than or equal to 1"),
        ({"lora": {"alpha": 0}}, "lora.alpha", "0", "greater than 0"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout", "1.0", "less than 1"),
        ({"lora": {"dora": "yes"}}, "lora.dora", "'yes'", "boolean"),
        ({"model": {"name": "m", "quantize": "int8"}}, "model.quantize", "'int8'", "'auto', 'nf4' or 'none'"),
        ({"model": {"name": "m", "packed": "maybe"}}, "model.packed", "'maybe'", "'auto'"),
        ({"model": {"name": "m", "dtype": "half"}}, "model.dtype", "'half'", "'float16'"),
        ({"model": {"name": 7}}, "model.name", "7", "string"),
        ({"data": {"train": 7}}, "data.train", "7", "string"),
        ({"data": {"train": ["a", 7]}}, "data.train.1", "7", "string"),
        ({"data": {"train": "a", "on_bad_row": "skip"}}, "data.on_bad_row", "'skip'", "'drop' or 'error'"),
        ({"evaluation": {"answers": -1}}, "evaluation.answers", "-1", "greater than or equal to 0"),
        ({"trainer": [1]}, "trainer", "[1]", "dictionary"),
        ({"output": False}, "output", "False", "string"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(sections, key, value, allowed):
    message = refusal(**sections)
    assert f"{key} is {value}" in message
    assert allowed in message


@pytest.mark.parametrize("missing", ["model.name", "data.train"])
def test_a_missing_required_setting_is_named(missing):
    section = missing.partition(".")[0]
    assert f"{missing} is missing" in refusal(**{section: {}})


def test_a_recipe_cannot_be_changed_after_reading():
    recipe = check_recipe(with_settings())
    with pytest.raises(ValidationError):
        recipe.lora.rank = 4


# --- numbers, keys and lines of YAML --------------------------------------------------------------

NUMBERS = [
    ("5e-7", 5e-7),
    ("1e-3", 1e-3),
    (".5e-3", 5e-4),
    (".5e3", 500.0),
    ("-1E+5", -1e5),
    ("2e3", 2000.0),
    ("1.5e-3", 1.5e-3),
    ("1.e-3", 1e-3),
    ("0.1", 0.1),
]


@pytest.mark.parametrize(("written", "number"), NUMBERS)
def test_scientific_notation_is_a_number_in_the_recipe(read, written, number):
    value = read(f"{MINIMAL}trainer:\n  learning_rate: {written}\n").trainer["learning_rate"]
    assert isinstance(value, float)
    assert value == number


@pytest.mark.parametrize(("written", "number"), NUMBERS)
def test_scientific_notation_is_a_number_in_an_override(read, written, number):
    value = read(MINIMAL, f"trainer.learning_rate={written}").trainer["learning_rate"]
    assert isinstance(value, float)
    assert value == number


@pytest.mark.parametrize("text", ["e-3", "1e", "1e3x", "'5e-7'", "v1e3", "1e3-large"])
def test_text_that_only_resembles_a_number_stays_text(read, text):
    assert read(f"{MINIMAL}output: {text}\n").output == text.strip("'")


def test_a_repeated_key_is_refused_with_its_line(read):
    with pytest.raises(ConfigError, match=r"'rank' appears twice \(line 7\)"):
        read(MINIMAL + "lora:\n  rank: 8\n  rank: 16\n")


def test_broken_yaml_names_file_and_line(read):
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 5: not valid YAML"):
        read(MINIMAL + "lora: {rank: 8: 9}\n")


@pytest.mark.parametrize("text", ["", "just words\n", "- a\n- b\n"])
def test_a_file_without_settings_is_no_recipe(read, text):
    with pytest.raises(ConfigError, match="is not a recipe"):
        read(text)


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "{a: 1}: 2\n", "output: 2020-99-99\n"])
def test_any_unreadable_yaml_is_a_config_error(read, text):
    with pytest.raises(ConfigError):
        read(MINIMAL + text)


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model:\n  name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 18\)\. Save it as UTF-8"):
        read_recipe(path)


def test_a_folder_is_refused_as_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)


def test_a_missing_recipe_suggests_the_nearest_one(tmp_path):
    for name in ("quickstart.yaml", "large.yaml"):
        (tmp_path / name).write_text(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "quickstrat.yaml")
    assert "quickstrat.yaml" in str(caught.value)
    assert f"Did you mean {tmp_path / 'quickstart.yaml'}?" in str(caught.value)


def test_a_missing_recipe_in_a_missing_folder_lists_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"configs/quickstart\.yaml"):
        read_recipe(Path("zzz/my.yaml"))


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_change_nested_settings(read):
    recipe = read(MINIMAL + "lora:\n  rank: 8\n  alpha: 16\n", "lora.rank=4", "model.name=other", "output=out/x")
    assert (recipe.lora.rank, recipe.lora.alpha) == (4, 16)
    assert (recipe.model.name, recipe.output) == ("other", "out/x")


def test_the_last_override_of_a_key_wins(read):
    assert read(MINIMAL, "lora.rank=4", "lora.rank=2").lora.rank == 2


def test_overrides_create_sections_that_the_recipe_lacks(read):
    recipe = read(MINIMAL, "trainer.beta=0.2", "evaluation.answers=3")
    assert recipe.trainer == {"beta": 0.2}
    assert recipe.evaluation.answers == 3


def test_overrides_take_lists_booleans_and_null(read):
    recipe = read(
        MINIMAL, "data.eval=[a.jsonl, b.jsonl]", "lora.targets=[q_proj]", "lora.dora=true", "trainer.max_length=null"
    )
    assert recipe.data.eval == ["a.jsonl", "b.jsonl"]
    assert recipe.lora.targets == ["q_proj"]
    assert recipe.lora.dora is True
    assert recipe.trainer == {"max_length": None}


def test_an_override_keeps_later_equal_signs_in_the_value(read):
    assert read(MINIMAL, "output=runs/beta=0.2").output == "runs/beta=0.2"


@pytest.mark.parametrize("override", ["trainer.beta", "=3", "lora.rank:8"])
def test_an_override_without_key_and_value_is_refused(read, override):
    with pytest.raises(ConfigError, match="key=value") as caught:
        read(MINIMAL, override)
    assert repr(override) in str(caught.value)


def test_an_override_with_an_unknown_key_suggests_the_nearest_one(read):
    with pytest.raises(ConfigError, match=r"lora\.rnak is not a setting\. Did you mean lora\.rank\?"):
        read(MINIMAL, "lora.rnak=8")


def test_an_override_in_an_unknown_section_suggests_a_section(read):
    with pytest.raises(ConfigError, match=r"train is not a setting\. Did you mean trainer\?"):
        read(MINIMAL, "train.max_steps=2")


def test_an_override_inside_a_single_value_is_refused(read):
    with pytest.raises(ConfigError, match="reference is a single value"):
        read(MINIMAL + "reference: base\n", "reference.path=x")


def test_an_override_with_broken_yaml_is_quoted(read):
    with pytest.raises(ConfigError, match=r"lora\.targets=\[q_proj"):
        read(MINIMAL, "lora.targets=[q_proj")


def test_an_override_fills_a_section_whose_lines_are_all_commented_out(read):
    assert read(MINIMAL + "trainer:\n  # beta: 0.1\n", "trainer.beta=0.2").trainer == {"beta": 0.2}


@pytest.mark.parametrize("section", ["lora", "evaluation", "trainer"])
def test_an_empty_section_is_a_section_of_defaults(section):
    assert check_recipe(with_settings(**{section: None})) == check_recipe(with_settings())


def test_merge_keys_work(read):
    recipe = read(
        MINIMAL + "lora: &small {rank: 4, alpha: 8}\nevaluation: {}\ntrainer:\n  <<: {beta: 0.2}\n  seed: 3\n"
    )
    assert recipe.trainer == {"beta": 0.2, "seed": 3}
    assert recipe.lora.rank == 4


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = check_recipe(
        with_settings(
            data={"train": ["~/a.jsonl", "org/data"], "eval": "~/b.jsonl"},
            evaluation={"questions": "~/q.jsonl"},
            reference="adapter:~/first",
            output="~/out",
        )
    )
    assert (recipe.data.train, recipe.data.eval) == (["/home/me/a.jsonl", "org/data"], "/home/me/b.jsonl")
    assert (recipe.evaluation.questions, recipe.output) == ("/home/me/q.jsonl", "/home/me/out")
    assert recipe.reference_adapter == Path("/home/me/first")


def test_infinity_inside_a_trainer_field_survives_writing(recipe_path):
    recipe = check_recipe(with_settings(trainer={"lr_scheduler_kwargs": {"power": float("inf")}}))
    recipe_path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert read_recipe(recipe_path) == recipe


@pytest.mark.parametrize("alpha", ["nan", "inf"])
def test_a_number_without_end_is_refused(alpha):
    assert "finite" in refusal(lora={"alpha": float(alpha)})


# --- formats --------------------------------------------------------------------------------------


def test_the_reference_is_the_base_or_an_adapter_folder():
    assert check_recipe(with_settings()).reference_adapter is None
    assert check_recipe(with_settings(reference="adapter:adapters/a")).reference_adapter == Path("adapters/a")


@pytest.mark.parametrize("reference", ["adapter:", "adapters/a", "Base", ""])
def test_other_references_are_refused_with_both_forms(reference):
    message = refusal(reference=reference)
    assert f"reference is {reference!r}" in message
    assert "base, or adapter:PATH" in message


@pytest.mark.parametrize("layers", ["all", "top-1", "top-12", [0, 3]])
def test_layers_forms_are_kept_as_written(layers):
    assert check_recipe(with_settings(lora={"layers": layers})).lora.layers == layers


@pytest.mark.parametrize("layers", ["top-0", "top-", "top", "last-2", "0", "top-8 "])
def test_other_layers_are_refused_with_the_allowed_forms(layers):
    message = refusal(lora={"layers": layers})
    assert f"lora.layers is {layers!r}" in message
    assert "top-8" in message


# --- writing --------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"name": texts}, optional={"quantize": st.sampled_from(["auto", "nf4", "none"])}
        ),
        "data": st.fixed_dictionaries({"train": texts | st.lists(texts)}, optional={"eval": st.none() | texts}),
    },
    optional={
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 512),
                "alpha": st.integers(1, 64) | st.floats(1e-9, 1e9),
                "dropout": st.floats(0, 0.99),
                "layers": st.sampled_from(["all", "top-3"]) | st.lists(st.integers(0, 9)),
            },
        ),
        "output": st.none() | texts,
        "trainer": st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=4),
    },
)


def continuing_from_an_adapter(plain: dict[str, Any]) -> dict[str, Any]:
    """The adapter brings its own LoRA settings."""
    return {**{key: value for key, value in plain.items() if key != "lora"}, "reference": "adapter:adapters/ö"}


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@settings(max_examples=60, deadline=None)
@given(plain=recipes | recipes.map(continuing_from_an_adapter))
def test_a_dumped_recipe_reads_back_equal(recipe_path, plain):
    recipe = check_recipe(plain)
    recipe_path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = read_recipe(recipe_path)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize("text", ["12345e6", "1e5", ".5e3", "5e-7", "no", "null", "1_000", "2020-01-01", "a: b", " x"])
def test_text_that_looks_like_something_else_reads_back_as_text(recipe_path, text):
    recipe = check_recipe(with_settings(model={"name": "m", "revision": text}, trainer={"run_name": text}))
    recipe_path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert read_recipe(recipe_path) == recipe


def test_a_dumped_recipe_writes_every_setting_out_in_the_recipes_order():
    dumped = dump_recipe(check_recipe(with_settings()))
    keys = [line.partition(":")[0].strip() for line in dumped.splitlines() if not line.endswith(":")]
    assert keys == [key.rpartition(".")[2] for key, _, _ in describe_fields()]


# --- documentation --------------------------------------------------------------------------------


def test_every_setting_is_described_with_its_default():
    described = {key: (default, text) for key, default, text in describe_fields()}
    assert all(text.endswith((".", "…")) and len(text) > 15 for _, text in described.values())
    assert described["model.name"][0] == "required"
    assert described["lora.rank"][0] == "16"
    assert described["model.quantize"][0] == "auto"
    assert all(field.description for field in Recipe.model_fields.values())


def test_the_description_lists_exactly_the_settings_that_a_recipe_holds():
    plain = check_recipe(with_settings()).model_dump()
    held = [
        f"{name}.{inner}" if isinstance(value, dict) and name != "trainer" else name
        for name, value in plain.items()
        for inner in (value if isinstance(value, dict) and name != "trainer" else [""])
    ]
    assert [key for key, _, _ in describe_fields()] == held


def test_a_recipe_of_rounds_is_sent_to_its_command():
    path = Path(__file__).resolve().parents[2] / "configs" / "improve" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"quickstart\.yaml is a recipe for lora-dpo improve"):
        read_recipe(path)


# --- values as they are typed ---------------------------------------------------------------------

AS_TYPED = (
    *("out/c16 #7", "#7", "a: b", "[draft] pairs.jsonl", "{x}/pairs.jsonl", "&pairs.jsonl", "*.jsonl", "!n.jsonl"),
    *(
        " pairs.jsonl ",
        "yes",
        "no",
        "on",
        "off",
        "true",
        "1e3",
        "0123",
        "12:30",
        "2026-01-02",
        "a\tb",
        "-",
        "- a",
        "%x",
    ),
    *(
        "it's",
        'say "hi"',
        "C:\\pairs",
        "@home",
        "`x`",
        "a, b",
        "? a",
        "| a",
        "> a",
        "Null",
        "None",
        "owner/name",
        "a\nb",
    ),
)


@pytest.mark.parametrize("typed", AS_TYPED)
@pytest.mark.parametrize("key", ["output", "data.train", "data.eval", "model.name", "model.revision", "data.format"])
def test_a_text_is_taken_as_it_is_typed(read, key, typed):
    section, _, name = key.rpartition(".")
    recipe = read(MINIMAL, f"{key}={typed}")
    assert getattr(getattr(recipe, section) if section else recipe, name) == typed


@pytest.mark.parametrize("typed", [*AS_TYPED, "null", "[x]"])
def test_quotes_make_a_text_of_anything(read, typed):
    written = typed.replace("'", "''").replace("\n", "\n\n")
    assert read(MINIMAL, f"data.train='{written}'").data.train == typed


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.run_name=try #7", "try #7"),
        ("trainer.run_name=2026-01-02", "2026-01-02"),
        ("trainer.run_name=12:30", "12:30"),
        ("trainer.run_name=a: b", "a: b"),
        ("trainer.run_name=[1] a", "[1] a"),
        ("trainer.eval_strategy=no", "no"),
        ("trainer.beta=0.2", 0.2),
        ("trainer.beta=2e-1", 0.2),
        ("trainer.max_steps=-1", -1),
        ("trainer.max_length=null", None),
        ("trainer.disable_dropout=false", False),
        ("trainer.loss_type=[sigmoid, sft]", ["sigmoid", "sft"]),
        ("trainer.lr_scheduler_kwargs={min_lr: 1e-6}", {"min_lr": 1e-6}),
        ("trainer.run_name='12'", "12"),
    ],
)
def test_a_field_of_trl_is_a_number_a_switch_a_list_or_what_is_typed(read, override, value):
    (found,) = read(MINIMAL, override).trainer.values()
    assert (found, type(found)) == (value, type(value))


def test_a_setting_of_several_kinds_takes_each_of_them(read):
    typed = {
        "engine.tokens=auto": "auto",
        "engine.tokens=512": 512,
        "model.packed=true": True,
        "model.packed=auto": "auto",
        "lora.layers=top-2": "top-2",
        "lora.layers=[0, 1]": [0, 1],
        "data.eval=null": None,
        "data.eval=": None,
        "data.eval=[a.jsonl, 'b #1.jsonl']": ["a.jsonl", "b #1.jsonl"],
        "engine.reference_cache=off": "off",
        "engine.trunk_cache=off": "off",
        "lora.dora=yes": True,
    }
    for override, value in typed.items():
        section, name = override.partition("=")[0].split(".")
        assert getattr(getattr(read(MINIMAL, override), section), name) == value, override
    assert read(MINIMAL, "lora={rank: 4, alpha: 8}").lora.rank == 4


@pytest.mark.parametrize("override", ["lora.rank=4 # small", "lora.dora=true #1", "data.min_gap=1 #"])
def test_a_number_with_a_comment_is_no_number(read, override):
    with pytest.raises(ConfigError, match="#"):
        read(MINIMAL, override)


def test_a_rounds_recipe_takes_texts_as_they_are_typed(tmp_path):
    path = tmp_path / "rounds.yaml"
    path.write_text("model: {name: m}\nimprove: {prompts: p.txt, held_out: h.txt, judge: rule:length}\n")
    recipe = read_improve_recipe(path, ["improve.prompts=p #1.txt", "improve.rounds=2"])
    assert (recipe.improve.prompts, recipe.improve.rounds) == ("p #1.txt", 2)


@pytest.mark.parametrize(("typed", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
@pytest.mark.parametrize("key", ["trainer.gradient_checkpointing", "engine.fallback", "model.packed"])
def test_a_switch_may_be_written_as_python_writes_it(key, typed, value, tmp_path):
    (tmp_path / "a.yaml").write_text(MINIMAL)
    section, name = key.split(".")
    assert read_settings(tmp_path / "a.yaml", [f"{key}={typed}"])[section][name] is value


# --- held out of the training data ------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 12, 0.15, 0.999])
def test_a_number_of_prompts_or_a_share_of_them_is_held_out(value):
    data = check_recipe(with_settings(data={"train": "a.csv", "hold_out": value})).data
    assert data.hold_out == value
    assert data.has_held_out


def test_something_is_held_out_by_a_file_too_and_by_default_nothing_is():
    assert check_recipe(with_settings(data={"train": "a.csv", "eval": "b.csv"})).data.has_held_out
    assert not check_recipe(with_settings()).data.has_held_out


@pytest.mark.parametrize("value", [0, -3, 0.0, 1.0, 1.5, True, "12"])
def test_what_is_no_number_of_prompts_is_refused(value):
    said = refusal(data={"train": "a.csv", "hold_out": value})
    assert "data.hold_out" in said
    assert repr(value) in said


def test_held_out_pairs_come_from_one_place():
    said = refusal(data={"train": "a.csv", "eval": "b.csv", "hold_out": 12})
    assert said == ("recipe: data.hold_out is 12: data.eval names held-out pairs already. Leave one of the two out.")


def test_a_share_is_read_from_the_command_line_as_a_number(read):
    assert read(MINIMAL, "data.hold_out=0.2").data.hold_out == 0.2
    assert read(MINIMAL, "data.hold_out=12").data.hold_out == 12


@pytest.mark.parametrize("name", [".*proj", "q_proj|k_proj", "layers.", "", "q proj"])
def test_ranks_are_given_to_names_and_not_to_patterns(name):
    with pytest.raises(ValidationError, match="is no name of a layer"):
        LoraSection(rank_pattern={name: 4})


def test_single_trained_tokens_are_refused_with_what_there_is(read):
    with pytest.raises(ConfigError, match=r"lora\.trainable_tokens is not a setting\..*lora\.modules_to_save: \[embed"):
        read(MINIMAL, "lora.trainable_tokens=['<|tool|>']")


@pytest.mark.parametrize("name", [".*norm", "", "lm head"])
def test_whole_modules_are_named_and_not_matched(name):
    with pytest.raises(ValidationError, match="is no name of a layer"):
        LoraSection(modules_to_save=[name])
