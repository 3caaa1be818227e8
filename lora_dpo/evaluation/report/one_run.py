"""The page of one run, from what its adapter folder holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_dpo.adapters.stored_run import StoredRun
from lora_dpo.adapters.stored_run import number as number_of
from lora_dpo.evaluation.report import parts, svg
from lora_dpo.evaluation.report.disagreeing import disagreeing
from lora_dpo.model.stored_form import held_text

CURVES = (
    ("loss", "loss", 1.0, None),
    ("rewards/margins", "reward margin", 1.0, 0.0),
    ("rewards/accuracies", "reward accuracy (batch)", 1.0, 0.5),
)
PAIRS = (
    ("accuracy", "reward accuracy", "{:z.3f}"),
    ("margin", "reward margin", "{:z.3f}"),
    ("chosen_logratio", "chosen log-ratio (nats)", "{:+z.2f}"),
    ("rejected_logratio", "rejected log-ratio (nats)", "{:+z.2f}"),
)
ANSWERS = (
    ("mean_tokens", "answer length (tokens)", "{:.1f}"),
    ("finished", "answers that end by themselves", "{:.0%}"),
    ("correct", "known answers right", "{:.0%}"),
)


def run_page(run: StoredRun) -> str:
    """The whole page."""
    return parts.page(
        f"Run {run.name}",
        [
            parts.heading(f"Run {run.name}", _under(run)),
            *_summary(run),
            parts.section(
                "Held-out data, before and after", parts.table(("", "before", "after"), before_and_after(run))
            ),
            parts.section("Health", *_health(run)),
            parts.section("Training", parts.plots(*curves(run))),
            parts.section("Held-out log-ratios", parts.plots(_histogram(run))),
            parts.section(
                "The same prompts, before and after",
                parts.answers(("prompt", "before", "after"), answer_rows(run)),
            ),
            parts.section("Answers on the way", *_samples(run)),
            parts.section("Data", *_data(run)),
            parts.section("Pairs that disagree with the rest", *disagreeing(run)),
            parts.section("Time and memory", parts.keys(list(_cost(run)))),
            parts.section("Passport", parts.keys(list(_passport(run)))),
            parts.section("Settings", parts.keys(list(flat(run.recipe)))),
        ],
    )


def before_and_after(run: StoredRun) -> list[tuple[str, str, str]]:
    """Rows `(name, before, after)` of what was measured."""
    rows = []
    named = {"margin": "margin (nats: SFT has no β)"} if run.method == "sft" else {}
    for kind, known in (("pairs", PAIRS), ("answers", ANSWERS)):
        before, after = run.metrics("before", kind), run.metrics("after", kind)
        for key, label, form in known:
            if before.get(key) is not None and after.get(key) is not None:
                rows.append((named.get(key, label), form.format(before[key]), form.format(after[key])))
    return rows


def curves(run: StoredRun) -> Iterator[str]:
    """Loss, margin, accuracy, log-ratios, and what the guard saw, over the steps."""
    steps = [row["step"] for row in run.trained]
    for key, title, scale, level in CURVES:
        series = svg.Series(key, steps, [number_of(row, key, scale) for row in run.trained])
        yield svg.lines([series], title=title, level=level)
    ratios = [
        svg.Series(side, steps, [number_of(row, f"rewards/{side}", 1 / run.beta) for row in run.trained])
        for side in ("chosen", "rejected")
    ]
    yield svg.lines(ratios, title="log-ratio to the reference (nats an answer)", level=0.0)
    looked = [row for row in run.rows if "answers" in row]  # the next log repeats the numbers, for trackers
    at = [row["step"] for row in looked]
    for key, title in (
        ("health/answer_tokens", "length of sampled answers (tokens)"),
        ("health/kl", "KL (nats a token)"),
    ):
        if looked:
            yield svg.lines([svg.Series(key, at, [number_of(row, key) for row in looked])], title=title)


def answer_rows(run: StoredRun) -> list[tuple[str, str, str]]:
    """`(prompt, before, after)`."""
    return [(row["prompt"], row["before"]["text"], row["after"]["text"]) for row in run.measured.get("answers", [])]


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings with dotted names."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _under(run: StoredRun) -> str:
    if run.unfinished:
        return f"{(run.recipe.get('model') or {}).get('name') or 'unknown base'}, not finished"
    if run.passport is None:
        return "an adapter without a passport"
    counts = [f"{number} {which} {unit}" for which, number, unit in _counts(run)]
    return f"{run.passport.base}, {', '.join(counts)}, {run.passport.created}"


def _counts(run: StoredRun) -> Iterator[tuple[str, Any, str]]:
    """`(train or eval, number, pairs or answers)`."""
    for which, record in (run.passport.data if run.passport else {}).items():
        unit = "answers" if "answers" in record else "pairs"
        yield which, record.get(unit, "?"), unit


def _summary(run: StoredRun) -> Iterator[str]:
    """What came of it, in words."""
    health = run.measured.get("health") or {}
    for sentence in (run.unfinished, health.get("sentence")):
        if sentence:
            yield parts.box(sentence, "warn")
    if run.unfinished or health.get("kept") == 0:
        return  # nothing was measured yet, or nothing has changed
    pairs, answers, before = (
        run.metrics("after", "pairs"),
        run.metrics("after", "answers"),
        run.metrics("before", "answers"),
    )
    if {"pairs", "accuracy", "margin", "chosen_logratio"} <= pairs.keys():
        yield parts.paragraph(
            f"Of {pairs['pairs']} held-out pairs it tells {pairs['accuracy']:.0%} apart as the data does (margin "
            f"{pairs['margin']:z.2f}{' nats' if run.method == 'sft' else ''}); the chosen answers "
            f"{_likelier(pairs['chosen_logratio'])}."
        )
    if answers.get("answers") and {"mean_tokens", "finished"} <= before.keys() & answers.keys():
        yield parts.paragraph(
            f"Its answers have {answers['mean_tokens']:.0f} tokens, before they had {before['mean_tokens']:.0f} (the "
            f"chosen ones {answers.get('chosen_mean_tokens', 0):.0f}), and {answers['finished']:.0%} end by themselves "
            f"({before['finished']:.0%} before)."
        )
    if not pairs and not answers:
        yield parts.paragraph("Nothing was measured on held-out data: set data.eval or data.hold_out.")


def _likelier(nats: float) -> str:
    if abs(nats) < 0.05:
        return "are as likely as before"
    return f"became {'likelier' if nats > 0 else 'less likely'} by {abs(nats):.1f} nats"


def _health(run: StoredRun) -> Iterator[str]:
    health = run.measured.get("health")
    if run.unfinished:
        steps = max((row["step"] for row in run.rows), default=0)
        health = {"steps": steps, "alarms": [row["alarm"] for row in run.rows if "alarm" in row]}
    if health is None:
        return
    if not health["alarms"]:
        yield parts.box(f"No alarm in {health.get('steps', 0)} steps.", "good")
    for alarm in health["alarms"]:
        text = f"step {alarm['step']}, {alarm['name']}: {alarm['seen']}. {alarm['cause']}. {alarm['advice']}."
        yield parts.box(text, "bad" if alarm["severe"] else "warn")


def _histogram(run: StoredRun) -> str:
    ratios = run.measured.get("log_ratios") or {}
    groups = [(name, ratios[name]) for name in ("chosen", "rejected") if ratios.get(name)]
    return svg.histogram(groups, title="after training, against the reference", unit="nats an answer")


def _samples(run: StoredRun) -> Iterator[str]:
    looked = [row for row in run.rows if row.get("answers")]
    if looked or run.first_look:
        yield parts.paragraph("What the guard's few prompts were answered at each look, greedily and cut short.")
        first = [["before", *run.first_look[:3]]] if run.first_look else []
        rows = first + [[f"step {row['step']}", *map(str, row["answers"][:3])] for row in looked]
        yield parts.answers(["", *(f"prompt {index + 1}" for index in range(max(map(len, rows)) - 1))], _even(rows))


def _even(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    width = max(map(len, rows))
    return [[*row, *[""] * (width - len(row))] for row in rows]


def _data(run: StoredRun) -> Iterator[str]:
    rows = []
    for which, number, unit in _counts(run):
        record = run.passport.data[which] if run.passport else {}
        dropped = ", ".join(f"{count} {reason}" for reason, count in record.get("dropped", {}).items())
        files = ", ".join(record.get("sha256", {}))
        rows.append(
            (
                which,
                f"{files}: {number} {unit} of {record.get('rows', '?')} rows"
                + (f"; dropped {dropped}" if dropped else ""),
            )
        )
    yield parts.keys(rows)
    found = run.measured.get("findings")
    if found is None and run.measured:
        yield parts.paragraph("The data is too large to look at again here; lora-dpo data check does.")
    for one in found or ():
        kind = "bad" if one["severity"] == "error" else "warn"
        many = f" ({one['count']} rows)" if one["count"] else ""
        yield parts.box(f"{one['title']}{many}: {one['meaning']} {one['advice']}", kind)
    if found == [] and run.method == "dpo":
        yield parts.paragraph("lora-dpo data check finds nothing in the training data.")
    elif found == []:
        yield parts.paragraph(
            "Nothing is odd about the answers of the training pairs. Rows without a pair are not looked at."
        )


def _cost(run: StoredRun) -> Iterator[tuple[str, str]]:
    total = run.measured.get("total_seconds")
    if total:
        yield "whole run, since it was last started", f"{total / 60:.1f} min"
    for stage, seconds in run.measured.get("seconds", {}).items():
        yield stage, f"{seconds:.1f} s"
    looking = (run.measured.get("health") or {}).get("seconds")
    if looking:
        yield "of which the guard's looks at answers", f"{looking:.1f} s"
    scoring = run.measured.get("reference_seconds")
    if scoring:
        yield "of which the reference's log-probabilities", f"{scoring:.1f} s"
    memory = run.measured.get("memory", {})
    for name, label in (("process", "main memory at the peak"), ("gpu", "GPU memory at the peak")):
        if name in memory:
            yield label, f"{memory[name] / 2**30:.2f} GB"


def _passport(run: StoredRun) -> Iterator[tuple[str, str]]:
    passport = run.passport
    if passport is None:
        return
    yield "base", passport.base
    yield "base revision", passport.base_revision or "not recorded"
    yield "base fingerprint", passport.base_fingerprint or "not recorded"
    yield "base licence", passport.base_licence or "not stated"
    yield "weights", f"{held_text(passport.quantize, passport.kept_share)}, computed in {passport.dtype}"
    yield "reference", passport.reference
    yield "adapter SHA-256", passport.adapter_sha256 or "not recorded"
    yield "made", passport.created
    yield "versions", ", ".join(f"{name} {version}" for name, version in passport.versions.items())
