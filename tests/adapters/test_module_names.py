"""Names and patterns of adapter configs: what PEFT means by them, and in time that nobody can stretch."""

from __future__ import annotations

import re

import pytest
from bounded import within
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.adapters.module_names import MAX_NAME, ByModule, in_use, is_name, is_pattern, matching

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "vision.q_proj")
]
PATTERNS = (
    r".*\.q_proj",
    r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"^(?!.*vision).*q_proj$",
    r"(?=.*layers\.1)(?!.*mlp).*",
    r".*layers\.[^1]\b.*",
    r"(?:.*?(?:vision|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:q_proj))",
    r"(?i)MODEL.*Q_PROJ",
    r"[]a-z._0-9]+",
    r"a|.*v_proj",
    r"(?!x",
)


def peft_key(patterns, module):
    """PEFT's own rule, copied from `peft.utils.other.get_pattern_key`."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


@pytest.mark.parametrize("pattern", PATTERNS[:-1])
def test_a_pattern_matches_what_re_matches(pattern):
    assert is_pattern(pattern)
    assert matching(pattern, MODULES) == [name for name in MODULES if re.fullmatch(pattern, name)]


pieces = st.sampled_from(
    ["a", "b", ".", r"\.", "x+", ".*", "[ab]", "[^a]", r"\d", "b?", "(a|b)", "(?:ab|)", "$", "^", r"\b"]
)


@settings(max_examples=300, deadline=None)
@given(
    condition=st.sampled_from(["", "(?!.*b)", "^(?=.*a)"]),
    parts=st.lists(pieces, max_size=6),
    names=st.lists(st.text("abx.1_", max_size=9), max_size=6),
)
def test_patterns_of_all_accepted_forms_match_what_re_matches(condition, parts, names):
    pattern = condition + "".join(parts)
    if is_pattern(pattern):
        assert matching(pattern, names) == [name for name in names if re.fullmatch(pattern, name)]


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(
        st.sampled_from(["q_proj", "layers.1.mlp.up_proj", "mlp.up_proj", r".*proj", r"\d+.*q_proj", "oj"]), unique=True
    )
)
def test_a_value_by_pattern_is_the_first_that_peft_finds(keys):
    found = ByModule({key: place for place, key in enumerate(keys)}).of(MODULES)
    wanted = {module: peft_key(keys, module) for module in MODULES}
    assert found == {module: keys.index(key) for module, key in wanted.items() if key is not None}


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(?x)(a+) +$", ".*" * 9, r"(a)\1", "(?!x", "a" * 3000, None, 7, ["a"], "a{1,70000}", "a++", "(?!a)b|c"],
)
def test_other_forms_are_refused(pattern):
    assert not is_pattern(pattern)


def test_names_are_names():
    assert is_name("model.layers.0.q_proj")
    assert not any(map(is_name, ["", "a" * (MAX_NAME + 1), ".*", "a|b", "a b", None, 3]))


def test_matching_takes_time_in_the_length_of_the_names_alone():
    names = ["a." * 200] * 2000
    with within(2):
        assert not matching(".*.*.*.*.*.*.*.*Z", names)
        assert not ByModule({".*a.*a.*a.*a.*a.*a.*Z": 1}).of(names)
        assert not ByModule({f"m{number}": 1 for number in range(20_000)}).of(names)


def test_names_that_no_module_has_are_left_out():
    assert in_use(["q_proj", "mlp.up_proj", "proj", "k_proj", MODULES[0]], MODULES) == [
        "q_proj",
        "mlp.up_proj",
        MODULES[0],
    ]
