"""What answering takes: the prompts before and after training, and those of the guard's looks in between.

Keys and values of every token so far are kept for each row that is written at once (`model/decoding.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dpo.data import Message
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.engine.cost_model import CostModel
from lora_dpo.model.decoding import rows_in

if TYPE_CHECKING:
    from lora_dpo.training.prepared import Run


@dataclass(frozen=True)
class Asked:
    """Prompts that are answered one batch after the other."""

    prompts: int
    longest: int
    """Tokens of the longest prompt."""
    limit: int
    """Tokens of the longest answer."""
    at_once: bool
    """All rows in one batch, whatever memory is free."""


def asked_in(run: Run) -> tuple[Asked, ...]:
    """The prompts of a run: those before and after it, and those of a look."""
    from lora_dpo.training.guard.completion_sampler import health_prompts

    questions = [(Message(role="user", content=question.prompt),) for question in run.questions]
    kwargs = run.chat_template_kwargs
    ids = [prompt_ids(run.tokenizer, prompt, chat_template_kwargs=kwargs) for prompt in (*run.prompts, *questions)]
    health = run.recipe.health
    found = []
    if ids:
        longest = max(map(len, ids))
        found.append(Asked(len(ids), longest, run.recipe.evaluation.max_new_tokens, at_once=False))
    looks = [] if health.action == "none" else health_prompts(run, {tuple(one) for one in ids[: len(run.prompts)]})
    if looks:
        longest = max(len(look.prompt) for look in looks)
        found.append(Asked(len(looks), longest, health.max_new_tokens, at_once=True))
    return tuple(found)


def answer_bytes(asked: Sequence[Asked], cost: CostModel, *, free: float) -> tuple[int, int]:
    """Bytes at the peak of answering, beside weights and adapter, and how many prompts are answered at once then.

    Args:
        free: bytes that are free when it begins.
    """
    layers = len(cost.layers)
    token_bytes = 2 * sum(layer.attention.key for layer in cost.layers) * cost.itemsize
    most, rows_then = 0, 0
    for group in asked:
        row_bytes = token_bytes * (group.longest + group.limit)
        rows = group.prompts if group.at_once else min(group.prompts, rows_in(free, row_bytes))
        # A longer cache is written anew, one layer after the other.
        keys = rows * row_bytes * (1 + 1 / layers)
        prompts_at_once = rows * group.longest * (3 * cost.widest + 4 * cost.hidden) * cost.itemsize
        logits = rows * cost.vocabulary * (cost.itemsize + 4)
        needed = round(keys + max(prompts_at_once, logits))
        if needed > most:
            most, rows_then = needed, rows
    return most, rows_then
