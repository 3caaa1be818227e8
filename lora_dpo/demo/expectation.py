"""What to expect of a run, told before it is begun."""

from __future__ import annotations

from lora_dpo.text import counted
from lora_dpo.training.drafting.presets import HOLD_OUT_FROM
from lora_dpo.training.planning.lines import duration, verdict
from lora_dpo.training.planning.plan_values import Plan

FEW = 20
"""Pairs below which the difference is small. A rule of thumb: what a vote teaches depends on what it is about."""

Line = tuple[str, str]
"""A sentence, and its kind: empty, `good`, `warn` or `bad`."""


def before_the_click(*, pairs: int, prompts: int, held_out: int, answers: int) -> list[Line]:
    """Are these enough pairs, and what will be measured?

    Args:
        pairs: to train on, without the held-out ones.
        prompts: different ones, held-out ones included.
        held_out: pairs that are not trained on.
        answers: held-out prompts that are answered before and after.
    """
    lines: list[Line] = []
    if pairs < FEW:
        lines.append((f"{counted(pairs, 'pair')} to learn from. Below {FEW} the difference is small.", "warn"))
    else:
        lines.append((f"{counted(pairs, 'pair')} to learn from.", ""))
    if held_out:
        measured = f"accuracy and margin on {counted(held_out, 'held-out pair')}"
        measured += f", and {counted(answers, 'answer')}" if answers else ""
        lines.append((f"Measured before and after: {measured}.", ""))
    else:
        lines.append(
            (
                f"{prompts} of {HOLD_OUT_FROM} different prompts before anything can be measured: nothing is held "
                "out. Vote between the new adapter and the base to see whether it is better.",
                "warn",
            )
        )
    return lines


def what_it_takes(planned: Plan, *, measured: bool) -> Line:
    """Steps, time and memory of a plan.

    Args:
        measured: whether something is measured before and after, which takes its own time.
    """
    seconds = planned.time.seconds
    steps = counted(planned.steps.steps, "step")
    time = f"about {duration(seconds)} for {steps}" if seconds else steps
    time += ", and the measuring on top" if measured else ""
    fits = planned.memory.fits
    return f"{time[0].upper()}{time[1:]}. {verdict(planned)}", "bad" if fits is False else ""
