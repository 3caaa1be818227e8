"""The scripts of benchmarks/ run to their end, and what they count is as it must be."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, no part of the package
import bench  # noqa: E402
import gpu  # noqa: E402


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


@pytest.mark.slow
def test_the_gpu_script_runs_on_whatever_is_there(tiny_model_folder, tmp_path, monkeypatch):
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8)
    monkeypatch.setitem(gpu.SIZES, "1b", small)
    monkeypatch.setattr(gpu, "fetch_model", lambda name: tiny_model_folder)
    monkeypatch.setattr(bench, "bases", bench.bases)  # the script puts its own there
    out = tmp_path / "gpu.json"
    command = ["gpu.py", "--shape", "hh", "--pairs", "2", "--batch", "2", "--rounds", "1", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main("cpu")
    [found] = json.loads(out.read_text())
    assert found["quantize"] == "nf4"
    assert len(found["variants"]) == 4
