"""The adapter that comes with the repository works: load, verify, chat, merge, export, with the real 135M model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama_cpp import llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo.adapters.describe import describe
from lora_dpo.adapters.store import list_adapters
from lora_dpo.cli.commands import main
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.model.packaged import fetch_model
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.merge_fidelity import fidelity
from lora_dpo.release.merged_folder import merge

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "adapters" / "quickstart"


def test_the_repository_has_its_adapter_and_it_is_small():
    assert (ADAPTER / "adapter_config.json").is_file(), "adapters/quickstart is missing: it comes with the repository"
    size = sum(path.stat().st_size for path in ADAPTER.iterdir())
    assert size < 6_000_000
    [row] = [row for row in list_adapters(ROOT / "adapters") if row.name == "quickstart"]
    assert not row.state.startswith("broken")
    assert row.base == "smollm2-135m"
    assert row.accuracy > 0.8
    assert (ADAPTER / "README.md").is_file()
    assert dict(describe(ADAPTER))["base licence"].startswith("Apache")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    model = fetch_model("smollm2-135m", output=ROOT / "models" / "smollm2-135m")  # instant when it is there
    for name, place in (("models/smollm2-135m", model), ("adapters/quickstart", ADAPTER)):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(place.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def merged(workplace):
    """The live adapter as plain transformers computes it: merged into what it was trained on."""
    return merge("adapters/quickstart", workplace / "merged", into="trained-base", dtype="float32")


def prompts(count):
    lines = (ROOT / "data" / "quickstart-eval.jsonl").read_text(encoding="utf-8").splitlines()
    found = list(dict.fromkeys(json.dumps(json.loads(line)["prompt"]) for line in lines))
    return [json.loads(found[index * len(found) // count]) for index in range(count)]


@pytest.mark.slow
def test_it_scores_what_it_scored_when_it_was_made(workplace):
    found = verify("adapters/quickstart")
    assert found.ok, found
    assert found.pairs == 8


@pytest.mark.slow
def test_it_chats(workplace, capsys):
    question = "What is the capital of Portugal?"
    assert main(["chat", "adapters/quickstart", "--prompt", question, "--max-new-tokens", "24", "--strict"]) == 0
    assert "Lisbon" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "limit", "pairs"),
    [
        pytest.param(
            *("bfloat16", 0.01, ROOT / "data" / "quickstart-eval.jsonl"),
            id="bfloat16, all held-out pairs",
            marks=pytest.mark.long,
        ),
        pytest.param("float32", 1e-4, None, id="float32, the pairs that it carries"),
    ],
)
def test_merging_into_the_trained_base_keeps_its_log_probabilities(workplace, dtype, limit, pairs, tmp_path):
    folder = merge("adapters/quickstart", tmp_path / "merged", into="trained-base", dtype=dtype)
    [found] = fidelity("adapters/quickstart", {"trained-base": folder}, pairs=pairs)
    print(f"{dtype}: {found}")
    assert found.mean_delta <= limit
    assert found.top1 > 0.98


MEASURE = """
import threading, time
from lora_dpo.release.merged_folder import merge
from lora_dpo.release.merged_weights import plan_merge, predict_bytes
from transformers import AutoTokenizer

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

plan = plan_merge(Path("adapters/quickstart"), into="trained-base")
AutoTokenizer.from_pretrained(plan.path)
predicted = predict_bytes(plan.shapes, {name for name in plan.shapes if "_proj" in name}, itemsize=2, shard=SHARD)
before, peak, done = private(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
merge("adapters/quickstart", OUTPUT, into="trained-base", shard=SHARD)
done = True
watcher.join()
print(peak - before, predicted)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
def test_a_merge_takes_the_memory_that_was_predicted_and_not_the_models(workplace, tmp_path):
    """135M weights are 540 MB in float32, 270 MB in bf16."""
    script = f"from pathlib import Path\nSHARD, OUTPUT = {16 << 20}, {str(tmp_path / 'merged')!r}\n{MEASURE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    taken, predicted = map(int, done.stdout.split()[-2:])
    print(f"taken {taken / 1e6:.0f} MB, predicted {predicted / 1e6:.0f} MB")
    assert taken < predicted + 40e6  # Python's own churn
    assert taken < 270e6


def greedy(model, ids, stop):
    """Up to 48 tokens, without the one that ends the turn: llama.cpp does not report that one."""
    found = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :].tolist()
    return found[:-1] if found[-1] == stop else found


@pytest.fixture(scope="module")
def wanted(merged):
    """Tokenizer, ten prompts with transformers' greedy answers, and a text with its likeliest next tokens."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts(10)]
    text = tokenizer((ROOT / "LICENSE").read_text(encoding="utf-8"))["input_ids"][:400]
    with torch.no_grad():
        following = model(input_ids=torch.tensor([text])).logits[0].argmax(-1).tolist()
        answers = [greedy(model, ids, tokenizer.eos_token_id) for ids in asked]
    return tokenizer, asked, answers, text, following


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "alike", "agreement"),
    [
        ("adapter on its base in f16", 8, 0.95),
        pytest.param("merged f16", 8, 0.95, marks=pytest.mark.long),
        pytest.param("merged q8_0", 0, 0.9, marks=pytest.mark.long),
    ],
)
def test_llama_cpp_answers_as_transformers_does(workplace, wanted, form, alike, agreement, tmp_path):
    """In q8_0 llama.cpp rounds activations to 8 bits too: long answers of so small a model part ways, and are shown."""
    tokenizer, asked, ours, text, following = wanted
    lora = None
    if form.startswith("merged"):
        gguf = export("adapters/quickstart", tmp_path / "merged.gguf", to="gguf", kind=form.split()[1])
    else:
        gguf = export("smollm2-135m", tmp_path / "base.gguf", to="gguf", kind="f16", into="trained-base")
        lora = export("adapters/quickstart", tmp_path / "lora.gguf", to="gguf-adapter")
    tasks = [{"tokens": ids, "generate": 48} for ids in asked]
    tasks += [{"tokens": text, "next": True}, {"tokenize": tokenizer.decode(asked[0])}]
    *theirs, next_tokens, read = llama_cpp(gguf, tasks, lora=lora)
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    top1 = sum(mine == other for mine, other in zip(following, next_tokens, strict=True)) / len(text)
    print(f"{form}: {same} of {len(asked)} greedy answers alike, next-token top-1 {top1:.2%} of {len(text)}")
    for mine, other in zip(ours, theirs, strict=True):
        if mine != other:
            print(f"  transformers {tokenizer.decode(mine)!r}\n  llama.cpp    {tokenizer.decode(other)!r}")
    assert read == asked[0]
    assert same >= alike
    assert top1 >= agreement
