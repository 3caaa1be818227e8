"""What a preset computes, and how long that takes at the speed of a study that was run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .presets import HERE, JUDGED, PRESETS, Preset

UNITS = {
    "answers sampled": "sample",
    "answers measured": "eval",
    "answers put in order by DPO's implicit reward": "agree",
    "DPO steps of 8 pairs": "dpo",
    "SFT steps of 8 answers": "sft",
    "PPO answers (sampled, scored, trained on)": "ppo",
}


def units(name: str, preset: Preset) -> tuple[str, int]:
    """Kind of a piece, and how much of it there is."""
    answers = preset.train_prompts * preset.samples
    if name.startswith("eval-"):
        return "eval", 2 * preset.test_prompts * preset.test_answers
    if name.startswith("agree-"):
        return "agree", 2 * preset.test_prompts * min(JUDGED, preset.base_answers)
    if name == "test-base":
        return "sample", 2 * preset.test_prompts * preset.base_answers
    if name in ("pool", "hot"):
        return "sample", answers
    if name.startswith("pool-round2"):
        return "sample", answers // 2
    kind = name.partition("-")[0]
    if kind == "ppo":
        return kind, answers
    if name.endswith("-twice"):
        return kind, 2 * preset.dpo_steps
    return kind, preset.dpo_steps // 2 if "round" in name else preset.dpo_steps


def speeds(results: dict[str, Any]) -> dict[str, float]:
    """Seconds a unit of each kind, from the costs in a file of results."""
    preset = PRESETS[results["preset"]["name"]]
    seconds: dict[str, float] = {}
    done: dict[str, int] = {}
    for name, piece in results["pieces"].items():
        kind, count = units(name, preset)
        seconds[kind] = seconds.get(kind, 0.0) + piece["cost"]["seconds"]
        done[kind] = done.get(kind, 0) + count
    return {kind: seconds[kind] / done[kind] for kind in seconds}


def plan_lines(preset: Preset, names: Sequence[str], folder: Path) -> Iterator[str]:
    """A table of what a preset computes, with times at the speed of the published study."""
    measured = HERE / "results" / "full.json"
    known = json.loads(measured.read_text(encoding="utf-8"))
    speed = speeds(known)
    total: dict[str, int] = {}
    for name in names:
        kind, count = units(name, preset)
        total[kind] = total.get(kind, 0) + count
    yield f"{preset.name}: {len(names)} pieces, {sum((folder / f'{name}.json').is_file() for name in names)} done"
    for what, kind in UNITS.items():
        yield f"  {total[kind]:6d} {what:<46}{total[kind] * speed[kind] / 60:6.1f} min"
    whole = sum(total[kind] * speed[kind] for kind in total) / 60
    threads = known["machine"]["threads"]
    yield f"  {whole:.0f} minutes in all, at the speed of results/{measured.name} (threads: {threads})"
