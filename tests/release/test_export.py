"""Exports against a real llama.cpp, and against transformers' own reader of GGUF files."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil

import gguf
import pytest
import torch
from llama_cpp import llama_cpp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.cli.commands import main
from lora_dpo.errors import AdapterError, ConfigError, ModelError, OutputError
from lora_dpo.model.base import load_base
from lora_dpo.quiet import quiet_libraries
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.exports.gguf_arch import llama3_factors, permute
from lora_dpo.release.exports.ollama import modelfile, read_turns
from lora_dpo.release.merged_folder import merge
from lora_dpo.serving.chat import open_chat

IDS = [257, *b"Say it to the moon, red kite."]
COMMON = dict(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=258,
)


def configs():
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
    )

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    narrow = {**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = {**narrow, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
    return {
        "llama": LlamaConfig(**COMMON),
        "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
        "llama-biased": LlamaConfig(**COMMON, attention_bias=True),
        "llama3": LlamaConfig(**COMMON, rope_parameters=llama3),
        "mistral": MistralConfig(**COMMON, sliding_window=None),
        "qwen2": Qwen2Config(**COMMON),
        "qwen3": Qwen3Config(**narrow, head_dim=32),
        "gemma2": Gemma2Config(**gemma),
        "gemma3": Gemma3TextConfig(**gemma),
        "phi3": Phi3Config(**COMMON, original_max_position_embeddings=512),
    }


CONFIGS = configs()


def plain_name(name):
    """llama.cpp takes "phi3" in a model's name for a promise about its tokens, transformers reads "mistral" so."""
    return name.replace("phi3", "phi-three").replace("mistral", "wind")


@pytest.fixture(scope="module")
def models(text_tokenizer, tmp_path_factory):
    """Make the tiny random model of an architecture once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("bases") / plain_name(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(CONFIGS[name])
                for key, parameter in model.named_parameters():
                    if key.endswith(("norm.weight", "bias")):
                        parameter.data += torch.randn(parameter.shape) * 0.2  # not all alike: a mix-up must show
            model.save_pretrained(made[name])
            text_tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def adapters(models, make_adapter, tmp_path_factory):
    made = {}

    def make(name, **lora):
        key = (name, *lora)
        if key not in made:
            made[key] = make_adapter(tmp_path_factory.mktemp("tuned") / plain_name(name), model=models(name), **lora)
        return made[key]

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0].float()


def live(base, adapter):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))


def run(model, lora=None):
    [found] = llama_cpp(model, [{"tokens": IDS, "logits": True}], lora=lora)
    return torch.tensor(found)


def assert_close(found, wanted):
    """llama.cpp keeps keys and values in f16: log-probabilities agree to about 1e-2."""
    difference = (found.log_softmax(-1) - wanted.log_softmax(-1)).abs()
    assert difference.mean() < 0.01, difference.mean()
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.95


FIRST = ("llama", "qwen3", "gemma3")
"""Computed by llama.cpp in `make test` too; the others are among the slow tests."""


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_llama_cpp_computes_what_transformers_does(name, models, adapters, tmp_path):
    base, adapter = models(name), adapters(name)
    wanted = live(base, adapter)
    without = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (wanted.log_softmax(-1) - without.log_softmax(-1)).abs().mean() > 0.05
    merged = export(adapter, tmp_path / "merged.gguf", to="gguf", kind="f32")
    assert_close(run(merged), wanted)
    plain = export(base, tmp_path / "base.gguf", to="gguf", kind="f32")
    lora = export(adapter, tmp_path / "lora.gguf", to="gguf-adapter")
    assert_close(run(plain, lora), wanted)
    assert_close(run(plain), without)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("llama3", "llama-biased")])
def test_transformers_reads_the_merged_gguf_with_the_live_logits(name, models, adapters, tmp_path):
    export(adapters(name), tmp_path / "merged.gguf", to="gguf", kind="f32")
    # its reader of configs leaves out widths of heads and scales of queries: the tensors are what is compared here
    more = {"config": CONFIGS[name]} if name.startswith(("qwen3", "gemma")) else {}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32, **more)
    assert torch.allclose(logits(read), live(models(name), adapters(name)), atol=1e-3)


def test_scales_other_than_alpha_over_rank_reach_llama_cpp(models, adapters, tmp_path):
    adapter = adapters("llama", rslora=True)
    plain = export(models("llama"), tmp_path / "base.gguf", to="gguf", kind="f32")
    lora = export(adapter, tmp_path / "lora.gguf", to="gguf-adapter")
    assert_close(run(plain, lora), live(models("llama"), adapter))


def test_an_adapter_goes_into_what_it_was_trained_on(models, make_adapter, tmp_path, capsys, monkeypatch):
    """Trained on 4-bit weights it is the live adapter only on their values: in one file, and on the base in GGUF."""
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(tmp_path / "adapters" / "mine", model=models("llama"), quantize="nf4")
    with quiet_libraries():
        wanted = logits(open_chat(adapter).model)
    stored = live(models("llama"), adapter)
    assert (wanted.log_softmax(-1) - stored.log_softmax(-1)).abs().mean() > 0.05
    assert main(["export", "mine", "--type", "f32", "--output", "merged.gguf"]) == 0  # by its name
    assert "merged into trained-base" in capsys.readouterr().out
    assert_close(run(tmp_path / "merged.gguf"), wanted)
    assert main(["export", str(adapter), "--to", "gguf-adapter", "--output", "lora.gguf"]) == 0
    assert "--to gguf --into trained-base" in " ".join(capsys.readouterr().out.split())
    base = export(models("llama"), tmp_path / "base.gguf", to="gguf", kind="f32", into="trained-base")
    assert_close(run(base, tmp_path / "lora.gguf"), wanted)
    assert main(["export", str(adapter), "--type", "f32", "--into", "base16", "--output", "stored.gguf"]) == 0
    assert_close(run(tmp_path / "stored.gguf"), stored)
    with pytest.raises(ConfigError, match="--into has no effect with --to gguf-adapter"):
        export(adapter, tmp_path / "x.gguf", to="gguf-adapter", into="base16")


def test_a_small_rank_goes_into_q8_0(models, make_adapter, tmp_path):
    """Rows of B that are no multiple of a block are f16."""
    adapter = make_adapter(tmp_path / "mine", model=models("llama"), rank=4)
    lora = export(adapter, tmp_path / "lora.gguf", to="gguf-adapter", kind="q8_0")
    types = {tensor.name.rpartition(".")[2]: tensor.tensor_type.name for tensor in gguf.GGUFReader(lora).tensors}
    assert types == {"lora_a": "Q8_0", "lora_b": "F16"}
    base = export(models("llama"), tmp_path / "base.gguf", to="gguf", kind="f32")
    found, wanted = run(base, lora).log_softmax(-1), live(models("llama"), adapter).log_softmax(-1)
    assert (found - wanted).abs().mean() < 0.1


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_lora_on_the_head(name, models, make_adapter, tmp_path):
    """peft stores a copy of the base's head beside it. Where head and embeddings are one, llama.cpp has no place."""
    adapter = make_adapter(tmp_path / "mine", model=models(name), targets=["q_proj", "lm_head"])
    wanted = live(models(name), adapter)
    assert_close(run(export(adapter, tmp_path / "merged.gguf", to="gguf", kind="f32")), wanted)
    if name == "llama-tied":
        with pytest.raises(AdapterError, match="in one with its embeddings"):
            export(adapter, tmp_path / "lora.gguf", to="gguf-adapter")
        return
    lora = export(adapter, tmp_path / "lora.gguf", to="gguf-adapter")
    assert_close(run(export(models(name), tmp_path / "base.gguf", to="gguf", kind="f32"), lora), wanted)


def test_dora_is_merged_and_refused_as_an_adapter(models, adapters, tmp_path):
    adapter = adapters("llama", dora=True)
    with pytest.raises(AdapterError, match="DoRA"):
        export(adapter, tmp_path / "lora.gguf", to="gguf-adapter")
    assert not list(tmp_path.iterdir())
    assert_close(run(export(adapter, tmp_path / "m.gguf", to="gguf", kind="f32")), live(models("llama"), adapter))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_kind_of_weights_is_read_by_llama_cpp(kind, models, adapters, tmp_path):
    """Each is nearer to the live adapter than its base is by far: leaving the adapter out would show."""
    adapter = adapters("llama", alpha=128)
    wanted = live(models("llama"), adapter).log_softmax(-1)
    without = logits(AutoModelForCausalLM.from_pretrained(models("llama"))).log_softmax(-1)
    effect = (without - wanted).abs().mean()
    found = run(export(adapter, tmp_path / "m.gguf", to="gguf", kind=kind)).log_softmax(-1)
    error = (found - wanted).abs().mean()
    # measured: 0.002, 0.015, 0.045, 0.2 (5 bits), 0.34 to 0.38 (4 bits)
    limit = {"f16": 0.005, "bf16": 0.03, "q8_0": 0.09, "q5_1": 0.35, "q5_0": 0.35}.get(kind, 0.6)
    assert error < limit * effect


def test_llama_cpp_reads_text_as_the_tokenizer_does(models, text_tokenizer, tmp_path):
    plain = export(models("llama"), tmp_path / "base.gguf", to="gguf", kind="f32")
    texts = ["<|im_start|>user\nSay it, Zürich 123!<|im_end|>\n", "  two  spaces", "don't", "the other"]
    found = llama_cpp(plain, [{"tokenize": text} for text in texts])
    assert found == [text_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_name_that_llama_cpp_reads_something_into_does_no_harm(name, models, tmp_path):
    shutil.copytree(models(name), tmp_path / "my-Phi-3-mini")
    run(export(tmp_path / "my-Phi-3-mini", tmp_path / "m.gguf", to="gguf", kind="f16"))


def test_permuting_by_hand():
    rows = torch.arange(8)[:, None]  # two heads of four rows
    assert permute(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_factors_are_transformers_frequencies():
    from transformers import LlamaForCausalLM

    config = CONFIGS["llama3"]
    here = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    dimension = config.hidden_size // config.num_attention_heads
    plain = 1 / 10000 ** (torch.arange(0, dimension, 2) / dimension)
    assert torch.allclose(plain / torch.tensor(llama3_factors(config.rope_parameters, dimension)), here, rtol=1e-5)


# --- refusals -------------------------------------------------------------------------------------


def test_what_llama_cpp_would_compute_otherwise_is_refused(models, tmp_path):
    base = models("qwen2")
    config = json.loads((base / "config.json").read_text())
    for change, reason in (
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ({"model_type": "gpt_neox"}, "is of type gpt_neox"),
    ):
        copy = tmp_path / reason.replace(" ", "-")
        copy.mkdir()
        for path in base.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=reason if "neox" not in reason else "neox|other names"):
            export(copy, tmp_path / "m.gguf", to="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(tiny_adapter, tmp_path):
    with pytest.raises(ModelError, match="no known name"):
        export(tiny_adapter, tmp_path / "m.gguf", to="gguf")


def test_options_and_places_are_checked(adapters, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean q8_0"):
        export(adapters("llama"), tmp_path / "m.gguf", to="gguf", kind="q8")
    (tmp_path / "there").write_text("mine")
    for to in ("gguf", "gguf-adapter", "ollama", "peft"):
        with pytest.raises(OutputError, match="already exists"):
            export(adapters("llama"), tmp_path / "there", to=to)
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(AdapterError, match="is no adapter"):
        export(tmp_path, tmp_path / "x", to="peft")


def test_a_mistyped_adapter_is_no_hub_id(adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters("llama"), tmp_path / "adapters" / "quickstart")
    for source in ("quikstart", "adapters/quikstart", "adapters/quikstart/"):
        with pytest.raises(AdapterError, match=r"There is no adapter .*Did you mean quickstart\?"):
            export(source, tmp_path / "m.gguf", to="gguf")
    with pytest.raises(ModelError, match="me/quickstart"):  # the hub is asked for that one
        export("me/quickstart", tmp_path / "m.gguf", to="gguf")


# --- PEFT and Ollama ------------------------------------------------------------------------------


def test_the_peft_folder_has_the_two_files_and_loads(models, adapters, tmp_path):
    folder = export(adapters("llama"), tmp_path / "out", to="peft")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(live(models("llama"), folder), live(models("llama"), adapters("llama")))


def test_the_peft_folder_names_a_base_with_the_weights_that_it_was_made_for(tiny_adapter, tmp_path):
    """A packaged model has other weights than the hub's of that name."""
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    passport = read_passport(tmp_path / "mine")
    for base, named in (("smollm2-135m", "models/smollm2-135m"), ("someone/base", "someone/base")):
        write_passport(tmp_path / "mine", dataclasses.replace(passport, base=base))
        folder = export(tmp_path / "mine", tmp_path / named, to="peft")
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == named


def test_the_peft_folder_of_exchanged_weights_is_refused(tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    path = tmp_path / "mine" / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="not those of its passport"):
        export(tmp_path / "mine", tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


def test_the_ollama_folder_has_the_models_own_template_and_stops(adapters, models, text_tokenizer, tmp_path):
    folder = export(adapters("llama"), tmp_path / "out", to="ollama", kind="q8_0")
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for messages in (
        [{"role": "user", "content": "Hi {you}"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ):
        wanted = text_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go(template, messages) == wanted


def go(template, messages):
    """What Go's text/template makes of the few actions that our templates use."""
    first = re.match(r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{ end \}\}', template, re.DOTALL)
    before = first[1] if first and messages[0]["role"] != "system" else ""
    rest = template[first.end() :] if first else template
    loop = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", rest, re.DOTALL)
    cases = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', loop[1])[1:]
    bodies = dict(zip(cases[::2], cases[1::2], strict=True))
    turns = [bodies[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages]
    return before + "".join(turns) + loop[2]


TEMPLATES = {
    "default system": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>system\nBe kind.</s>\n"
    "{% endif %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}",
    "no system": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}",
    "base_of": "{% for m in messages %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + '</s>' }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_read_from_templates_of_many_kinds(name, text_tokenizer):
    import copy

    other = copy.deepcopy(text_tokenizer)
    other.chat_template = TEMPLATES[name]
    turns = read_turns(other)  # held against the template inside
    assert ("system" in turns.around) == (name != "no system")
    messages = [{"role": "user", "content": "Hi"}]
    assert go(turns.go_template(), messages) == other.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_a_template_that_counts_is_refused(text_tokenizer):
    import copy

    other = copy.deepcopy(text_tokenizer)
    other.chat_template = "{% for m in messages %}{{ loop.index }}:{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ModelError, match="does more than write turns"):
        read_turns(other)


DATED = (
    "\n{{% for m in messages %}}{{% if loop.first %}}<s>system\nToday is {{{{ strftime_now('{form}') }}}}.\n"
    "{{{{ m['content'] if m['role'] == 'system' }}}}</s>\n{{% endif %}}"
    "{{% if m['role'] != 'system' %}}<s>{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}</s>\n{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<s>assistant\n{{% endif %}}"
)


@pytest.mark.parametrize(("form", "noted"), [("%Y-%m-%d", False), ("%d %b %Y", True), ("%-d. %B, %A", True)])
def test_ollama_writes_the_date_of_the_day_it_answers(form, noted, text_tokenizer):
    import copy
    import datetime

    other = copy.deepcopy(text_tokenizer)
    other.chat_template = DATED.format(form=form)
    text = modelfile("model.gguf", other, [])
    today = datetime.datetime.now()
    assert today.strftime(form) not in text
    assert str(today.year) not in text
    assert ("today's date as" in text) == noted
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ):
        wanted = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go(template, messages).replace("{{ currentDate }}", today.strftime(form)) == wanted


def test_a_time_of_day_is_no_date_that_ollama_writes(text_tokenizer):
    import copy

    other = copy.deepcopy(text_tokenizer)
    other.chat_template = DATED.format(form="%Y-%m-%d %H:%M")
    with pytest.raises(ModelError, match="does more than write turns"):
        modelfile("model.gguf", other, [])


def named_templates(folder, target, **templates):
    """A copy of a model folder with several chat templates, as Hermes and Command R have them."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").unlink()
    path = target / "tokenizer_config.json"
    listed = [{"name": name, "template": template} for name, template in templates.items()]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": listed}))
    return target


def test_the_default_of_named_templates_is_the_one_in_a_gguf_file(models, tmp_path):
    plain = (models("llama") / "chat_template.jinja").read_text()
    base = named_templates(models("llama"), tmp_path / "base", tool_use="{{ tools }}" + plain, default=plain)
    fields = gguf.GGUFReader(export(base, tmp_path / "base.gguf", to="gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == plain
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}" + plain
    assert (export(base, tmp_path / "out", to="ollama") / "Modelfile").is_file()


def test_a_merge_keeps_named_templates_and_is_the_same_model(models, make_adapter, tmp_path):
    plain = (models("llama") / "chat_template.jinja").read_text()
    base = named_templates(models("llama"), tmp_path / "base", tool_use="{{ tools }}" + plain, default=plain)
    whole = load_base(str(base), quantize="none")
    folder = merge(make_adapter(tmp_path / "adapter", model=base), tmp_path / "merged")
    merged = load_base(str(folder), quantize="none")
    assert merged.tokenizer.chat_template == whole.tokenizer.chat_template
    assert merged.chat_template_sha256 == whole.chat_template_sha256


def test_named_templates_without_a_default_are_refused_in_a_sentence(models, tmp_path):
    plain = (models("llama") / "chat_template.jinja").read_text()
    base = named_templates(models("llama"), tmp_path / "base", tool_use=plain, rag=plain)
    for use in (lambda: load_base(str(base), quantize="none"), lambda: export(base, tmp_path / "out", to="ollama")):
        with pytest.raises(ModelError, match=r"are named 'tool_use', 'rag', and none is the default"):
            use()
    fields = gguf.GGUFReader(export(base, tmp_path / "base.gguf", to="gguf")).fields
    assert "tokenizer.chat_template" not in fields
    assert fields["tokenizer.chat_template.rag"].contents() == plain


def test_the_command_for_ollama_can_be_copied_into_a_shell(adapters, tmp_path, capsys):
    folder = tmp_path / "my model's #1"
    assert main(["export", str(adapters("llama")), "--to", "ollama", "-o", str(folder)]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "ollama create" in line)
    assert shlex.split(command) == ["ollama", "create", folder.name, "-f", str(folder / "Modelfile")]
