"""A second real model beside SmolLM2: Qwen2.5-Coder-0.5B-Instruct, with 151,936 tokens and biases in its layers.

Skipped, unless LORA_DPO_QWEN_GGUF names Qwen's own Q4_K_M file of it.
"""

import math
import os
from pathlib import Path

import pytest
from run_logs import logged
from tiny import Stock, assert_close, build, gradients_of

from lora_dpo import DPOTrainer
from lora_dpo.config.reading import check_recipe
from lora_dpo.data import read_pairs, tokenize_pairs
from lora_dpo.files import sha256_of
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import generate
from lora_dpo.model.packaged import convert_gguf
from lora_dpo.training.run import train

FILE = os.environ.get("LORA_DPO_QWEN_GGUF", "")
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PAIRS = Path(__file__).resolve().parent.parent / "data" / "quickstart.jsonl"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE, reason="LORA_DPO_QWEN_GGUF names no file")]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Its folder, made of the file."""
    assert sha256_of(Path(FILE)) == SHA256
    folder = tmp_path_factory.mktemp("qwen")
    convert_gguf(Path(FILE), folder, source="Qwen/Qwen2.5-Coder-0.5B-Instruct")
    return folder


def test_loss_and_gradients_are_stock_trls(qwen, tmp_path):
    found, streams = {}, 0
    for kind in (DPOTrainer, Stock):
        base = load_base(str(qwen), quantize="none", dtype="float32")
        pairs, _ = tokenize_pairs(base.tokenizer, read_pairs(str(PAIRS))[0][:2], max_length=128)
        trainer = build(kind, base.model, qwen, tmp_path, pairs=pairs)
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]]))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[kind] = loss.item(), gradients_of(trainer)
        streams += trainer.engine.forward.streams if kind is DPOTrainer else 0
    assert streams > 0
    assert found[DPOTrainer][0] == pytest.approx(found[Stock][0], rel=1e-5)
    assert_close(found[DPOTrainer][1], found[Stock][1], rtol=1e-4)


def test_it_trains_and_answers(qwen, tmp_path):
    output, lines = tmp_path / "adapter", PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in (("train", lines[:16]), ("eval", lines[16:24])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    recipe = check_recipe(
        {
            "model": {"name": str(qwen), "dtype": "float32"},
            "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")},
            "trainer": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "max_length": 128},
            "evaluation": {"answers": 0},
            "output": str(output),
        }
    )
    base = load_base(str(qwen), quantize="none", dtype="float32")
    [answer] = generate(base.model, base.tokenizer, [[{"role": "user", "content": "What is the capital of Italy?"}]])
    assert "Rome" in answer.text
    train(recipe)
    losses, margins = logged(output), logged(output, "rewards/margins")
    assert losses[1] > math.log(2)  # and what the sft term adds
    assert abs(margins[1]) < 1e-5
    assert all(math.isfinite(loss) for loss in losses.values())
    assert margins[max(margins)] > 0.1
