"""What training changed, on pairs and prompts that it never saw.

Shape suffixes: N pairs, B sequences of a batch, R rows (chosen, then rejected), T tokens, L labelled tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_dpo.data import TokenPair
from lora_dpo.data.files import read_rows
from lora_dpo.errors import DataError
from lora_dpo.files import replace_file
from lora_dpo.generate import Answer
from lora_dpo.model import bare

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
    on_pair: Callable[[int], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Log-probability of each chosen and each rejected answer, `(chosen, rejected)` of N numbers each.

    The model is scored as it is: inside `reference(model)` with the adapters off.

    Args:
        on_pair: called with the number of pairs done so far.
    """
    from lora_dpo.shared_prefix.model import unsupported_reason

    streams = unsupported_reason(bare(model)) is None
    chosen, rejected = [0.0] * len(pairs), [0.0] * len(pairs)
    finished = 0
    for batch in _batches(pairs):
        part = [pairs[index] for index in batch]
        scores = (_stream_logps if streams else _padded_logps)(model, part, pad_id)
        for index, of_chosen, of_rejected in zip(batch, *scores, strict=True):
            chosen[index], rejected[index] = of_chosen, of_rejected
        finished += len(batch)
        if on_pair:
            on_pair(finished)
    return chosen, rejected


def _batches(pairs: Sequence[TokenPair]) -> Iterator[list[int]]:
    """Indices of pairs of like length, at most `TOKENS_PER_BATCH` tokens together, at least one pair."""
    sizes = [2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    batch: list[int] = []
    for index in sorted(range(len(pairs)), key=lambda index: sizes[index]):
        if batch and sizes[index] * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _stream_logps(model: Any, pairs: Sequence[TokenPair], pad_id: int) -> tuple[list[float], list[float]]:
    """Score without padding, each prompt once (`lora_dpo.shared_prefix`)."""
    import torch

    from lora_dpo.shared_prefix.layout import lay_out
    from lora_dpo.shared_prefix.logprobs import to_rows
    from lora_dpo.shared_prefix.model import label_values, stream_attention, stream_hidden, to_device

    base = bare(model)
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = [pair.prompt for pair in pairs] * 2
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    masks = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    layout = lay_out(rows, masks, width=max(map(len, rows)))
    layout = to_device(layout, base.get_input_embeddings().weight.device)
    with torch.no_grad(), stream_attention(base):
        hidden_SE = stream_hidden(base, layout)
        values_L = label_values(base, hidden_SE, layout).log_probs
    sums: list[float] = to_rows(values_L, layout.source_RT).sum(dim=1).tolist()
    return sums[: len(pairs)], sums[len(pairs) :]


def _padded_logps(model: Any, pairs: Sequence[TokenPair], pad_id: int) -> tuple[list[float], list[float]]:
    """Score any architecture: whole sequences, padded on the left so that all answers end together."""
    import torch

    sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    device = next(model.parameters()).device
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    longest_answer = max(len(answer) for _, answer in sequences)
    ids_BT = torch.full((len(sequences), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    answer_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
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
    sums: list[float] = (logps * answer_BT[:, -longest_answer:].to(device)).sum(dim=1).tolist()
    return sums[: len(pairs)], sums[len(pairs) :]


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
    """Write readable JSON, whole or not at all."""
    replace_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def evenly(total: int, count: int) -> list[int]:
    """`count` indices spread evenly over `range(total)`: a fair sample, not the best."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
