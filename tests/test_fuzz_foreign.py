"""What comes from elsewhere, broken in every way: an error of ours in one short line, in time, or it works.

A few examples a test in an ordinary run; `make fuzz` makes thousands.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bounded import EXAMPLES, ends_well, yaml_bomb
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lora_dpo.adapters.describe import describe, diff
from lora_dpo.adapters.exchange import install
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.peft_files import read_adapter
from lora_dpo.adapters.store import list_adapters
from lora_dpo.config.improve_recipe import read_improve_recipe
from lora_dpo.config.reading import check_recipe, parse_settings, read_recipe, read_settings
from lora_dpo.config.trl_dpo import trainer_settings
from lora_dpo.data.chat_template import render
from lora_dpo.evaluation.report.write import report_of
from lora_dpo.judging.specs import check_specs
from lora_dpo.model.base import load_base
from lora_dpo.serving.openai_schema import read_request
from lora_dpo.training.drafting.presets import with_settings

FUZZ = settings(
    max_examples=EXAMPLES or 25,
    deadline=None,  # processor time is bounded instead
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
LARGE = 1 << 20

scalars = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        10**400,
        2**63,
        1e308,
        -1e308,
        5e-324,
        float("nan"),
        float("inf"),
        "",
        "x",
        "base",
        "\n",
        "\u202e",
        "\ud800",
        "x" * 5000,
        "9" * 5000,
        "../..",
        "[",
        "{",
        ".*.*.*.*.*.*.*Z",
        "(a+)+$",
        [],
        {},
        [None],
        [[]],
    ]
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def changes(draw: Any, whole: Any, most: int = 3) -> Any:
    """A JSON value with some of its parts exchanged, taken out, repeated or renamed."""
    changed = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        place, key = changed, None
        holder = None
        while isinstance(place, dict | list) and place and (holder is None or draw(st.booleans())):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            holder, key = place, draw(st.sampled_from(keys))
            place = holder[key]
        if holder is None:
            return draw(values)
        kind = draw(st.sampled_from(["set", "set", "take out", "more", "rename"]))
        if kind == "take out":
            del holder[key]
        elif kind == "more" and isinstance(place, list):
            holder[key] = place * draw(st.sampled_from([0, 2, 3000]))
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=4) | st.just("k" * 3000))] = holder.pop(key)
        else:
            holder[key] = draw(values)
    return changed


@st.composite
def broken(draw: Any, whole: bytes) -> bytes:
    """Bytes with some of them exchanged, cut out or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["set", "set", "flip", "insert", "cut", "truncate"]))
        extra = draw(
            st.binary(min_size=1, max_size=6) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"PK\x01\x02", b"\x0c\0"])
        )
        if kind == "set":
            content[at : at + len(extra)] = extra
        elif kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = extra
        elif kind == "cut":
            del content[at : at + 40]
        elif at:
            del content[at:]
    return bytes(content)


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


@pytest.fixture
def parts(tiny_adapter: Path) -> dict[str, bytes]:
    """The files of an adapter that a run made, with those that the tiny one lacks."""
    files = {path.name: path.read_bytes() for path in tiny_adapter.iterdir() if path.is_file()}
    recipe = {"model": {"name": "m"}, "data": {"train": "p.jsonl"}, "trainer": {"beta": 0.1}, "method": "dpo"}
    return {**files, "recipe.yaml": to_json(recipe), "metrics.jsonl": b"".join(to_json(row) + b"\n" for row in ROWS)}


ALARM = {"step": 3, "name": "kl", "seen": "2 nats", "cause": "c", "advice": "a", "severe": True}
ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 0.7, "rewards/margins": 0.1, "rewards/chosen": 0.2, "rewards/accuracies": 1},
    {"step": 2, "loss": 0.6, "rewards/margins": 0.2, "health/kl": 0.1},
    {"step": 2, "answers": ["Yes.", "No."], "health/kl": 0.1, "health/answer_tokens": 3},
    {"step": 3, "alarm": ALARM},
]
MEASURED = {
    "format": 1,
    "answers": [{"prompt": "p", "before": {"text": "b"}, "after": {"text": "a"}}],
    "log_ratios": {"chosen": [0.1, -0.2], "rejected": [0.3, float("nan")]},
    "findings": [{"severity": "error", "title": "t", "count": 2, "meaning": "m", "advice": "a"}],
    "health": {"steps": 3, "alarms": [ALARM], "sentence": "s", "kept": 1, "seconds": 0.5},
    "seconds": {"training": 3.5},
    "total_seconds": 5,
    "memory": {"process": 10**9},
}
MARGINS = {
    "format": 1,
    "files": ["a.jsonl"],
    "pairs": [[0, 1, "0123456789abcdef", 0.5, -2.0, -0.75, 2], [0, 2, "fedcba9876543210", None, None, None, 0]],
}
INTERVAL = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 30}
EVALUATION = {
    "format": 1,
    "adapter": "a",
    "base": "b",
    "against": "base",
    "data": ["f"],
    "beta": 0.1,
    "called": "better",
    "verdict": "v",
    "warnings": ["w"],
    "seconds": 3.5,
    "cost": "",
    "text": {"tokens": 5, "base": 2.0, "adapter": 2.1},
    "numbers": dict.fromkeys(("accuracy", "win-rate", "win-rate-lc", "kl", "length", "perplexity-ratio"), INTERVAL),
    "pairs": {"pairs": 30, "log_ratios": {"chosen": [0.5], "rejected": [0.1, 0.2]}},
    "answers": {who: {"tokens": INTERVAL, "refusals": INTERVAL} for who in ("adapter", "base")},
    "contest": {"judge": "j", "wins": 3, "ties": 1, "losses": 2, "contradicted": 0, "unjudged": 0, "votes": None},
    "rows": [{"prompt": "p", "against": "x", "adapter": "y"}],
}
PASSPORT_PARTS = {
    "metrics": {
        "before": {
            "pairs": {"accuracy": 0.5, "margin": 0.0, "pairs": 3},
            "answers": {"mean_tokens": 5.0, "finished": 1.0},
        },
        "after": {
            "pairs": {"accuracy": 0.5, "margin": 0.1, "pairs": 3, "chosen_logratio": 0.1, "rejected_logratio": -0.1},
            "answers": {"mean_tokens": 5.0, "finished": 1.0, "answers": 3, "correct": 0.5, "chosen_mean_tokens": 4.0},
        },
    },
    "data": {"train": {"pairs": 4, "rows": 5, "dropped": {"empty": 1}, "sha256": {"f": "0" * 64}}},
}


def rewritten(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- packages and adapters ------------------------------------------------------------------------


def test_broken_packages(parts, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(f"evil/{name}", content)
    path = tmp_path / "evil.lora.zip"

    @FUZZ
    @given(content=broken(packed.getvalue()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        with ends_well():
            install(path, root=tmp_path / "adapters")
        shutil.rmtree(tmp_path / "adapters", ignore_errors=True)

    run()


@pytest.mark.parametrize("name", ["adapter_config.json", "passport.json", "verify.json", "adapter_model.safetensors"])
def test_broken_files_of_an_adapter(name, parts, tmp_path):
    whole = parts[name]
    odd = broken(whole)
    if name.endswith(".json"):
        content = {**json.loads(whole), **(PASSPORT_PARTS if name == "passport.json" else {})}
        odd = odd | changes(content).map(to_json)

    @FUZZ
    @given(content=odd)
    def run(content: bytes) -> None:
        folder = rewritten(tmp_path / "odd", {**parts, name: content})
        for use in (read_adapter, describe, lambda folder: diff(folder, folder)):
            with ends_well():
                use(folder)
        list_adapters(tmp_path)
        with ends_well():
            install(folder, root=tmp_path / "adapters")
        shutil.rmtree(tmp_path / "adapters", ignore_errors=True)

    run()


def test_odd_configs_on_a_base(parts, tiny_model_folder, tmp_path):
    base = load_base(str(tiny_model_folder), quantize="none")
    config = json.loads(parts["adapter_config.json"])
    files = {name: content for name, content in parts.items() if name != "passport.json"}

    @FUZZ
    @given(content=changes(config, most=2))
    def run(content: Any) -> None:
        folder = rewritten(tmp_path / "odd", {**files, "adapter_config.json": to_json(content)})
        with ends_well(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base.model = attach_adapter(base, folder).unload()

    run()


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["passport.json", "metrics.jsonl", "recipe.yaml", "measured.json", "pair-margins.json"]
)
def test_reports_of_foreign_folders(name, parts, tmp_path):
    whole = {
        "passport.json": {**json.loads(parts["passport.json"]), **PASSPORT_PARTS},
        "metrics.jsonl": ROWS,
        "recipe.yaml": json.loads(parts["recipe.yaml"]),
        "measured.json": MEASURED,
        "pair-margins.json": MARGINS,
    }
    files = {**parts, **{file: to_json(content) for file, content in whole.items() if file != "metrics.jsonl"}}
    unfinished = tmp_path / "run.partial"
    page = report_of([rewritten(tmp_path / "whole", files)])
    assert "No alarm" in page or "kl" in page

    @FUZZ
    @given(content=changes(whole[name]), raw=broken(files[name]), as_bytes=st.booleans())
    def run(content: Any, raw: bytes, as_bytes: bool) -> None:
        if name == "metrics.jsonl":
            lines = content if isinstance(content, list) else [content]
            made = b"".join(to_json(row) + b"\n" for row in lines)
        else:
            made = to_json(content)
        odd = {**files, name: raw if as_bytes else made}
        one, other = rewritten(tmp_path / "odd", odd), rewritten(unfinished, odd)
        for folders in ([one], [other], [one, tmp_path / "whole"]):
            with ends_well():
                assert len(report_of(folders)) < LARGE

    run()


def test_a_report_of_a_recipe_whose_aliases_multiply_is_one_short_sentence(parts, tmp_path):
    # in the place of a setting that a report shows
    hostile = f"{yaml_bomb()}\nmodel: {{name: *a7}}\ntrainer: *a7\n".encode()
    folder = rewritten(tmp_path / "odd", {**parts, "recipe.yaml": hostile})
    with ends_well() as said:
        report_of([folder])
    assert "too much in it" in str(said[0])
    assert len(str(said[0])) < 1000


def test_reports_of_foreign_evaluations(tmp_path):
    whole = rewritten(tmp_path / "whole", {"eval.json": to_json(EVALUATION)})
    assert "won" in report_of([whole])

    @FUZZ
    @given(content=changes(EVALUATION).map(to_json) | broken(to_json(EVALUATION)))
    def run(content: bytes) -> None:
        odd = rewritten(tmp_path / "odd", {"eval.json": content})
        for folders in ([odd], [odd, whole]):
            with ends_well():
                assert len(report_of(folders)) < LARGE

    run()


def test_reports_beside_odd_checkpoints(parts, tmp_path):
    files = {"metrics.jsonl": parts["metrics.jsonl"], "recipe.yaml": parts["recipe.yaml"]}

    @FUZZ
    @given(name=st.sampled_from(["checkpoint-3", "checkpoint-x", "checkpoint-" + "9" * 200]), state=values, lock=values)
    def run(name: str, state: Any, lock: Any) -> None:
        held = {"running.lock": b"", "running.json": to_json({"process": lock, "host": "h"})}
        folder = rewritten(tmp_path / "run.partial", {**files, **held})
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "trainer_state.json").write_bytes(to_json(state))
        (folder / "health-before.json").write_bytes(to_json({"checkup": state}))
        with ends_well():
            report_of([folder])

    run()


# --- recipes, settings, judges, requests, templates -----------------------------------------------

RECIPE = {
    "model": {"name": "smollm2-135m", "quantize": "none"},
    "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"], "layers": "top-2"},
    "data": {"train": "a.jsonl", "eval": ["b.jsonl"]},
    "evaluation": {"answers": 2},
    "health": {"action": "warn", "judge": "rules:length<=5"},
    "trainer": {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0], "learning_rate": 1e-4},
}
snippets = st.sampled_from(
    [
        "&a [*a]",
        "*a",
        "&a ",
        "!!binary x",
        "<<: *a",
        "[",
        "{",
        "- ",
        ": ",
        "\n",
        "\t",
        '"',
        "'",
        "|",
        ">",
        "%",
        "1:1",
        "0x",
        "~",
        "9" * 400,
        "? ",
        "#",
        "\0",
        "\u2028",
        "a: &a [x, x, x]\n",
        "[*a, *a, *a]",
        "2020-99-99",
        ".inf",
        "1e999",
        "no",
    ]
)
yaml_texts = st.lists(snippets | st.text(max_size=5), max_size=14).map("".join)


@FUZZ
@given(settings_=changes(RECIPE), text=yaml_texts, as_text=st.booleans())
def test_odd_recipes(settings_, text, as_text):
    with ends_well():
        given_settings = parse_settings(text if as_text else json.dumps(settings_), where="recipe.yaml")
        trainer_settings(check_recipe(given_settings))


def test_odd_recipe_files_and_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    keys = st.sampled_from(
        ["model.name", "lora.rank", "trainer", "lora", "a.b.c", "trainer.beta", "", "=", "improve.rounds"]
    )

    @FUZZ
    @given(content=broken(to_json(RECIPE)), key=keys | st.text(max_size=5), value=yaml_texts)
    def run(content: bytes, key: str, value: str) -> None:
        with ends_well():
            read_recipe(path, [f"{key}={value}"])
        with ends_well():
            read_settings(path, [f"{key}{value}"])
        odd = tmp_path / "odd.yaml"
        odd.write_bytes(content)
        with ends_well():
            read_recipe(odd)
        with ends_well():
            read_improve_recipe(odd)

    run()


@FUZZ
@given(changed=changes({"lora": RECIPE["lora"], "trainer": RECIPE["trainer"]}), text=yaml_texts, as_text=st.booleans())
def test_odd_settings_on_the_page(changed, text, as_text):
    recipe = check_recipe(copy.deepcopy(RECIPE))
    with ends_well():
        trainer_settings(with_settings(recipe, text if as_text else json.dumps(changed)))


rules = st.sampled_from(
    ["rules:", "reward:", "llm:", "implicit", "length", "chars", "<=", ">=", "=", "*", "0.5*", "@", "http://"]
)
rules |= st.sampled_from(
    ["regex", "keywords", "9" * 5000, "-", ".", "(", ")", "a+", "json", "os:", "x", ":", ",", "\n", " "]
)


@FUZZ
@given(spec=st.lists(rules | st.text(max_size=3), max_size=6).map("".join))
def test_odd_judges(spec):
    with ends_well():
        check_specs([spec])


REQUEST = {
    "model": "base",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 5,
    "seed": 3,
    "stop": ["a"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 1,
    "tools": [],
}


@FUZZ
@given(content=changes(REQUEST).map(to_json) | broken(to_json(REQUEST)))
def test_odd_requests(content):
    with ends_well():
        read_request(content, max_new_tokens=16)


bits = st.sampled_from(
    [
        *(
            "{{ messages }}",
            "{% for m in messages %}",
            "{% endfor %}",
            "{{ m.content }}",
            "{{ 1/0 }}",
            "{{ 2**10**9 }}",
        ),
        *(
            "{{ 2**10**9 }}",
            "{{ 'a' * 10**9 }}",
            "{% for i in range(10**8) %}",
            "{{ x.y.z }}",
            "{% set x = 'a' %}",
            "{{ x ~ x }}",
        ),
        *("{% if 1 %}", "{% endif %}", "{% macro f() %}", "{% endmacro %}", "{{ f() }}", "{{ raise_exception('no') }}"),
        *("{{ messages|map('x') }}", "{{ ''.__class__ }}", "{{ 'x'|center(10**9) }}", "{% break %}", "{{"),
    ]
)


@settings(FUZZ, max_examples=EXAMPLES or 8)
@given(template=st.lists(bits | st.text(max_size=3), max_size=9).map("".join))
def test_odd_chat_templates(tokenizer, template):
    odd = copy.copy(tokenizer)
    odd.chat_template = template
    with ends_well():
        assert len(render(odd, [{"role": "user", "content": "Hi"}])) < LARGE


RUNS_ON = {
    "a power": "{{ 10**(10**9) }}",
    "loops within loops": "{% set r = range(99999)|list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "a text that doubles": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "a long text": "{{ 'a' * 10**8 }}",
    "a wide text": "{{ 'a'|center(10**11) }}",
    "one divided by nothing": "{{ 1/0 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long range": "{% for i in range(10**8) %}x{% endfor %}",
    "a template of megabytes": "x" * 3_000_000,
    "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("case", RUNS_ON)
def test_a_chat_template_that_runs_on_is_refused(case, tokenizer):
    odd = copy.copy(tokenizer)
    odd.chat_template = RUNS_ON[case]
    with ends_well() as said:
        render(odd, [{"role": "user", "content": "Hi"}])
    assert "chat template" in str(said[0])
