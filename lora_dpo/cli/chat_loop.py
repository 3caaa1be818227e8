"""The terminal chat: reads lines, prints pieces. What they mean is `serving.chat.Chat`'s business."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.views import side_by_side
from lora_dpo.errors import LoraDPOError
from lora_dpo.serving.chat import Chat
from lora_dpo.text import harmless

HELP = """/base  answer with the base model     /adapter  answer with the adapter
/compare TEXT  both answers           /reset  forget the conversation
/save FILE  append it as JSONL        /quit  leave (or Ctrl-D)"""


def converse(chat: Chat, console: Console, *, compare: bool = False) -> None:
    """Read and answer until /quit or end of input."""
    console.print(f"[dim]{escape(chat.base.name)} with the adapter on. /help lists the commands.[/]")
    while True:
        who = "adapter" if chat.use_adapter else "base"
        try:
            line = console.input(f"[bold cyan]you → {who}:[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                command(chat, line, console)
            elif line and compare:
                compare_once(chat, line, console)
            elif line:
                speak(chat, line, console)
        except KeyboardInterrupt:
            console.print("[dim](stopped)[/]")
        except LoraDPOError as error:
            console.print(f"[red]error:[/] {escape(harmless(str(error)))}")


def command(chat: Chat, line: str, console: Console) -> None:
    """Carry out one /command."""
    word, _, rest = line.partition(" ")
    match word:
        case "/base" | "/adapter":
            chat.use_adapter = word == "/adapter"
        case "/reset":
            chat.reset()
            console.print("[dim]the conversation is empty[/]")
        case "/save":
            path = Path(rest.strip() or "chat.jsonl")
            chat.save(path)
            console.print(f"[dim]added to {escape(str(path))}[/]")
        case "/compare" if rest.strip():
            compare_once(chat, rest.strip(), console)
        case _:
            console.print(HELP)


def speak(chat: Chat, text: str, console: Console) -> None:
    """Stream one answer; Ctrl-C ends the answer, not the chat."""
    pieces = chat.say(text)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        console.print(" [dim](stopped)[/]", end="")
    console.print()


def compare_once(chat: Chat, text: str, console: Console) -> None:
    """Print the base's and the adapter's answer to one message side by side."""
    base, adapter = (chat.answer_once(text, use_adapter=on) for on in (False, True))
    console.print(side_by_side("prompt", ((text, base, adapter),), names=("base", "adapter")))
