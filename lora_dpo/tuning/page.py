"""The page of a search: every candidate, the frontier, and what the chosen one is worth on data of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from lora_dpo.evaluation.report import parts, svg
from lora_dpo.tuning.result import TuneResult, remarks, reported_rows, side_by_side
from lora_dpo.tuning.score import frontier
from lora_dpo.tuning.space import value_text
from lora_dpo.tuning.trials import Trial, Trials, grouped_rows, trial_rows

DRAWN = 8
"""Curves in one plot: the best ones by score."""


def search_page(result: TuneResult, runs: Trials, prompts: Sequence[str]) -> str:
    """The whole page of a search that is over.

    Args:
        prompts: those that the report's answers are to.
    """
    kind = "good" if result.verdict == "better" else "warn"
    title = f"Search for {runs.folder.name.rpartition('.')[0]}"
    return parts.page(
        title,
        [
            parts.heading(title, f"on {runs.recipe.model.name}, {len(runs.done)} candidates"),
            parts.box(result.reason, kind),
            *(parts.paragraph(text) for text in remarks(result)),
            parts.section("What was chosen", parts.keys(_chosen(result))),
            parts.section(
                "On the part that nothing was chosen by" if prompts else "",
                parts.table(*_head_and_rows(reported_rows(result))) if result.reported else "",
                parts.paragraph(
                    "Intervals of 95%, over prompts. The score is quality less what it cost: answers that do not end, "
                    "repetition, known answers lost, and without a judge a length far from the chosen answers'. "
                    "lora-dpo docs tune says how."
                ),
            ),
            parts.section("Every candidate", parts.plots(_plane(runs, result.chosen), *curves(runs)), _table(runs)),
            parts.section(
                "The same prompts, spread over the part and not picked",
                parts.answers(("prompt", "base", "chosen"), side_by_side(result, prompts)) if result.reported else "",
            ),
            parts.section("What the search cost", parts.keys(_cost(result, runs))),
        ],
    )


def sweep_page(runs: Trials) -> str:
    """The whole page of a sweep."""
    name = runs.folder.name.rpartition(".")[0]
    return parts.page(
        f"Sweep {name}",
        [
            parts.heading(f"Sweep {name}", f"on {runs.recipe.model.name}, {len(runs.done)} runs"),
            parts.section(
                "By combination",
                parts.table(*_head_and_rows(grouped_rows(runs))),
                parts.paragraph(
                    "Means over seeds, ± half of their 95% interval (Student's t) where there are several. Measured on "
                    f"{len(runs.part.prompts)} held-out prompts; the best of many combinations looks better there than "
                    "it is."
                ),
            ),
            parts.section("Every run", parts.plots(_plane(runs, None), *curves(runs)), _table(runs)),
        ],
    )


def _head_and_rows(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return rows[0], list(rows[1:])


def _chosen(result: TuneResult) -> list[tuple[str, str]]:
    if result.chosen is None:
        return []
    rows = [("candidate", str(result.chosen.number))]
    rows += [(key, value_text(value)) for key, value in result.chosen.values.items()]
    if result.adapter is not None:
        rows.append(("adapter", str(result.adapter)))
    learned = result.chosen.learned
    if learned is not None:
        text = f"{learned.value:.0%} ({learned.low:.0%} to {learned.high:.0%}) of {learned.n} training prompts"
        rows.append(("ranked right at first sight", text))
    return rows


def _plane(runs: Trials, best: Trial | None) -> str:
    kinds = ("candidates", "the recipe as given", "chosen") if best is not None else ()
    dots, points = [], {}
    for trial in runs.done:
        found = runs.score_of(trial)
        if found is None or trial.measured is None:
            continue
        kind = 0 if best is None else 2 if trial.number == best.number else 1 if trial.number == 0 else 0
        high = found.quality.high - found.cost
        dots.append(svg.Dot(str(trial.number), trial.measured.kl, found.value, found.low, high, kind))
        points[trial.number] = (trial.measured.kl, found.value)
    line = [points[number] for number in frontier(points)]
    return svg.plane(dots, title="score of each candidate, by KL", unit="KL, nats a token", kinds=kinds, frontier=line)


def curves(runs: Trials) -> Iterator[str]:
    """Training curves of the best candidates, and of those that were ended early."""
    best = sorted(runs.done, key=lambda trial: -(found.low if (found := runs.score_of(trial)) else -9.0))[:DRAWN]
    shown = sorted(best, key=lambda trial: trial.number)
    for name, title in (("rewards/margins", "reward margin"), ("rewards/accuracies", "reward accuracy, 5 steps' mean")):
        series = [
            svg.Series(str(trial.number), trial.curves["step"], _smooth(trial, name)) for trial in shown if trial.curves
        ]
        yield svg.lines(series, title=title)


def _smooth(trial: Trial, name: str) -> list[float]:
    """Accuracies of batches of four pairs jump between five values: a mean over five steps shows where they go."""
    values = trial.curves[name]
    if not name.endswith("accuracies"):
        return list(values)
    return [fmean(values[max(0, index - 4) : index + 1]) for index in range(len(values))]


def _table(runs: Trials) -> str:
    head, rows = _head_and_rows(trial_rows(runs))
    return parts.table(head, rows)


def _cost(result: TuneResult, runs: Trials) -> list[tuple[str, str]]:
    ended = [trial for trial in runs.done if trial.ended]
    steps, planned = sum(trial.steps for trial in runs.done), sum(trial.planned for trial in runs.done)
    rows = [
        ("candidates", f"{len(runs.done)}, {len(ended)} of them ended early"),
        ("steps", f"{steps} of the {planned} that all of them would have had"),
        ("time in trials", f"{sum(trial.seconds for trial in runs.done) / 60:.1f} minutes"),
        ("of that measuring", f"{sum(trial.measuring for trial in runs.done) / 60:.1f} minutes"),
    ]
    if runs.part.judge is not None and (cost := runs.part.judge.cost()):
        rows.append(("judge", cost))
    return rows
