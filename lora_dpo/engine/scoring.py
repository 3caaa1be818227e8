"""Log-probabilities of both answers of each pair, with whatever the model now is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_dpo.data import TokenPair
from lora_dpo.model.lora import base_of

if TYPE_CHECKING:
    import torch

TOKENS_PER_BATCH = 2048


def score_pairs(
    model: torch.nn.Module,
    pairs: Sequence[TokenPair],
    *,
    pad_id: int,
    on_pair: Callable[[int], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Log-probability of each chosen and each rejected answer, `(chosen, rejected)` of N numbers each.

    The model is scored as it is: inside `reference(model)` with the adapters off. Rows so long that rotary frequencies
    would depend on what is beside them are scored one by one.

    Args:
        on_pair: called with the number of pairs done so far.
    """
    from lora_dpo.engine.proof import unsupported_reason
    from lora_dpo.engine.rope import shared_rope_limit

    streams = unsupported_reason(base_of(model)) is None
    found = shared_rope_limit(base_of(model).config)
    if found is not None:
        _forget_longest(model)
    chosen, rejected = [0.0] * len(pairs), [0.0] * len(pairs)
    finished = 0
    for batch in _batches(pairs, limit=found[1] if found is not None else None):
        part = [pairs[index] for index in batch]
        if found is not None and len(part) == 1 and _longest(part[0]) > found[1]:
            scores = _logps_one_by_one(model, part[0], pad_id)
        else:
            scores = (_stream_logps if streams else _padded_logps)(model, part, pad_id)
        for index, of_chosen, of_rejected in zip(batch, *scores, strict=True):
            chosen[index], rejected[index] = of_chosen, of_rejected
        finished += len(batch)
        if on_pair:
            on_pair(finished)
    return chosen, rejected


def _batches(pairs: Sequence[TokenPair], *, limit: int | None) -> Iterator[list[int]]:
    """Indices of pairs of like length, at most `TOKENS_PER_BATCH` tokens together, at least one pair.

    Args:
        limit: pairs with a longer row come alone, at the end.
    """
    sizes = [2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    alone = [index for index, pair in enumerate(pairs) if limit is not None and _longest(pair) > limit]
    batch: list[int] = []
    for index in sorted(set(range(len(pairs))) - set(alone), key=lambda index: (sizes[index], index)):
        if batch and sizes[index] * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
    yield from ([index] for index in alone)


def _longest(pair: TokenPair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def _forget_longest(model: Any) -> None:
    """Make a rotary embedding of the kind `dynamic` begin anew: it keeps the frequencies of the longest row so far,
    until one comes that is short."""
    import torch

    base = base_of(model)
    one_11 = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    with torch.no_grad():
        base.base_model(input_ids=one_11, use_cache=False)


def _logps_one_by_one(model: Any, pair: TokenPair, pad_id: int) -> tuple[list[float], list[float]]:
    """Score a pair of long rows, each as if it were alone."""
    scores = []
    for answer in (pair.chosen, pair.rejected):
        _forget_longest(model)
        scores.append(_padded_logps(model, [replace(pair, chosen=answer, rejected=answer)], pad_id)[0])
    return scores[0], scores[1]


def _stream_logps(model: Any, pairs: Sequence[TokenPair], pad_id: int) -> tuple[list[float], list[float]]:
    """Score without padding, each prompt once (`lora_dpo.engine`)."""
    import torch

    from lora_dpo.engine.layout import lay_out
    from lora_dpo.engine.logprobs import to_rows
    from lora_dpo.engine.pair_forward import label_values, stream_attention, stream_hidden, to_device

    base = base_of(model)
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
