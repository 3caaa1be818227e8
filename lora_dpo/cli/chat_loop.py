"""The terminal chat: reads lines, prints pieces. What they mean is `serving.chat.Chat`'s business."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.views import side_by_side
from lora_dpo.data.thoughts import ThoughtSplitter, split_thought
from lora_dpo.errors import LoraDPOError
from lora_dpo.serving.chat import Chat
from lora_dpo.text import counted, harmless

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
    splitter = ThoughtSplitter()
    pieces = chat.say(text)
    thought = False

    def show(parts: Iterator[tuple[bool, str]]) -> None:
        nonlocal thought
        for inside, part in parts:
            if thought and not inside:
                console.print("\n")
            thought = inside
            style = "dim" if inside else None
            console.print(part, end="", markup=False, highlight=False, soft_wrap=True, style=style)

    try:
        for piece in pieces:
            show(splitter.feed(piece))
        show(splitter.end())
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        show(splitter.end())
        console.print(" [dim](stopped)[/]", end="")
    console.print()


def say_once(chat: Chat, text: str, out: TextIO) -> str:
    """Write the answer to one message as it comes, without what was thought before it; returns a word on that."""
    splitter = ThoughtSplitter()
    thought = said = ""
    for piece in _pieces(chat, text):
        for inside, part in splitter.end() if piece is None else splitter.feed(piece):
            if inside:
                thought += part
            else:
                said += part
                out.write(part)
                out.flush()
    out.write("\n")
    return _words_on(thought, said)


def _pieces(chat: Chat, text: str) -> Iterator[str | None]:
    yield from chat.say(text)
    yield None


def _words_on(thought: str, said: str) -> str:
    """What is told of a thought that is not shown; nothing where there is none."""
    if not thought.strip():
        return ""
    words = counted(len(thought.split()), "word")
    cut = "" if said.strip() else ", and was cut before it answered: raise --max-new-tokens"
    return f"thought {words} first, not shown{cut}"


def compare_once(chat: Chat, text: str, console: Console) -> None:
    """Print the base's and the adapter's answer to one message side by side."""
    base, adapter = (chat.answer_once(text, use_adapter=on) for on in (False, True))
    base, adapter = _folded(base), _folded(adapter)
    console.print(side_by_side("prompt", ((text, base, adapter),), names=("base", "adapter")))


def _folded(text: str) -> str:
    """An answer with a word on what was thought before it in that thought's place."""
    thought, said = split_thought(text)
    return f"({_words_on(thought, said)})\n{said}".rstrip() if thought else said
