"""A byte tokenizer, a tiny random model, and preference files: everything that tests need without a network.

The tokenizer's ids are bytes (`list(b"Hi")` is the ids of "Hi"); its special tokens follow from 256.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the hub; without this a refusal takes a minute
os.environ.setdefault("PIP_NO_INDEX", "1")  # nor fetch a model from the package index

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with, each with its byte as id (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


ELSEWHERE = {"posix": sys.platform != "win32", "linux": sys.platform == "linux"}
"""Markers of tests that not every system can run, and whether this one can."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, can in ELSEWHERE.items():
        if not can and item.get_closest_marker(marker):
            pytest.skip(f"not on this system: marked {marker}")


@pytest.fixture(scope="session")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What trying small copies of models found, once for all tests."""
    return tmp_path_factory.mktemp("proofs")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, proofs: Path) -> Path:
    """Every test starts with a cache of its own, in which nothing is but what was found out about models."""
    folder = tmp_path_factory.mktemp("cache")
    if sys.platform != "win32":
        (folder / "proofs").symlink_to(proofs)
    monkeypatch.setenv("LORA_DPO_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """What lies in memory before a file's tests is not gone through again by each collection of garbage in them.

    With torch and transformers that is a third of a second, at the end of each training and whenever Python thinks so.
    """
    gc.collect()
    gc.freeze()


_DRAWN: dict[tuple[str, frozenset[tuple[str, bool]]], bytes] = {}


@pytest.fixture(autouse=True)
def curves_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training's curves are drawn for the first run of a kind, and copied for others: to draw takes matplotlib a
    quarter of a second. A run is of another kind that logs other numbers, or such as are not finite."""
    run = sys.modules.get("lora_dpo.training.run")
    if run is None:
        return
    draw: Callable[..., None] = run.write_curves

    def draw_or_copy(path: Path, rows: list[dict[str, Any]], *, beta: float, method: str = "dpo") -> None:
        logged = frozenset(
            (name, math.isfinite(value) if isinstance(value, int | float) else True)
            for row in rows
            for name, value in row.items()
        )
        if (method, logged) not in _DRAWN:
            draw(path, rows, beta=beta, method=method)
            _DRAWN[method, logged] = path.read_bytes()
        path.write_bytes(_DRAWN[method, logged])

    monkeypatch.setattr(run, "write_curves", draw_or_copy)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Ids are bytes, then `<|im_start|>` (bos), `<|im_end|>` (eos, pad), `<|endoftext|>`; ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_alone = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 115 thousand parameters with the byte tokenizer: a `model.name` for recipes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,  # less than a block of NF4's 64 weights a row, and bitsandbytes fails on some CPUs
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # ten times the usual: next-token distributions are far from uniform
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def taught(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, taught two ways to answer (`taught.py`)."""
    from taught import teach

    return teach(tiny_model_folder, tmp_path_factory.mktemp("taught") / "model")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded with weights since the test began: every way to do that ends in transformers."""
    from transformers import PreTrainedModel

    found: list[str] = []
    original = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):
        found.append(str(args[0]))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return found


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSONL file of `count` usable pairs of chat messages, numbered from `first`; returns its path.

    Prompts with different numbers differ.
    """
    subjects = ("the moon", "a red kite", "bread", "Zürich")

    def write(name: str = "pairs.jsonl", count: int = 12, *, first: int = 1) -> Path:
        path = tmp_path / name
        rows = []
        for number in range(first, first + count):
            subject = subjects[number % len(subjects)]
            prompt = [{"role": "user", "content": f"Say {number} words about {subject}."}]
            if number % 3 == 0:
                prompt.insert(0, {"role": "system", "content": "Be brief."})
            chosen = [{"role": "assistant", "content": f"{subject.capitalize()}: {number}."}]
            rejected = [{"role": "assistant", "content": f"Well, {subject} is " + "so " * (number % 5) + "big."}]
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a new one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe_dict(
    tiny_model_folder: Path, write_pairs: Callable[..., Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Settings of a run of seconds, with held-out pairs; keyword arguments replace or, for sections, add to them.

    `recipe_dict(trainer={"beta": 0.2}, output="elsewhere")` is ready for `check_recipe`.
    """

    def make(**changes: Any) -> dict[str, Any]:
        train, held_out = tmp_path / "pairs.jsonl", tmp_path / "eval.jsonl"
        if not train.exists():
            write_pairs(train.name)
            write_pairs(held_out.name, count=4, first=101)
        settings: dict[str, Any] = {
            "model": {"name": str(tiny_model_folder), "quantize": "none", "dtype": "float32"},
            "data": {"train": str(train), "eval": str(held_out)},
            "evaluation": {"answers": 2, "show": 1, "max_new_tokens": 8},
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        }
        for name, change in changes.items():
            merged = isinstance(change, dict) and isinstance(settings.get(name), dict)
            settings[name] = {**settings[name], **change} if merged else change
        return settings

    return make


@pytest.fixture(scope="session")
def make_adapter(tiny_model_folder: Path) -> Callable[..., Path]:
    """Write an adapter of the tiny model without training: random A and B, a passport, stored pairs.

    `make_adapter(folder, rank=2, quantize="nf4", dora=True, …)`; other keywords are settings of the `lora` section.
    """
    import torch

    from lora_dpo.adapters.passport import make_passport, write_passport
    from lora_dpo.config.recipe import LoraSection
    from lora_dpo.data import TokenPair
    from lora_dpo.data.pairs import Origin
    from lora_dpo.evaluation.verify_adapter import write_stored_pairs
    from lora_dpo.model.base import load_base
    from lora_dpo.model.lora import attach_lora

    def make(folder: Path, *, seed: int = 0, quantize: str = "none", model: Path | None = None, **lora: Any) -> Path:
        base = load_base(str(model or tiny_model_folder), quantize=quantize)
        policy = attach_lora(base.model, LoraSection(**{"rank": 4, "alpha": 8, **lora}), seed=seed)
        draws = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.05)
        folder.mkdir(parents=True)
        policy.save_pretrained(str(folder), selected_adapters=["default"])
        data = {"train": {"sha256": {"pairs.jsonl": "0" * 64}, "rows": 4, "pairs": 4, "dropped": {}}}
        metrics = {"after": {"pairs": {"pairs": 4, "accuracy": 0.75}}}
        created = "2026-01-02T03:04:05+00:00"
        passport = make_passport(base, reference="base", data=data, metrics=metrics, created=created)
        write_passport(folder, passport)
        asked, better, worse = list(b"Say it."), [*b"Yes.", 257], [*b"Well, maybe.", 257]
        pairs = [TokenPair([256, *asked, i], better, [*worse[:i], 257], Origin("t", i), False) for i in range(2, 10)]
        write_stored_pairs(folder, policy.eval(), pairs, tokenizer=base.tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapter(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of the tiny model; tests copy it before they change it."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "tiny")


@pytest.fixture(scope="session")
def text_tokenizer(tokenizer):
    """The byte tokenizer with one merge and GPT-2's split of text, which llama.cpp knows by name."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"]["use_regex"] = True
    state["model"]["vocab"]["th"] = 256  # llama.cpp wants at least one merge
    for token in state["added_tokens"]:
        token["id"] += 1
    state["model"]["merges"] = [["t", "h"]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


COMMIT, OLD_COMMIT = "1234567890abcdef1234567890abcdef12345678", "f" * 40


@pytest.fixture
def hub_model(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a hub model in the hub's cache on this disk: `main` and `v1` are at `COMMIT`, `old` elsewhere."""
    import shutil

    cache = tmp_path / "hub"
    folder = cache / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    for branch, commit in {"main": COMMIT, "v1": COMMIT, "old": OLD_COMMIT}.items():
        shutil.copytree(tiny_model_folder, folder / "snapshots" / commit, dirs_exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return "someone/tiny"
