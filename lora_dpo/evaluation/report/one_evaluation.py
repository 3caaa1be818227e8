"""The page of one evaluation, from what its `eval.json` holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from lora_dpo.adapters.stored_schema import NAMES
from lora_dpo.evaluation.report import parts, svg

Stored = Mapping[str, Any]

AGAINST_CHANCE = ("accuracy", "accuracy-lc", "learned", "win-rate", "win-rate-lc")
OF_ANSWERS = ("finished", "refusals")
SHORT = {
    "accuracy-lc": "accuracy, no length",
    "learned": "accuracy at first sight",
    "win-rate-lc": "win rate, no length",
    "finished": "end by themselves",
}
"""Names that fit beside a plot."""
OF_BOTH = {"length": "tokens", "finished": "finished", "repetition": "repetition", "refusals": "refusals"}


def number_rows(stored: Stored) -> list[tuple[str, str, str, str]]:
    """Rows `(name, value, interval, from)`; the other model's value stands beside the adapter's."""
    other = stored["answers"].get(stored["against"], {})
    rows = []
    for name, interval in stored["numbers"].items():
        value = _number(name, interval["value"])
        if name in OF_BOTH and other.get(OF_BOTH[name]):
            value += f" ({stored['against']} {_number(name, other[OF_BOTH[name]]['value'])})"
        ends = "not known"
        if is_known(interval):
            ends = f"{_number(name, interval['low'])} to {_number(name, interval['high'])}"
        rows.append((NAMES[name], value, ends, str(interval["n"])))
    return rows


def evaluation_page(stored: Stored) -> str:
    """The whole page."""
    kind = {"better": "good", "worse": "bad"}.get(stored["called"], "warn")
    return parts.page(
        f"Evaluation of {stored['adapter']}",
        [
            parts.heading(f"Evaluation of {stored['adapter']}", _under(stored)),
            parts.box(stored["verdict"], kind),
            *(parts.box(text, "warn") for text in stored.get("warnings", ())),
            *(parts.paragraph(text) for text in remarks(stored)),
            parts.section(
                "Numbers", parts.table(("", "value", "95% interval", "from"), number_rows(stored)), _explained(stored)
            ),
            parts.section("At a glance", parts.plots(*_shares(stored), log_ratios(stored["pairs"]["log_ratios"]))),
            parts.section(
                "The same prompts, answered by both",
                parts.answers(
                    ("prompt", stored["against"], "adapter"),
                    [(row["prompt"], row["against"], row["adapter"]) for row in stored["rows"]],
                ),
            ),
            parts.section("How it was measured", parts.keys(_how(stored))),
        ],
    )


def remarks(stored: Stored) -> Iterator[str]:
    """What the numbers mean together, in words."""
    numbers = stored["numbers"]
    contest = stored["contest"]
    if contest:
        counts = f"{contest['wins']} won, {contest['ties']} tied, {contest['losses']} lost by {contest['judge']}"
        if contest.get("votes"):
            yield f"{counts}: prompts, from {contest['votes']} votes."
        else:
            yield (
                f"{counts}; in {contest['contradicted']} the two orders contradicted each other, "
                f"{contest['unjudged']} could not be judged."
            )
        raw, controlled = numbers.get("win-rate"), numbers.get("win-rate-lc")
        if is_known(raw) and is_known(controlled) and raw["low"] > 0.5 >= controlled["low"]:
            yield "With length taken out the win is no longer certain: much of it is a matter of length."
    change = numbers.get("perplexity-ratio")
    if is_known(change) and change["low"] > 1.05:
        yield f"Plain text became less likely (perplexity × {change['value']:.2f}): something was forgotten."
    refusals = stored["answers"].get("adapter", {}).get("refusals")
    before = stored["answers"].get(stored["against"], {}).get("refusals")
    if is_known(refusals) and is_known(before) and refusals["low"] > before["high"]:
        yield "It refuses more often than the other model."


def is_known(interval: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """True for an estimate with both ends of its interval."""
    return interval is not None and interval["low"] is not None and interval["high"] is not None


def log_ratios(ratios: Mapping[str, Any]) -> str:
    """Histogram of log-ratios of held-out answers."""
    groups = [(name, ratios[name]) for name in ("chosen", "rejected") if ratios.get(name)]
    return svg.histogram(groups, title="log-ratio of held-out answers", unit="nats against the reference")


def _shares(stored: Stored) -> Iterator[str]:
    def rows(names: Sequence[str]) -> list[tuple[str, float, float, float]]:
        return [
            (SHORT.get(name, NAMES[name]), value["value"], value["low"], value["high"])
            for name, value in stored["numbers"].items()
            if name in names and is_known(value)
        ]

    title = "with 95% intervals; the dashed line is chance"
    yield svg.intervals(rows(AGAINST_CHANCE), title=title, level=0.5)
    yield svg.intervals(rows(OF_ANSWERS), title="shares of the answers, with 95% intervals")


def _under(stored: Stored) -> str:
    return f"on {stored['base']}, against {stored['against']}, with {', '.join(stored['data'])}"


def _explained(stored: Stored) -> str:
    return parts.paragraph(
        "Shares have Wilson intervals, means Student's t, both over prompts. Length is taken out by a logistic "
        "regression on the difference of lengths, read where it is 0 (after AlpacaEval 2). An accuracy or a "
        "win rate whose interval holds 0.5 is no better than chance."
    )


def _how(stored: Stored) -> list[tuple[str, str]]:
    rows = [
        ("data", ", ".join(stored["data"])),
        ("pairs", str(stored["pairs"]["pairs"])),
        ("prompts answered", str(len(stored["rows"]))),
        ("β of the margin", f"{stored['beta']:g}"),
        ("took", f"{stored['seconds']:.0f} s"),
    ]
    if stored["text"]:
        text = stored["text"]
        rows.append(
            (
                "plain text",
                f"{text['tokens']} tokens, perplexity {text['base']:.2f} (base), {text['adapter']:.2f} (adapter)",
            )
        )
    if stored["cost"]:
        rows.append(("judge", stored["cost"]))
    return rows


def _number(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not known"
    if name in ("finished", "refusals", "repetition"):
        return f"{value:.1%}"
    return f"{value:.1f}" if name.startswith("length") else f"{value:.3f}"
