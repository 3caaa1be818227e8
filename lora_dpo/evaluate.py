"""What training changed, on pairs and prompts that it never saw.

Shape suffixes: N pairs, B sequences of a batch, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lora_dpo.data import TokenPair
from lora_dpo.data.files import read_rows
from lora_dpo.errors import DataError
from lora_dpo.generate import Answer
from lora_dpo.model import reference

if TYPE_CHECKING:
    import torch

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class PairMetrics:
    """Preference metrics over N held-out pairs; h(y) = log π_θ(y|x) - log π_ref(y|x), in nats."""

    pairs: int
    accuracy: float
    """Share of pairs with h(chosen) > h(rejected); a tie counts half, so an untrained policy has 0.5."""
    margin: float
    """Mean of β·(h(chosen) - h(rejected)): the implicit reward margin (Rafailov et al. 2023, eq. 5)."""
    chosen_logratio: float
    """Mean h(chosen). Far below zero, the policy unlearns the answers it should prefer."""
    rejected_logratio: float


@dataclass(frozen=True)
class AnswerMetrics:
    """How greedy answers look: length, whether they end, whether they are right."""

    answers: int
    mean_tokens: float
    finished: float
    """Share of answers that the model ended itself."""
    chosen_mean_tokens: float
    """Mean length of the chosen answers of the same held-out data, as a yardstick."""
    questions: int
    correct: float | None
    """Share of questions with a known answer that were answered correctly; None without questions."""


@dataclass(frozen=True)
class Question:
    """A prompt with its accepted answers."""

    prompt: str
    accepted: tuple[str, ...]


def pair_metrics(
    policy: tuple[Sequence[float], Sequence[float]],
    ref: tuple[Sequence[float], Sequence[float]],
    *,
    beta: float,
) -> PairMetrics:
    """Metrics from sequence log-probabilities `(chosen, rejected)`, each a list of N numbers."""
    chosen = [p - r for p, r in zip(policy[0], ref[0], strict=True)]
    rejected = [p - r for p, r in zip(policy[1], ref[1], strict=True)]
    wins = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)]
    return PairMetrics(
        pairs=len(chosen),
        accuracy=fmean(wins),
        margin=beta * fmean(c - r for c, r in zip(chosen, rejected, strict=True)),
        chosen_logratio=fmean(chosen),
        rejected_logratio=fmean(rejected),
    )


def score_pairs(
    model: torch.nn.Module,
    pairs: Sequence[TokenPair],
    *,
    pad_id: int,
    as_reference: bool = False,
    on_pair: Callable[[int], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Log-probability of each chosen and each rejected answer, `(chosen, rejected)` of N numbers each.

    Args:
        as_reference: score with the reference (adapters off, or the frozen copy) instead of the policy.
        on_pair: called with the number of pairs done so far.
    """
    sequences = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    done: list[float] = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]) + len(sequences[index][1]))
    finished = 0
    while finished < len(order):
        batch = _next_batch(order[finished:], sequences)
        if as_reference:
            with reference(model):
                scores = _batch_logps(model, [sequences[index] for index in batch], pad_id)
        else:
            scores = _batch_logps(model, [sequences[index] for index in batch], pad_id)
        for index, score in zip(batch, scores, strict=True):
            done[index] = score
        finished += len(batch)
        if on_pair:
            on_pair(finished // 2)
    return done[0::2], done[1::2]


def _next_batch(order: Sequence[int], sequences: Sequence[tuple[list[int], list[int]]]) -> list[int]:
    """As many of the next (ever longer) sequences as fit `TOKENS_PER_BATCH` with padding, at least one."""
    batch: list[int] = []
    for index in order:
        length = len(sequences[index][0]) + len(sequences[index][1])
        if batch and length * (len(batch) + 1) > TOKENS_PER_BATCH:
            break
        batch.append(index)
    return batch


def _batch_logps(model: torch.nn.Module, sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> list[float]:
    """Sum of the answer tokens' log-probabilities for each `(prompt, answer)`."""
    import torch

    device = next(model.parameters()).device
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    longest_answer = max(len(answer) for _, answer in sequences)
    ids_BT = torch.full((len(sequences), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    answer_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
        # Padded on the left: all answers end at the same column, so the head sees few prompt positions.
        start = width - len(prompt) - len(answer)
        ids_BT[row, start:] = torch.tensor(prompt + answer)
        mask_BT[row, start:] = 1
        answer_BT[row, width - len(answer) :] = True
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            position_ids=position_BT.to(device),
            logits_to_keep=longest_answer + 1,
            use_cache=False,
        ).logits[:, :-1]
    targets = ids_BT[:, -longest_answer:].to(device)
    logps = torch.log_softmax(logits.float(), dim=-1).gather(2, targets[..., None]).squeeze(2)
    summed: list[float] = (logps * answer_BT[:, -longest_answer:].to(device)).sum(dim=1).tolist()
    return summed


def answer_metrics(
    answers: Sequence[Answer],
    *,
    chosen_mean_tokens: float,
    questions: Sequence[Question] = (),
    question_answers: Sequence[Answer] = (),
) -> AnswerMetrics:
    """Length and completeness over `answers`, correctness over `question_answers`."""
    right = [is_correct(a.text, q.accepted) for q, a in zip(questions, question_answers, strict=True)]
    return AnswerMetrics(
        answers=len(answers),
        mean_tokens=fmean(answer.tokens for answer in answers) if answers else 0.0,
        finished=fmean(answer.finished for answer in answers) if answers else 0.0,
        chosen_mean_tokens=chosen_mean_tokens,
        questions=len(right),
        correct=fmean(right) if right else None,
    )


def is_correct(text: str, accepted: Sequence[str]) -> bool:
    """True if one of the accepted answers stands in the text as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in accepted)


def read_questions(path: str) -> list[Question]:
    """Read JSONL rows `{"prompt": …, "accepted": [ … ]}`. Raises `DataError` with file and line."""
    found = []
    for number, row in read_rows(path):
        prompt, accepted = row.get("prompt"), row.get("accepted")
        if not isinstance(prompt, str) or not isinstance(accepted, list) or not accepted:
            raise DataError(f"{path}, line {number}: a question needs 'prompt' (text) and 'accepted' (a list).")
        found.append(Question(prompt, tuple(map(str, accepted))))
    return found


def to_json(metrics: PairMetrics | AnswerMetrics | None) -> dict[str, float | int | None]:
    """A metrics object as plain numbers."""
    return asdict(metrics) if metrics else {}


def write_json(path: Path, value: object) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
