"""Fragments of the page as HTML. Every text that comes from outside goes through `escape` here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from lora_dpo.data.doctor.examination import Diagnosis
from lora_dpo.data.pairs import ReadReport, rows_text
from lora_dpo.data.thoughts import split_thought
from lora_dpo.demo.conversation import StreamedAnswer
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.run_state import RunSnapshot, logratios
from lora_dpo.demo.votes import HeadToHead
from lora_dpo.evaluation.report.svg import Series, lines
from lora_dpo.text import counted


def text_block(text: str, *, kind: str = "") -> str:
    """A text as it is: line breaks kept, nothing in it interpreted."""
    return f'<div class="text {kind}">{escape(text)}</div>'


def note(text: str, *, kind: str = "") -> str:
    """One line beside the controls, without this machine's folders.

    Args:
        kind: empty, `good`, `warn`, `bad` or `wait`.
    """
    return f'<p class="note {kind}">{escape(without_paths(text))}</p>' if text else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), kind: str = "") -> str:
    """A table of texts; columns in `right` are aligned to the right. Wider than the page, it scrolls."""

    def cells(row: Sequence[str], tag: str) -> str:
        opened = [f'<{tag} class="right">' if index in right else f"<{tag}>" for index in range(len(row))]
        return "".join(f"{start}{escape(cell)}</{tag}>" for start, cell in zip(opened, row, strict=True))

    head = f"<thead><tr>{cells(headers, 'th')}</tr></thead>" if headers else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table class="plain {kind}">{head}<tbody>{body}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values below each other, without this machine's folders."""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(without_paths(value))}</dd>" for name, value in rows)
    return f'<dl class="facts">{listed}</dl>'


def folded(title: str, body: str, *, open: bool = False) -> str:
    """A part of the page that is folded away under its title; `body` is HTML."""
    return f'<details class="folded"{" open" if open else ""}><summary>{escape(title)}</summary>{body}</details>'


def framed(page: str, *, title: str = "report") -> str:
    """A whole page that runs no script and loads nothing, in a frame that lets it do neither."""
    return f'<iframe class="report" sandbox="" title="{title}" srcdoc="{escape(page, quote=True)}"></iframe>'


def thought_title(thought: str, said: str) -> str:
    """What a folded thought is called; `said` is empty while it is thought, or if it was cut there."""
    return f"thought {counted(len(thought.split()), 'word')}" + ("" if said else ", no answer yet")


def answer_html(text: str) -> str:
    """An answer as HTML, with what was thought before it folded away."""
    thought, said = split_thought(text)
    return folded(thought_title(thought, said), escape(thought)) + escape(said) if thought else escape(said or text)


def said_line(said: StreamedAnswer | None, *, writing: bool = False) -> str:
    """Counts and speed of an answer."""
    if said is None:
        return note("")
    if writing:
        return note("writing…" if said.text else "waiting for its turn…", kind="wait")
    parts = [f"{said.tokens} tokens"] if said.tokens else []  # none are known of an answer before a reload
    if said.speed is not None:
        parts.append(f"{said.speed:.1f} tokens/s")
    if said.tokens:
        parts += [f"prompt {said.prompt_tokens} tokens", f"first word after {said.waited:.1f} s"]
    cut = f" {CUT}" if said.cut else ""
    return f'<p class="note">{escape(" · ".join(parts))}{cut}</p>'


CUT = '<span class="cut" title="It reached the longest answer that the settings allow.">cut: not at its end</span>'
"""The mark of an answer that was ended at its longest: what it lacks is not its fault."""


def answer_card(letter: str, text: str, *, writing: bool = False, name: str | None = None, cut: bool = False) -> str:
    """One of two answers to vote on; `name` is told after the vote."""
    who = f'<span class="card-name">{escape(name)}</span>' if name else ""
    who += CUT if cut else ""
    missing = "writing…" if writing else "no answer yet"
    body = answer_html(text) if text else f'<span class="faint">{missing}</span>'
    return (
        f'<section class="card" aria-label="answer {letter}"><header><span class="letter">{letter}</span>{who}</header>'
        f'<div class="text" id="answer-{letter.lower()}">{body}</div></section>'
    )


def win_table(records: Sequence[HeadToHead]) -> str:
    """Who won how often, with the interval drawn."""
    if not records:
        return note("No vote between two models yet. Vote on a few answers, and this says who wins.")
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("models", ""),
            ("won", ' class="right"'),
            ("lost", ' class="right"'),
            ("both good", ' class="right"'),
            ("both bad", ' class="right"'),
            ("win rate", ' class="right"'),
            ("95% interval", ""),
        )
    )
    rows = "".join(f"<tr>{_record_cells(record)}</tr>" for record in records)
    table_ = f'<table class="plain wins"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table_}</div>'


def _record_cells(record: HeadToHead) -> str:
    low, high = record.interval
    rate = "–" if record.rate is None else f"{record.rate:.0%}"
    middle = "" if record.rate is None else f'<i style="left:{100 * record.rate:.1f}%"></i>'
    bar = f'<span class="bar"><b style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></b>{middle}</span>'
    numbers = (record.wins, record.losses, record.both_good, record.both_bad)
    cells = "".join(f'<td class="right">{number}</td>' for number in numbers)
    won = f"{record.wins} won, {record.losses} lost, {record.both_good} both good, {record.both_bad} both bad"
    return (
        f"<td><strong>{escape(record.first)}</strong> against {escape(record.second)}"
        f'<small class="counts">{won}</small></td>{cells}'
        f'<td class="right">{rate}</td><td class="interval">{bar}<span>{low:.0%} to {high:.0%}</span></td>'
    )


def findings(diagnosis: Diagnosis | None, report: ReadReport | None = None) -> str:
    """What the doctor says: each finding with its rows and what to do."""
    if diagnosis is None:
        return note("There is no pair in this file.")
    read = report or diagnosis.report
    shown = [note(f"{read.summary()}, read as {read.read_as or 'no format'}; {diagnosis.prompts} different prompts.")]
    shown += map(note, read.noted())
    if not diagnosis.findings:
        shown.append(note("The doctor finds nothing that would spoil a run.", kind="good"))
    for finding in diagnosis.findings.values():
        check = finding.check
        count = f"{finding.count} × " if finding.count else ""
        rows = rows_text(finding.rows).replace(" (--json lists all)", "")
        where = f"<p>Rows {escape(rows)}.</p>" if finding.rows else ""
        examples = "".join(f"<li>{escape(' '.join(text.split()))}</li>" for _, text in finding.examples)
        listed = f"<ul>{examples}</ul>" if examples else ""
        shown.append(
            f'<details class="finding {check.severity}"><summary><span class="badge">{check.severity}</span>'
            f"{escape(count + check.title)}</summary><p>{escape(check.meaning)} {escape(check.advice)}</p>"
            f"{where}{listed}</details>"
        )
    return "".join(shown)


def curves(seen: RunSnapshot, beta: float) -> str:
    """Loss, margin, reward accuracy and the two log-ratios of a run, as it goes."""
    found = logratios(seen.steps, beta)

    def of(*names: str, title: str, level: float | None = None, within: tuple[float, float] | None = None) -> str:
        series = [
            Series(name, *zip(*found[name], strict=True)) if found[name] else Series(name, (), ()) for name in names
        ]
        return lines(series, title=title, level=level, within=within, until=seen.all_steps, empty="no step yet")

    charts = (
        of("loss", title="loss"),
        of("margin", title="reward margin", level=0.0),
        of("accuracy", title="reward accuracy (of a step's pairs)", within=(0.0, 1.0)),
        of("chosen", "rejected", title="log-ratio (nats)", level=0.0),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def progress_bar(done: int, total: int, label: str) -> str:
    """How far something is."""
    share = 100 * done / total if total else 0
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{share:.1f}%"></div></div>{note(label)}'
    )


def samples_table(seen: RunSnapshot) -> str:
    """Answers to the chosen prompts, before and as training goes on."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for sample in seen.samples:
        by_prompt.setdefault(sample.prompt, []).append((sample.step, sample.text))
    blocks = []
    for prompt, answers in by_prompt.items():
        cells = "".join(
            f'<div class="sample"><header>{"before" if step == 0 else f"after {step} steps"}</header>'
            f'<div class="text">{answer_html(text or "(nothing)")}</div></div>'
            for step, text in answers
        )
        row = f'<div class="sample-row">{cells}</div>'
        blocks.append(f'<section class="samples"><h4>{escape(prompt)}</h4>{row}</section>')
    return "".join(blocks)


def without_pictures(markdown: str) -> str:
    """A model card without its front matter and without pictures: nothing is fetched for it."""
    body = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    return re.sub(r"!\[[^\]]*\]\([^)]*\)", "", body)
