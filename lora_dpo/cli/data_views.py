"""What the doctor and the other data commands say, drawn in a terminal. No decisions are made here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_dpo.data.chat_template import Message
from lora_dpo.data.doctor.examination import Diagnosis, Finding
from lora_dpo.data.doctor.statistics import PERCENTILES, percentiles
from lora_dpo.data.pairs import PreferencePair, ReadReport, rows_text
from lora_dpo.data.token_view import PairView, Piece
from lora_dpo.data.write import Fixed
from lora_dpo.text import counted, harmless

STYLE = {"prompt": ("cyan", "bright_cyan"), "chosen": ("green", "bright_green"), "rejected": ("red", "bright_red")}


def diagnosis_view(diagnosis: Diagnosis, console: Console) -> None:
    """The whole report: what was read, findings with rows and examples, lengths."""
    read_view(diagnosis.report, console)
    console.print()
    if not diagnosis.report.rows:
        console.print("[yellow]no rows: nothing was checked[/]")
        return
    if not diagnosis.findings:
        console.print("[green]nothing found[/]")
    for finding in diagnosis.findings.values():
        _finding_view(finding, console)
    stats_view(diagnosis, console, read=False)
    warnings = sum(finding.check.severity == "warning" for finding in diagnosis.findings.values())
    kinds = len(diagnosis.findings) - warnings
    errors = f"{counted(kinds, 'kind')} of error in {counted(diagnosis.errors, 'row')}" if kinds else "no errors"
    console.print(f"\n{errors}, {counted(warnings, 'kind')} of warning", highlight=False)


def _finding_view(finding: Finding, console: Console) -> None:
    check = finding.check
    colour = "red" if check.severity == "error" else "yellow"
    count = f"{finding.count} × " if finding.count else ""
    console.print(
        f"[{colour}]{check.severity}[/] [bold]{count}{escape(check.title)}[/] \\[{check.name}]", highlight=False
    )
    if finding.rows:
        console.print(Padding(Text(harmless(f"rows {rows_text(finding.rows)}")), (0, 0, 0, 2), expand=False))
    for origin, text in finding.examples:
        place = f"row {origin.row}: " if origin.row else ""
        console.print(
            Padding(Text(harmless(f"{place}{' '.join(text.split())}"), style="dim"), (0, 0, 0, 4), expand=False)
        )
    console.print(Padding(Text(f"{check.meaning} {check.advice}\n"), (0, 0, 0, 2), expand=False))


def stats_view(diagnosis: Diagnosis, console: Console, *, read: bool = True) -> None:
    """Lengths by percentile, length bias, label noise, languages."""
    if read:
        read_view(diagnosis.report, console)
    if not diagnosis.pairs:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(f"length in {diagnosis.unit}")
    for rank in PERCENTILES:
        table.add_column("longest" if rank == 100 else f"{rank}%", justify="right")
    for part, values in {**diagnosis.lengths, **diagnosis.said}.items():
        table.add_row(part, *(f"{value:,}" for value in percentiles(values).values()))
    console.print(table)
    for label, text in _facts(diagnosis):
        console.print(f"[bold cyan]{label:<14}[/]{escape(text)}", highlight=False)


def _facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    facts = [("prompts", f"{diagnosis.prompts:,} different ones in {counted(diagnosis.pairs, 'pair')}")]
    if diagnosis.scored:
        facts.append(("scores", f"{counted(diagnosis.scored, 'pair')} with them"))
    bias = diagnosis.bias
    facts.append(
        ("length", f"chosen is longer in {bias.chosen_longer:.0%} of the pairs; {bias.sentence(diagnosis.unit)}")
    )
    if diagnosis.note_of_thoughts:
        facts.append(("thoughts", diagnosis.note_of_thoughts))
    noise = diagnosis.noise
    if noise.flip_rate is not None:
        text = f"{noise.disagreed} of {noise.judged_twice} repeated judgements disagree"
        if 0 < noise.flip_rate < 0.5:
            text += (
                f": if rows repeat because people judged twice, about {noise.flip_rate:.1%} of the labels are flipped, "
                "and trainer.loss_type: [robust, sft] with "
                f"trainer.label_smoothing: {noise.flip_rate:.2g} allows for that"
            )
        facts.append(("label noise", text))
    told = ", ".join(f"{name} {count / diagnosis.pairs:.1%}" for name, count in diagnosis.languages.most_common(4))
    facts.append(("languages", f"{told} (of the chosen answers)"))
    if diagnosis.unit == "tokens":
        cut = ", ".join(f"{diagnosis.share_cut(length):.1%} at {length}" for length in diagnosis.cuts())
        facts.append(("max_length", f"pairs cut: {cut}"))
    return facts


def read_view(report: ReadReport, console: Console) -> None:
    """What was read, and as what."""
    console.print(
        f"[bold cyan]{'read':<14}[/]{counted(report.rows, 'row')}, as {escape(report.read_as or 'no format')}",
        highlight=False,
    )
    for line in report.noted():
        console.print(f"[bold cyan]{'':<14}[/]{escape(harmless(line))}", highlight=False)
    console.print(f"[bold cyan]{'pairs':<14}[/]{escape(harmless(report.summary()))}", highlight=False)


def fixed_view(fixed: Fixed, console: Console) -> None:
    """What a cleaning wrote."""
    console.print(
        harmless(
            f"{counted(fixed.rows, 'row')} read: {fixed.rows - fixed.removed:,} became {counted(fixed.pairs, 'pair')}, "
            f"written to {fixed.out}; {fixed.removed:,} removed with their reasons to {fixed.dropped}"
        ),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def messages_view(pair: PreferencePair, console: Console) -> None:
    """The messages of a pair."""
    _heading(pair, console)
    for part, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        console.print(f"[bold {STYLE[part][0]}]{part}[/]")
        for said in messages:
            console.print(Text(harmless(f"  {said['role']}: {spoken(said)}"), style=STYLE[part][0]))
    console.print("[dim]--model NAME shows the tokens.[/]")


def tokens_view(view: PairView, console: Console, max_length: int) -> None:
    """Every token of a pair: neighbours differ in shade, special tokens are bold, cut ones struck out."""
    _heading(view.pair, console)
    roles = {
        "prompt": "read, not trained on",
        "chosen": "trained on: to become likelier",
        "rejected": "trained on: to become less likely",
    }
    for part, pieces in (("prompt", view.prompt), ("chosen", view.chosen), ("rejected", view.rejected)):
        tokens = sum(piece.tokens for piece in pieces)
        cut = sum(piece.tokens for piece in pieces if piece.cut)
        note = f", the last {cut} cut at max_length {max_length}" if cut else ""
        console.print(f"[bold {STYLE[part][0]}]{part}[/]  {tokens} tokens, {roles[part]}{note}", highlight=False)
        console.print(_coloured(pieces, STYLE[part]), soft_wrap=True)
        console.print()


def _coloured(pieces: Sequence[Piece], shades: tuple[str, str]) -> Text:
    text = Text()
    cutting = False
    for number, piece in enumerate(pieces):
        if piece.cut and not cutting:
            cutting = True
            text.append(" ✂ cut here: ", style="bold yellow")
        style = shades[number % 2] + (" bold" if piece.special else "") + (" strike dim" if piece.cut else "")
        text.append(harmless(piece.text), style=style)
    return text


def _heading(pair: PreferencePair, console: Console) -> None:
    console.print(f"[bold]{escape(harmless(str(pair.origin)))}[/]", highlight=False)
    if pair.gap is not None:
        console.print(f"scores {pair.chosen_score:g} and {pair.rejected_score:g}", highlight=False)
    for key, value in (pair.provenance or {}).items():
        console.print(Text(harmless(f"  {key}: {value}"), style="dim"))


def spoken(said: Message) -> str:
    """What a message says, calls and thinks, as one text."""
    calls = "".join(f" [calls {call['function']['name']}]" for call in said.get("tool_calls", []))
    thought = f"(thinks: {said['reasoning_content']}) " if said.get("reasoning_content") else ""
    return thought + said["content"] + calls
