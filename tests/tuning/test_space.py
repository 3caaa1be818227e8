"""What a search varies, and recipes with other values in them."""

import pytest

from lora_dpo.config.reading import check_recipe
from lora_dpo.config.trl_dpo import trainer_settings
from lora_dpo.errors import ConfigError
from lora_dpo.tuning.space import (
    Axis,
    default_axes,
    own_values,
    parse_axis,
    sft_weight,
    split_arguments,
    value_text,
    with_values,
)


def recipe(**trainer):
    return check_recipe(
        {
            "model": {"name": "smollm2-135m"},
            "lora": {"rank": 4, "alpha": 32},
            "data": {"train": "pairs.jsonl"},
            "trainer": {"max_steps": 36, "warmup_steps": 3, "beta": 0.1, "learning_rate": 1e-4, **trainer},
        }
    )


def test_a_range_and_choices():
    assert parse_axis("trainer.beta=0.03..0.5") == Axis("trainer.beta", "as given", 0.03, 0.5)
    assert parse_axis("trainer.learning_rate=1e-5..2e-4") == Axis("trainer.learning_rate", "as given", 1e-5, 2e-4)
    assert parse_axis("trainer.max_steps = 12..72") == Axis("trainer.max_steps", "as given", 12, 72, whole=True)
    assert parse_axis("lora.rank=4,16").choices == (4, 16)
    assert parse_axis("trainer.loss_type=sigmoid,ipo").choices == ("sigmoid", "ipo")
    assert parse_axis("lora.targets=[q_proj],[q_proj, v_proj]").choices == (["q_proj"], ["q_proj", "v_proj"])
    assert parse_axis("lora.rslora=true,false").choices == (True, False)
    assert parse_axis("sft_weight=0,0.5").choices == (0.0, 0.5)


def test_only_a_range_that_begins_above_nothing_is_logarithmic():
    assert parse_axis("trainer.beta=0.03..0.5").log
    assert not parse_axis("sft_weight=0..0.5").log
    assert not parse_axis("lora.rank=4,16").log


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer.beta", "no axis"),
        ("trainer.beta=", "no axis"),
        ("=0.1..0.2", "no axis"),
        ("trainer.beta=0.5..0.03", "ends before it begins"),
        ("trainer.beta=0.1..0.1", "ends before it begins"),
        ("lora.rank=4,16,4", "names a value twice"),
        ("model.name=a,b", "cannot be varied"),
        ("data.train=a,b", "cannot be varied"),
        ("output=a,b", "cannot be varied"),
        ("evaluation.max_new_tokens=8,9", "cannot be varied"),
        ("beta=0.1,0.2", "no setting"),
        ("sft_wait=0,1", "Did you mean sft_weight"),
        ("sft_weight=a,1", "0 or more"),
        ("sft_weight=-1,1", "0 or more"),
        ("sft_weight=inf,1", "0 or more"),
    ],
)
def test_what_is_no_axis(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_axis(text)


def test_one_value_is_set_for_all():
    axes, overrides, fixed = split_arguments(
        ["trainer.beta=0.03..0.5", "output=x", "lora.rank=4,16", "lora.targets=[q_proj, v_proj]", "sft_weight=0"]
    )
    assert [axis.key for axis in axes] == ["trainer.beta", "lora.rank"]
    assert overrides == ["output=x", "lora.targets=[q_proj, v_proj]"]
    assert fixed == {"sft_weight": 0.0}, "no setting of a recipe: `with_values` puts it in"
    for twice in (["trainer.beta=0.1,0.2", "trainer.beta=0.3,0.4"], ["sft_weight=0", "sft_weight=0,1"]):
        with pytest.raises(ConfigError, match="named twice"):
            split_arguments(twice)
    with pytest.raises(ConfigError, match="write a number, 0 or more"):
        split_arguments(["sft_weight=much"])


@pytest.mark.parametrize(
    ("fixed", "gone"),
    [
        (["trainer.beta", "output"], {"trainer.beta"}),
        (["trainer.loss_type"], {"trainer.loss_type", "sft_weight"}),
        (["trainer.num_train_epochs", "lora.alpha"], {"trainer.max_steps", "lora.rank"}),
    ],
)
def test_what_a_user_set_is_not_varied(fixed, gone):
    every = {axis.key for axis in default_axes(recipe(), steps=16)}
    assert {axis.key for axis in default_axes(recipe(), steps=16, fixed=fixed)} == every - gone
    with pytest.raises(ConfigError, match="nothing to choose"):
        default_axes(recipe(), steps=16, fixed=every)


def test_the_recipe_lies_on_its_own_axes():
    for one in (recipe(), recipe(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0]), recipe(loss_type="ipo"),
                recipe(beta=0.01), recipe(beta=3.0)):  # fmt: skip
        axes = default_axes(one, steps=36)
        own = own_values(one, axes, steps=36)
        assert set(own) == {axis.key for axis in axes}
        assert all(axis.holds(own[axis.key]) for axis in axes), own
        assert all(axis.reason for axis in axes)


def test_ranges_lie_around_the_recipe():
    one = recipe(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0])
    found = {axis.key: axis.choices or (axis.low, axis.high) for axis in default_axes(one, steps=36)}
    assert found == {
        "trainer.beta": (0.03, 0.5),
        "trainer.learning_rate": (pytest.approx(1e-4 / 1.5), pytest.approx(2.5e-4)),
        "sft_weight": (0.5, 2.0),
        "trainer.max_steps": (27, 72),
        "trainer.loss_type": ("sigmoid", "apo_zero"),
        "lora.rank": (4, 16),
    }
    found = {axis.key: (axis.low, axis.high) for axis in default_axes(recipe(), steps=1)}
    assert found["sft_weight"] == (0.05, 0.4), "0.2 is what a recipe has that says nothing"
    assert found["trainer.max_steps"] == (1, 2)


def test_its_own_values_change_nothing():
    one = recipe(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0])
    own = own_values(one, default_axes(one, steps=36), steps=36)
    same = with_values(one, own)
    assert trainer_settings(same) == trainer_settings(one)
    assert same.lora == one.lora


def test_values_go_where_they_belong():
    changed = with_values(
        recipe(), {"trainer.beta": 0.3, "lora.rank": 16, "sft_weight": 0.7, "trainer.loss_type": "apo_zero"}
    )
    settings = trainer_settings(changed)
    assert settings["beta"] == 0.3
    assert settings["loss_type"] == ["apo_zero", "sft"]
    assert settings["loss_weights"] == [1.0, 0.7]
    assert (changed.lora.rank, changed.lora.alpha) == (16, 128), "alpha / rank stays"


def test_alpha_stays_where_it_is_an_axis_itself():
    changed = with_values(recipe(), {"lora.rank": 16, "lora.alpha": 8.0})
    assert (changed.lora.rank, changed.lora.alpha) == (16, 8.0)


def test_no_weight_is_no_sft_term():
    settings = trainer_settings(with_values(recipe(), {"sft_weight": 0.0}))
    assert (settings["loss_type"], settings["loss_weights"]) == (["sigmoid"], [1.0])
    assert sft_weight(settings) == 0.0
    assert sft_weight(trainer_settings(recipe())) == 0.2, "DPO's default here"
    assert sft_weight(trainer_settings(recipe(loss_type="sigmoid"))) == 0.0


def test_a_loss_keeps_the_others_beside_it():
    one = recipe(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    settings = trainer_settings(with_values(one, {"trainer.loss_type": "ipo"}))
    assert settings["loss_type"] == ["ipo", "bco_pair", "sft"]
    assert settings["loss_weights"] == [0.8, 0.2, 1.0]


def test_fewer_steps_shorten_the_warm_up():
    assert with_values(recipe(), {"trainer.max_steps": 12}).trainer["warmup_steps"] == 1


def test_a_value_that_no_recipe_has_is_said():
    with pytest.raises(ConfigError, match="rank"):
        with_values(recipe(), {"lora.rank": 0})


def test_values_are_written_as_a_person_would():
    assert [value_text(value) for value in (0.1, 0.00026863, 24, "ipo", True)] == [
        "0.1",
        "0.000269",
        "24",
        "ipo",
        "True",
    ]
