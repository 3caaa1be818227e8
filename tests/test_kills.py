"""Killed at random moments, merge, install, pack and export leave a whole result or nothing that anything accepts."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path

import gguf
import pytest
from children import in_a_child
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_dpo.adapters.exchange import check_content, install, pack
from lora_dpo.adapters.package import unpack
from lora_dpo.adapters.passport import check_folder
from lora_dpo.adapters.store import list_adapters
from lora_dpo.errors import AdapterError
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.merged_folder import merge

KILLS = 20


@pytest.fixture(scope="module")
def gguf_adapter(text_tokenizer, make_adapter, tmp_path_factory):
    """An adapter whose base has a tokenizer that a GGUF file can hold."""
    folder = tmp_path_factory.mktemp("gguf")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=260, **sizes, bos_token_id=257, eos_token_id=258, pad_token_id=258)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    text_tokenizer.save_pretrained(folder / "base")
    return make_adapter(folder / "mine", model=folder / "base")


def content(path):
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def seconds_of(work):
    began = time.perf_counter()
    assert in_a_child(work) == 0
    return time.perf_counter() - began


@pytest.mark.parametrize("what", ["merge", "install", "pack", "export", "merged export"])
def test_a_kill_leaves_the_whole_or_nothing(what, tiny_adapter, gguf_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gguf_adapter if what == "merged export" else tiny_adapter, "adapters/mine")
    package = pack(Path("adapters/mine"), tmp_path / "packed.lora.zip")
    target = {
        "merge": Path("merged"),
        "install": Path("adapters/new"),
        "pack": Path("mine.lora.zip"),
        "export": Path("lora.gguf"),
        "merged export": Path("merged.gguf"),
    }[what]
    work = {
        "merge": lambda: merge("adapters/mine", target, dtype="float32", shard=100_000),
        "install": lambda: install(package, name="new"),
        "pack": lambda: pack(Path("adapters/mine"), target),
        "export": lambda: export("adapters/mine", target, to="gguf-adapter"),
        "merged export": lambda: export("adapters/mine", target, to="gguf", kind="f32"),
    }[what]
    work()  # here, so that children find every library loaded
    whole = content(target)
    kept = target.read_bytes() if target.is_file() else b""
    remove(target)
    took = max(seconds_of(work) for _ in range(2) if not remove(target))
    remove(target)
    draws = random.Random(what)
    outcomes, refused = [], []
    for number in range(KILLS + KILLS // 2):
        if number < KILLS:
            in_a_child(work, kill_after=draws.uniform(0, 1.1 * took))
        else:  # soon after the first sign of what it writes
            in_a_child(work, kill_after=draws.uniform(0, 0.05 * took), begun=lambda: any(Path().glob(".*")))
        if target.exists():
            assert content(target) == whole
        outcomes.append("whole" if target.exists() else "nothing")
        names = [row.name for row in list_adapters(Path("adapters"))]
        assert names == (["mine", "new"] if what == "install" and target.exists() else ["mine"])
        for left in [*Path().glob(".*"), *Path("adapters").glob(".*")]:
            with pytest.raises(AdapterError):
                check_folder(left)  # by its name alone
            plain = left.with_name("left.lora.zip" if what == "pack" else "left")
            left.rename(plain)
            refused.append(not accepted(plain, tmp_path / "opened"))
            assert refused[-1] or same(plain, whole, kept), f"a part of it was taken for the whole: {left}"
            remove(plain)
        remove(target)
    assert "nothing" in outcomes, "no kill came before the end: the test proves nothing"
    if "merge" in what:  # the others write a tiny adapter within a millisecond: few kills come just then
        assert any(refused), "no kill left anything behind: the test proves little"


def accepted(left, opened):
    """Would a loader take what a kill left behind, under a name that says nothing?"""
    try:
        if left.name.endswith(".zip"):
            opened.mkdir()
            unpack(left, opened)
            check_content(opened)
        elif left.is_file():
            for tensor in gguf.GGUFReader(left).tensors:
                tensor.data.sum()
        elif (left / "config.json").is_file():  # a model's config is written last: with it, all weights are there
            AutoModelForCausalLM.from_pretrained(left)
        else:
            check_folder(left)
            check_content(left)
    except (AdapterError, OSError, ValueError, IndexError, KeyError, SafetensorError):
        return False
    finally:
        shutil.rmtree(opened, ignore_errors=True)
    return True


def same(left, whole, kept):
    """Is what was left all of the result? A GGUF file may lack the padding after its last tensor."""
    if left.is_dir():
        return content(left) == whole
    found = left.read_bytes()
    return kept.startswith(found) and not kept[len(found) :].strip(b"\0") and len(kept) - len(found) < 32


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
