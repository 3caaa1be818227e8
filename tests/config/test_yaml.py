"""Settings in YAML come from anywhere, too: whatever they hold is read in time, or refused in one short sentence."""

from __future__ import annotations

import pytest
from bounded import ends_well, within, yaml_bomb

from lora_dpo.config.reading import check_recipe, parse_settings
from lora_dpo.config.yaml import MAX_TEXT, dump_yaml, parse_yaml
from lora_dpo.errors import ConfigError

HOSTILE = {
    "aliases that multiply": (yaml_bomb(), "too much in it"),
    "aliases that nest": (yaml_bomb(1, 2000), "too much in it"),
    "merges that multiply": (
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)),
        "too much in it",
    ),
    "a list that holds itself": ("a: &a [*a]", "holds itself"),
    "a mapping that holds itself": ("a: &a {b: *a}", "holds itself"),
    "deep lists": ("[" * 60_000, "deep"),
    "deep mappings": ("{a: " * 16_000, "deep"),
    "a long text": ("a: " + "b" * MAX_TEXT, "at most"),
    "many values": ("x: [" + "a, " * 20_000 + "]", "too much in it"),
    "a long number": ("x: " + "9" * 5000, "number of 5000 digits"),
    "a long hexadecimal number": ("x: 0x" + "f" * 60_000, "number of 60002 digits"),
    "a long number of base 60": ("x: 1" + ":1" * 20_000, "number of 40001 digits"),
    "a tag": ("x: !!timestamp soon", "tag"),
    "another tag": ("x: !!bool maybe", "tag"),
    "a tag of Python": ("x: !!python/object/apply:os.system [ls]", "tag"),
    "a list as a key": ("? [a]\n: b", "list or a mapping"),
    "a date": ("x: 2020-99-99", "month must be"),
    "a null character": ("a: \0", "not valid YAML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_settings_are_refused_in_time_in_one_sentence(case):
    text, reason = HOSTILE[case]
    with ends_well() as said:
        parse_settings(text, where="the settings")
    assert reason in str(said[0])
    with ends_well() as said:
        parse_yaml(text, where=f"trainer.beta={text}")
    assert len(str(said[0])) < 600


@pytest.mark.parametrize("value", ["9" * 18, "[" + ", ".join(["[1, 2, 3]"] * 900) + "]", "'" + "long " * 5000 + "'"])
def test_an_error_repeats_a_little_of_a_value(value):
    with pytest.raises(ConfigError) as error, within():
        check_recipe(
            parse_settings(
                f"model: {{name: m}}\ndata: {{train: a}}\nlora: {{rank: {value}, dropout: {value}}}", where="r"
            )
        )
    assert "lora." in str(error.value)
    assert len(str(error.value)) < 700


def test_ordinary_aliases_and_merges_are_read():
    text = "a: &a {rank: 4, alpha: 8}\nb: {<<: *a, rank: 2}\nc: [*a, *a]\nd: !!str 5"
    found = parse_yaml(text, where="here")
    assert found["b"] == {"rank": 2, "alpha": 8}
    assert found["c"] == [{"rank": 4, "alpha": 8}] * 2
    assert found["d"] == "5"
    assert parse_yaml(dump_yaml({"n": -(2**62), "f": 5e-7}), where="here") == {"n": -(2**62), "f": 5e-7}
