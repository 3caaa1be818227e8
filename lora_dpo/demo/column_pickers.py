"""Pickers for an upload whose columns nobody can tell: which one is the prompt, and which are the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_dpo.demo.html import note
from lora_dpo.errors import DataError, UnclearColumns

ASKED = {"prompt": "Prompt", "chosen": "Better answer", "rejected": "Worse answer"}
OPTIONAL = {"chosen_score": "Score of the better", "rejected_score": "Score of the worse", "system": "System turn"}
NONE = "(none)"


@dataclass(frozen=True)
class Pickers:
    """What is on the page while an upload waits for its columns."""

    group: gr.Column
    said: gr.HTML
    choices: tuple[gr.Dropdown, ...]
    """In the order of `ASKED` and `OPTIONAL`."""
    read: gr.Button
    waiting: gr.State
    """The path of the upload."""

    @property
    def outputs(self) -> list[Any]:
        """What `asked` and `hidden` change."""
        return [self.group, self.said, *self.choices, self.waiting]


def build() -> Pickers:
    """Lay the pickers out, out of sight."""
    with gr.Column(visible=False, elem_id="data-columns") as group:
        said = gr.HTML("", elem_id="data-columns-said")
        choices: list[gr.Dropdown] = []
        for row in (ASKED, OPTIONAL):
            with gr.Row():
                for role, label in row.items():
                    choices.append(gr.Dropdown([], label=label, elem_id=f"data-column-{role}", min_width=160))
        read = gr.Button("Read it so", variant="primary", size="md", elem_id="data-columns-read", min_width=110)
    return Pickers(group, said, tuple(choices), read, gr.State(None))


def asked(path: str, unclear: UnclearColumns) -> tuple[Any, ...]:
    """Show the pickers with what may be meant."""
    columns = list(unclear.columns)
    pickers = [gr.update(choices=columns, value=unclear.guess.get(role)) for role in ASKED]
    pickers += [gr.update(choices=[NONE, *columns], value=NONE) for _ in OPTIONAL]
    return gr.update(visible=True), note(unclear.problem, kind="bad"), *pickers, path


def hidden() -> tuple[Any, ...]:
    """Put the pickers away."""
    return gr.update(visible=False), "", *[gr.skip()] * (len(ASKED) + len(OPTIONAL)), None


def picked(choices: Sequence[str | None]) -> Mapping[str, str]:
    """The columns that were chosen, by what they are. Raises `DataError` if one that is needed is not."""
    named = dict(zip((*ASKED, *OPTIONAL), choices, strict=True))
    for role, label in ASKED.items():
        if not named[role]:
            raise DataError(f"No column is chosen for: {label}. Choose one.")
    return {role: name for role, name in named.items() if name and name != NONE}
