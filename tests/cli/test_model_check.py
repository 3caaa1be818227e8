"""`lora-dpo models check`: what of a base works here, without its weights."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_dpo.cli.commands import main
from lora_dpo.cli.model_check import check_model, lines


@pytest.fixture
def base(tiny_model_folder, tmp_path):
    """A model's folder without weights, its files changed."""

    def make(config=None, template=None):
        folder = tmp_path / "base"
        shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    make.folder = tmp_path / "base"
    return make


def test_what_works_of_a_small_llama(base):
    found = check_model(base())
    assert (found.kind, found.layers, found.streams, found.export) == ("llama", 2, True, None)
    assert found.modules == 14
    assert 0 < found.reached < found.parameters
    assert 0 < found.packed < found.half == 2 * found.parameters
    assert (found.form, found.missing) == (None, ())
    assert found.pair > 0
    assert found.template.system == "yes"
    assert [label for label, _ in lines(found)] == [
        "model",
        "weights",
        "chat",
        "engine",
        "lora",
        "memory",
        "",
        "export",
    ]


SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TURNS = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    ("template", "system", "tools", "keywords"),
    [
        (TURNS, "left out", False, ()),
        (SYSTEM + TURNS, "refused", False, ()),
        (TOOLS + TURNS + THINKING, "left out", True, ("enable_thinking",)),
    ],
)
def test_what_a_chat_template_takes(base, template, system, tools, keywords):
    found = check_model(base(template=template)).template
    assert (found.system, found.tools, found.keywords, found.end) == (system, tools, keywords, "<|end|>")


def test_what_does_not_work_is_said_with_its_reason(base):
    found = check_model(base({"attention_dropout": 0.1, "model_type": "llama"}))
    assert not found.streams
    assert found.pair is None
    said = dict(lines(found))
    assert said["engine"] == "TRL's own passes (slower, the same result): its attention has dropout"


@pytest.mark.parametrize(
    ("form", "packed", "half", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True, True, "packed as stored (INT8)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, True, True, "(FP4)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, False, True, "GB as values in 16 bits"),
        ({"quant_method": "gptq", "bits": 8}, True, False, "packed as stored (GPTQ)"),
    ],
)
def test_a_base_that_came_quantised_is_counted_as_it_will_be_held(base, monkeypatch, form, packed, half, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gptqmodel" else name)
    plain = check_model(base())
    shutil.rmtree(base.folder)
    found = check_model(base({"quantization_config": form}))
    told = dict(lines(found))
    assert told["weights"].startswith("stored quantised (")
    assert (found.packed is not None, found.half is not None) == (packed, half)
    assert said in told["memory"]
    assert "in 4 bits" not in told["memory"]
    assert found.half in (None, plain.half)
    if 8 in form.values() or "load_in_8bit" in form:
        assert plain.packed < found.packed < plain.half
    assert found.missing == (("gptqmodel",) if form["quant_method"] == "gptq" else ())
    assert told.get("library", "none") == (
        "not installed: gptqmodel, which loads such weights (pip install gptqmodel)" if found.missing else "none"
    )


def test_a_type_that_gguf_export_does_not_know(base):
    found = check_model(base({"model_type": "olmo2"}))
    assert "by llama.cpp's own converter, which is" in found.export
    assert dict(lines(found))["export"].startswith("PEFT, and merged. GGUF of the merged model by llama.cpp's")


def test_settings_that_llama_cpp_computes_otherwise(base):
    told = dict(
        lines(check_model(base({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})))
    )
    assert told["export"].startswith("PEFT, and merged. No GGUF: ")


def test_no_template_is_no_chat(base):
    found = check_model(base(template="{{ raise_exception('never') }}"))
    assert "refuses these messages" in found.template
    assert dict(lines(found))["chat"].startswith("no: ")


def test_at_the_command_line(base, capsys):
    assert main(["models", "check", base(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["streams"] is True
    assert found["template"]["system"] == "yes"
    assert main(["models", "check", "nowhere/at-all-of-this"]) == 1
