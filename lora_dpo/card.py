"""The adapter's model card and training curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_dpo.config import Recipe

if TYPE_CHECKING:
    from lora_dpo.adapters import Passport


def write_card(
    path: Path,
    recipe: Recipe,
    passport: Passport,
    comparison: Sequence[tuple[str, str, str]],
    samples: Sequence[tuple[str, str, str]],
    *,
    stopped: str | None = None,
) -> None:
    """Write `README.md`: what the adapter is, what was measured, and the command that made it.

    Args:
        stopped: one sentence, if the run's guard ended it or chose an earlier step.
    """
    place = recipe.output or str(path.parent)
    name = Path(place).name
    front = {
        "base_model": passport.base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "dpo", "preference-tuning", "lora-dpo"],
    }
    counts = ", ".join(f"{record['pairs']} {which} pairs" for which, record in passport.data.items())
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {name}",
        "",
        f"A LoRA adapter for `{passport.base}`, preference-tuned with Direct Preference Optimization by lora-dpo on "
        f"{counts}. It is a small update: the base model is needed beside it.",
        "",
        *(_stopped_lines(passport.metrics["stopped"]) if "stopped" in passport.metrics else []),
        *([stopped, ""] if stopped else []),
        *(_comparison_lines(comparison) if comparison else []),
        "![training curves](curves.png)",
        "",
        *(_answer_lines(samples) if samples else []),
        "## How it was made",
        "",
        "```",
        f"lora-dpo train {place}/recipe.yaml output={place}-again",
        "```",
        "",
        f"Reference: {passport.reference}. Base weights: {_base_line(passport)}. All settings are in `recipe.yaml`, "
        "each logged step in `metrics.jsonl`, hashes and versions in `passport.json`.",
        "",
        "## How to use it",
        "",
        "```",
        f"lora-dpo chat {place}",
        f"lora-dpo merge {place} --output {name}-merged",
        "```",
        "",
        "or with plain `peft`: `PeftModel.from_pretrained(base_model, folder)`.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _stopped_lines(stopped: Mapping[str, int]) -> list[str]:
    return [f"Training was stopped by hand after step {stopped['step']} of {stopped['of']}, and kept as it was.", ""]


def _comparison_lines(comparison: Sequence[tuple[str, str, str]]) -> list[str]:
    return [
        "## What changed on held-out data",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {label} | {before} | {after} |" for label, before, after in comparison),
        "",
        "Reward accuracy counts the held-out pairs in which the adapter raised the chosen answer more than the "
        "rejected one, against the reference; a tie counts half. Answers are greedy.",
        "",
    ]


def _answer_lines(samples: Sequence[tuple[str, str, str]]) -> list[str]:
    return [
        "## Answers before and after",
        "",
        "Evenly spaced over the held-out prompts, not picked.",
        "",
        *(line for sample in samples for line in _sample_lines(*sample)),
    ]


def _sample_lines(prompt: str, before: str, after: str) -> list[str]:
    return [_fence(prompt), "", "before", "", _fence(before), "", "after", "", _fence(after), "", "---", ""]


def _fence(text: str) -> str:
    """A code block that no answer can break out of."""
    ticks = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


def _base_line(passport: Passport) -> str:
    if passport.quantize == "none":
        return f"as stored, computed in {passport.dtype}"
    return f"4-bit NF4 with double quantisation, computed in {passport.dtype}"


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]], *, beta: float) -> None:
    """Plot loss, margin, reward accuracy and both log-ratios over the steps of `metrics.jsonl`.

    TRL logs rewards β·h(y); the log-ratios h(y) in nats are these divided by β.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in trained]
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, margin, accuracy, ratios = figure.subplots(2, 2).flat
    panels = (
        (loss, "loss", [("loss", "loss", 1.0, "#335c81")]),
        (margin, "reward margin", [("rewards/margins", "margin", 1.0, "#335c81")]),
        (accuracy, "reward accuracy (batch)", [("rewards/accuracies", "accuracy", 1.0, "#335c81")]),
        (
            ratios,
            "log-ratio to the reference (nats)",
            [("rewards/chosen", "chosen", 1 / beta, "#2f7d4f"), ("rewards/rejected", "rejected", 1 / beta, "#b3432b")],
        ),
    )
    for axes, title, series in panels:
        for key, label, scale, colour in series:
            values = [row.get(key, float("nan")) * scale for row in trained]
            axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker="o", markersize=2.5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.set_ylim(-0.03, 1.03)
    ratios.axhline(0, color="#888888", linewidth=0.8)
    ratios.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
