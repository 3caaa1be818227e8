"""What training changed, on pairs and prompts that it never saw.

Shape suffixes: N pairs, B sequences of a batch, R rows (chosen, then rejected), T tokens, L labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from lora_dpo.data.questions import Question, is_correct
from lora_dpo.model.decoding import Answer


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
    thought_tokens: float = 0.0
    """Mean tokens that were thought before an answer: no part of `mean_tokens`."""


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


def answer_metrics(
    answers: Sequence[Answer],
    *,
    chosen_mean_tokens: float,
    questions: Sequence[Question] = (),
    question_answers: Sequence[Answer] = (),
) -> AnswerMetrics:
    """Length and completeness over `answers`, correctness over `question_answers`."""
    right = [is_correct(a.said, q.accepted) for q, a in zip(questions, question_answers, strict=True)]
    return AnswerMetrics(
        answers=len(answers),
        mean_tokens=fmean(answer.said_tokens for answer in answers) if answers else 0.0,
        finished=fmean(answer.finished for answer in answers) if answers else 0.0,
        chosen_mean_tokens=chosen_mean_tokens,
        questions=len(right),
        correct=fmean(right) if right else None,
        thought_tokens=fmean(answer.thought_tokens for answer in answers) if answers else 0.0,
    )


def to_json(metrics: PairMetrics | AnswerMetrics | None) -> dict[str, float | int | None]:
    """A metrics object as plain numbers."""
    return asdict(metrics) if metrics else {}
