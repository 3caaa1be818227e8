"""The scripts of benchmarks/ run to their end, and what they count is as it must be."""

import json
import sys
from pathlib import Path

import kinds
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # scripts, no part of the package
import bench  # noqa: E402
import swapped_labels  # noqa: E402

from benchmarks.gpu_check import __main__ as gpu_check  # noqa: E402
from benchmarks.gpu_check import cards as gpu_cards  # noqa: E402
from benchmarks.gpu_check import common as gpu_common  # noqa: E402
from benchmarks.gpu_check import equal as gpu_equal  # noqa: E402


@pytest.fixture
def measured(tiny_model_folder, write_pairs, tmp_path, monkeypatch):
    """Runs bench.py with more arguments; returns its results by the variant's name."""

    def run(*more):
        out = tmp_path / "results.json"
        command = ["bench.py", "--data", str(write_pairs(count=6)), "--model", str(tiny_model_folder), "--batch", "3"]
        monkeypatch.setattr(sys, "argv", [*command, "--output", str(out), *more])
        bench.main()
        [found] = json.loads(out.read_text())
        return found, {variant["name"].partition(":")[0]: variant for variant in found["variants"]}

    return run


def test_models_are_measured_as_training_runs_them(tiny_model_folder):
    """Prepared by accelerate, which puts autocast around their forward pass: without it a card computes in float32."""
    rows = bench.draw(bench.SHAPES["hh"], 2, vocabulary=250)
    model = bench.build(bench.Stock, lambda: bench.load_base(str(tiny_model_folder), quantize="none"), rows, None, 2)
    assert any(each is model.model for each in model.accelerator._models)
    base = gpu_common.random_base(gpu_common.SIZES["tiny"], "cpu")
    model = gpu_common.trainer_of(gpu_common.stock_trainer(), base, rows, 2, "cpu")
    assert any(each is model.model for each in model.accelerator._models)


@pytest.mark.slow
def test_ours_beside_stock_trl(measured):
    found, rows = measured("--tuned-batch", "1", "--top", "1")
    assert found["versions"]["trl"]
    assert found["pairs"] == 6
    stock, tuned = rows["TRL as it comes"], rows["TRL tuned"]
    first, known = rows["ours, first epoch"], rows["ours, references known"]
    assert stock["tokens"] >= tuned["tokens"] > first["tokens"] == known["tokens"]
    assert first["flops"] > known["flops"] > found["floor_flops"]
    assert 0 < known["kept"] < stock["kept"]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows.values())
    assert rows["ours, top 1 layers, trunk known"]["flops"] < known["flops"]


@pytest.mark.slow
def test_each_part_of_the_engine_switched_off(measured):
    _, rows = measured("--ablate")
    assert len(rows) == 8
    whole = rows.pop("whole engine")
    assert rows["without sharing prefixes"]["tokens"] > whole["tokens"]
    assert rows["every layer checkpointed"]["flops"] > whole["flops"]
    # (of TRL's head the counter misses the products that are written into a buffer)
    assert rows["the two branches of a pair apart"]["flops"] > 1.3 * whole["flops"]
    assert rows["without rematerialising"]["kept"] > whole["kept"]


@pytest.fixture
def check(tmp_path):
    """Rehearses parts of the check of a GPU on the CPU; returns how it ended and what it noted."""

    def run(*words):
        code = gpu_check.main([*words, "--device", "cpu", "--output", str(tmp_path)])
        return code, json.loads((tmp_path / "gpu-cpu-rehearsal.json").read_text())

    return run


def test_the_check_of_a_gpu_rehearses_what_is_equal(check):
    code, found = check("equal", "--kind", "llama", "--kind", "gemma2")
    assert code == 0
    for kind in ("llama", "gemma2"):
        assert found[f"equal fp32 {kind}"]["gradient"] < 1e-5
        assert found[f"equal stream {kind}"]["ok"]
    assert 0.5 < found["equal NF4"]["ours / TRL"] < gpu_equal.WORSE
    assert found["equal"]["not ok"] == []
    assert found["machine"]["device"].startswith("a rehearsal")


def test_the_check_of_a_gpu_says_what_is_not_equal(tmp_path, monkeypatch, capsys):
    notes = gpu_common.Notes(tmp_path / "found.json")
    here = gpu_common.Check(gpu_check.read_options(["equal", "--device", "cpu"]), notes)
    gpu_equal.against_plain(here, kinds, "llama")
    assert notes.failed == []
    monkeypatch.setattr("lora_dpo.engine.pair_forward.logit_scale", lambda model: 1.01)
    gpu_equal.against_plain(here, kinds, "llama")
    assert "NOT OK: stream llama" in capsys.readouterr().out
    assert not json.loads(notes.path.read_text())["equal stream llama"]["ok"]


def test_the_check_of_a_gpu_rehearses_memory_cards_and_answers(check):
    assert check("memory", "--length", "64")[0] == 0
    assert check("cards", "--cards", "8")[0] == 0
    code, found = check("decode")
    assert code == 0
    assert found["memory tiny 64 ours 3"]["planned"] > 0
    assert found["cards tiny 8 GB"]["parts"] >= 1
    assert found["decode tiny adapter 32 drawn"] > 0


@pytest.mark.slow
def test_the_check_of_a_gpu_rehearses_its_speed(check):
    code, found = check("speed", "--shape", "hh", "--pairs", "4", "--batch", "2")
    assert code == 0
    assert {"TRL as it comes", "TRL tuned", "ours, first epoch", "ours, references known"} < set(found["speed tiny hh"])


def test_a_card_that_is_too_small_is_told_with_the_place(check, monkeypatch):
    def no_memory(*nothing):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gpu_cards, "random_base", no_memory)
    code, found = check("cards", "--cards", "8")
    assert code == 1
    assert found["cards tiny 8 GB"]["at"][0].endswith("no_memory")


def test_without_a_card_the_check_says_how_to_rehearse_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make gpu-check DEVICE=cpu"):
        gpu_check.main(["equal"])


@pytest.mark.parametrize(("words", "left_on"), [([], False), (["--cudnn"], True)])
def test_the_check_of_a_gpu_switches_cudnns_attention_off(words, left_on, tmp_path, monkeypatch):
    """It makes a plan for each new length, and the lengths of streams are new in every step."""
    seen = []
    for name, value in (("is_available", True), ("mem_get_info", (8 << 30, 8 << 30)), ("get_device_name", "A card")):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    monkeypatch.setattr(gpu_check, "machine", lambda options: {})
    monkeypatch.setattr(gpu_equal, "run", lambda check: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert gpu_check.main(["equal", *words, "--output", str(tmp_path)]) == 0
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [left_on]


def test_the_check_of_a_gpu_goes_on_after_a_part_that_failed(tmp_path, monkeypatch, capsys):
    asked = []

    def never(words, seconds, say, *, segments):
        asked.append((words[0], segments))
        say("a line\n")
        return 1 if words[0] == "memory" else 0

    monkeypatch.setattr(gpu_check, "run_words", never)
    assert gpu_check.main(["all", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert [part for part, _ in asked] == ["equal", "memory", "cards", "cards", "speed", "speed", "decode"]
    assert [segments for _, segments in asked] == [True, True, True, False, True, True, True]
    log = (tmp_path / "gpu-cpu-rehearsal.log").read_text()
    assert log.count("a line\n") == 7
    assert "not ok: memory" in log
    assert "not ok: memory" in capsys.readouterr().out


def test_names_of_results_and_sizes_by_card():
    assert gpu_common.file_name("NVIDIA GeForce RTX 4090") == "gpu-nvidia-geforce-rtx-4090"
    assert [gpu_check.usual_size(gigabytes << 30) for gigabytes in (8, 12, 23)] == ["1b", "3b", "8b"]


@pytest.mark.slow
def test_swapped_labels_are_counted_among_the_most_suspicious(tiny_model_folder, write_pairs, tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    command = ["swapped_labels.py", "--data", str(write_pairs(count=40)), "--model", str(tiny_model_folder)]
    monkeypatch.setattr(sys, "argv", [*command, "--pairs", "30", "--passes", "2", "--output", str(out)])
    swapped_labels.main()
    found = json.loads(out.read_text())
    [run] = found["runs"]
    assert (run["pairs"], run["looked_at"], run["swapped"], run["without_margin"]) == (30, 6, 3, 0)
    assert found["in_the_first_fifth"]["length"]["value"] == 1.0  # the rejected answers of these are much longer
    assert found["in_the_first_fifth"]["mean"]["n"] == 3


def test_the_wheels_of_the_check_have_tested_versions():
    """docs/gpu.md: a machine without a network gets them by these names, in the versions of constraints.txt."""

    def names(path):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        return {line.partition("==")[0].lower().replace("_", "-") for line in lines if line and line[0] != "#"}

    wheels = names("benchmarks/gpu_check/wheels.txt")
    assert {"trl", "peft", "transformers", "bitsandbytes"} <= wheels
    assert wheels <= names("constraints.txt")
    assert f"{len(wheels)}\nwheels" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
