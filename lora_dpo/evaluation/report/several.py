"""One page about several runs or evaluations: what differs in their settings, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_dpo.adapters.stored_run import StoredRun, number
from lora_dpo.adapters.stored_schema import NAMES
from lora_dpo.evaluation.report import parts, svg
from lora_dpo.evaluation.report.one_evaluation import is_known
from lora_dpo.evaluation.report.one_run import ANSWERS, PAIRS
from lora_dpo.evaluation.report.side_rows import differences, group_cells, group_rows, run_rows

__all__ = ["comparison_page", "differences", "named_apart"]


def comparison_page(runs: Sequence[StoredRun], evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The whole page; either list may be empty."""
    runs, evaluations = named_apart(runs, evaluations)
    names = [run.name for run in runs] + [name for name, _ in evaluations]
    return parts.page(
        "Comparison",
        [
            parts.heading(f"{len(names)} side by side", ", ".join(names)),
            parts.section("What differs", parts.table(("setting", *(run.name for run in runs)), differences(runs))),
            parts.section("Results on held-out data", parts.table(("run", *_columns()), _results(runs))),
            parts.section("Over seeds", *_seeds(runs)),
            parts.section("Health", *_health(runs)),
            parts.section("Training", parts.plots(*_curves(runs))),
            parts.section("Evaluations", *_evaluations(evaluations)),
            parts.section("The same prompts", *_answers(runs, evaluations)),
        ],
    )


def named_apart(
    runs: Sequence[StoredRun], evaluations: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[list[StoredRun], list[tuple[str, Mapping[str, Any]]]]:
    """The same, each with a name of its own: an evaluation is kept under its adapter's name."""
    taken: set[str] = set()

    def free(name: str, kind: str = "") -> str:
        names = [name, *([f"{name} ({kind})"] if kind else []), *(f"{name} ({number})" for number in range(2, 1000))]
        found = next(one for one in names if one not in taken)
        taken.add(found)
        return found

    return (
        [replace(run, name=free(run.name)) for run in runs],
        [(free(name, "evaluation"), one) for name, one in evaluations],
    )


def _columns() -> list[str]:
    return [label for _, label, _ in (*PAIRS, *ANSWERS)]


def _results(runs: Sequence[StoredRun]) -> list[tuple[str, ...]]:
    rows = []
    several = len({run.beta for run in runs}) > 1
    for run in runs:
        cells = []
        for kind, known in (("pairs", PAIRS), ("answers", ANSWERS)):
            metrics = run.metrics("after", kind)
            for key, _, form in known:
                note = _at(run.beta) if several and key == "margin" else ""
                cells.append(form.format(metrics[key]) + note if metrics.get(key) is not None else "")
        rows.append((run.name, *cells))
    return rows


def _seeds(runs: Sequence[StoredRun]) -> list[str]:
    groups = group_rows(runs, run_rows(runs))
    if not groups:
        return []
    return [
        parts.table(("runs", *_columns()), [(str(row["name"]), *group_cells(row)) for row in groups]),
        parts.paragraph(
            "Runs whose settings differ in nothing but their seeds: means, ± half of their 95% interval (Student's t)."
        ),
    ]


def _at(beta: float) -> str:
    """Margins of other β are no like quantities; that of SFT is in nats, with a β of 1."""
    return f" at β {beta:g}"


def _health(runs: Sequence[StoredRun]) -> list[str]:
    found = [(run.name, run.unfinished or (run.measured.get("health") or {}).get("sentence")) for run in runs]
    return [parts.box(f"{name}: {sentence}", "warn") for name, sentence in found if sentence]


def _curves(runs: Sequence[StoredRun]) -> list[str]:
    def of(key: str, by_beta: bool = False) -> list[svg.Series]:
        return [
            svg.Series(
                run.name,
                [row["step"] for row in run.trained],
                [number(row, key, 1 / run.beta if by_beta else 1.0) for row in run.trained],
            )
            for run in runs
        ]

    return [
        svg.lines(of("loss"), title="loss"),
        svg.lines(of("rewards/margins"), title="reward margin", level=0.0),
        svg.lines(of("rewards/accuracies"), title="reward accuracy (batch)", level=0.5),
        svg.lines(of("rewards/chosen", by_beta=True), title="chosen log-ratio (nats)", level=0.0),
        svg.lines(of("rewards/rejected", by_beta=True), title="rejected log-ratio (nats)", level=0.0),
    ]


def _evaluations(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    if not evaluations:
        return []
    names = [name for name in NAMES if any(name in one["numbers"] for _, one in evaluations)]
    several = len({one["beta"] for _, one in evaluations}) > 1
    rows = [
        (
            NAMES[name],
            *(
                _interval(one["numbers"].get(name))
                + (_at(one["beta"]) if several and name == "margin" and name in one["numbers"] else "")
                for _, one in evaluations
            ),
        )
        for name in names
    ]
    head = ("", *(name for name, _ in evaluations))
    figures = []
    for key in ("win-rate", "win-rate-lc", "accuracy", "kl"):
        points = [
            (name, one["numbers"][key]["value"], one["numbers"][key]["low"], one["numbers"][key]["high"])
            for name, one in evaluations
            if key in one["numbers"] and is_known(one["numbers"][key])
        ]
        figures.append(svg.intervals(points, title=NAMES[key], level=None if key == "kl" else 0.5))
    verdicts = [parts.paragraph(f"{name}: {one['verdict']}") for name, one in evaluations]
    warnings = [parts.box(f"{name}: {text}", "warn") for name, one in evaluations for text in one.get("warnings", ())]
    return [*verdicts, *warnings, parts.table(head, rows), parts.plots(*figures)]


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if not is_known(found):
        return "not known" if found["value"] is None else f"{found['value']:.3g}"
    return f"{found['value']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


Column = tuple[str, Mapping[str, str]]
"""A name, and its answer to each prompt."""


def _answers(runs: Sequence[StoredRun], evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Prompts that all of them answered, with each one's answer; else those of the runs and of the evaluations."""
    of_runs: list[Column] = []
    for run in runs:
        rows = run.measured.get("answers", [])
        if rows and not of_runs:
            of_runs.append(("before", {row["prompt"]: row["before"]["text"] for row in rows}))
        of_runs.append((run.name, {row["prompt"]: row["after"]["text"] for row in rows}))
    of_evaluations: list[Column] = [
        (name, {row["prompt"]: row["adapter"] for row in one["rows"]}) for name, one in evaluations
    ]
    together = _side_by_side([*of_runs, *of_evaluations])
    if together:
        yield together
        return
    apart = [_side_by_side(columns) for columns in (of_runs, of_evaluations)]
    yield from apart
    if sum(bool(answers) for _, answers in (*of_runs, *of_evaluations)) > 1:
        yield parts.paragraph("No prompt was answered by all of them.")


def _side_by_side(columns: Sequence[Column]) -> str:
    """The prompts that all columns with answers have; nothing of fewer than two."""
    columns = [column for column in columns if column[1]]
    if len(columns) < 2:
        return ""
    shared = [prompt for prompt in columns[0][1] if all(prompt in answers for _, answers in columns)]
    rows = [[prompt, *(answers[prompt] for _, answers in columns)] for prompt in shared]
    return parts.answers(["prompt", *(name for name, _ in columns)], rows)
