"""The adapter's model card and training curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_dpo.adapters.package import PICTURE
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.template_kwargs import as_words
from lora_dpo.config.trl_sft_kto import TITLES
from lora_dpo.model.packaged import is_hub_id
from lora_dpo.model.stored_form import held_text

if TYPE_CHECKING:
    from lora_dpo.adapters.passport import Passport


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
    tags = ["lora", recipe.method, *([] if recipe.method == "sft" else ["preference-tuning"]), "lora-dpo"]
    counts = ", ".join(_count(which, record) for which, record in passport.data.items())
    lines = [
        *front_matter(passport.base, tags),
        f"# {name}",
        "",
        f"A LoRA adapter for `{passport.base}`, {TITLES[recipe.method]} by lora-dpo on "
        f"{counts}. It is a small update: the base model is needed beside it.",
        "",
        *(_stopped_lines(passport.metrics["stopped"]) if "stopped" in passport.metrics else []),
        *([stopped, ""] if stopped else []),
        *(_comparison_lines(comparison) if comparison else []),
        PICTURE.decode().rstrip(),
        "",
        *(_answer_lines(samples) if samples else []),
        "## How it was made",
        "",
        "```",
        f"lora-dpo train {place}/recipe.yaml output={place}-again",
        "```",
        "",
        f"Reference: {passport.reference}. Base weights: {_base_line(passport)}. "
        f"{_template_line(passport)}All settings are in `recipe.yaml`, "
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
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")


def front_matter(base: str, tags: Sequence[str]) -> list[str]:
    """The lines of a card that the hub reads; it refuses a `base_model` that is no hub id, so that is left out."""
    front: dict[str, Any] = {"base_model": base} if is_hub_id(base) else {}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": list(tags)}
    return ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---"]


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


def _template_line(passport: Passport) -> str:
    given = passport.chat_template_kwargs
    return f"Chat template with {as_words(given)}: ask it with the same. " if given else ""


def _base_line(passport: Passport) -> str:
    bits = "4-bit " if passport.quantize == "nf4" else ""
    return f"{bits}{held_text(passport.quantize, passport.kept_share)}, computed in {passport.dtype}"


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]], *, beta: float, method: str = "dpo") -> None:
    """Plot what tells most about a method over the steps of `metrics.jsonl`: loss, margin, accuracy, log-ratios.

    TRL logs rewards β·h(y); the log-ratios h(y) in nats are these divided by β.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in trained]
    figure = Figure(figsize=(9, 6))
    FigureCanvasAgg(figure)
    # margins that hold every label: to compute them takes matplotlib as long as to draw
    places = figure.subplots(
        2, 2, gridspec_kw=dict(left=0.08, right=0.98, top=0.95, bottom=0.08, wspace=0.22, hspace=0.32)
    )
    for axes, (title, series) in zip(places.flat, _panels(method, beta), strict=True):
        for key, label, scale, colour in series:
            values = [row.get(key, float("nan")) * scale for row in trained]
            axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker="o", markersize=2.5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if "accuracy" in title:
            axes.set_ylim(-0.03, 1.03)
        if len(series) > 1:
            axes.axhline(0, color="#888888", linewidth=0.8)
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


Series = tuple[str, str, float, str]
"""TRL's name of a logged number, its label, what it is multiplied by, its colour."""


def _panels(method: str, beta: float) -> list[tuple[str, list[Series]]]:
    """Titles and series of the four panels."""

    def one(title: str, key: str) -> tuple[str, list[Series]]:
        return title, [(key, title, 1.0, "#335c81")]

    if method == "sft":
        return [
            one("loss (nats a token)", "loss"),
            one("token accuracy (batch)", "mean_token_accuracy"),
            one("entropy (nats a token)", "entropy"),
            one("gradient norm", "grad_norm"),
        ]
    ratios: list[Series] = [
        ("rewards/chosen", "chosen" if method == "dpo" else "good", 1 / beta, "#2f7d4f"),
        ("rewards/rejected", "rejected" if method == "dpo" else "bad", 1 / beta, "#b3432b"),
    ]
    third = ("reward accuracy (batch)", "rewards/accuracies") if method == "dpo" else ("KL estimate (nats)", "kl")
    return [
        one("loss", "loss"),
        one("reward margin", "rewards/margins"),
        one(*third),
        ("log-ratio to the reference (nats)", ratios),
    ]


def _count(which: str, record: Mapping[str, Any]) -> str:
    unit = "answers" if "answers" in record else "pairs"
    return f"{record[unit]} {which} {unit}"
