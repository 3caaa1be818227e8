"""Token by token: how far a policy's next-token distributions are from its reference's, and how likely plain text is.

Shape suffixes: A answer tokens, V vocabulary, T tokens. One sequence runs at a time: two [A, V] tables are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data import Message
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.model.decoding import Sampling, decode, stop_token_ids
from lora_dpo.model.lora import reference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Ids = Sequence[int]
OnDone = Callable[[int], None]


def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    batch_size: int = 32,
    on_done: OnDone | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Ids `(prompt, answer)` for each conversation, in order; a stop token that was written is part of the answer."""
    prompts = [prompt_ids(tokenizer, said, chat_template_kwargs=chat_template_kwargs) for said in conversations]
    stops = stop_token_ids(model, tokenizer)
    written: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        for row, token in decode(model, prompts[start : start + batch_size], stops, sampling):
            written[start + row].append(token)
        if on_done:
            on_done(min(start + batch_size, len(prompts)))
    return list(zip(prompts, written, strict=True))


def kl_to_reference(
    model: Any, sequences: Sequence[tuple[Ids, Ids]], *, on_done: OnDone | None = None
) -> list[tuple[float, int]]:
    """For each `(prompt, answer)`: the sum over its tokens of KL(policy ‖ reference) in nats, and the tokens.

    At each token the whole distributions are compared, Σ_v π(v)·log(π(v) / π_ref(v)). Over answers that the policy
    drew itself at temperature 1 the mean is that of the usual log π(y) - log π_ref(y), with less variance and never
    below 0 (Amini et al. 2025, arXiv 2504.10637).
    """
    import torch

    found = []
    for done, (prompt, answer) in enumerate(sequences, start=1):
        if answer:
            policy_AV = _log_probs(model, prompt, answer)
            with reference(model):
                reference_AV = _log_probs(model, prompt, answer)
            kl_A = torch.sum(policy_AV.exp() * (policy_AV - reference_AV), dim=-1)
            found.append((float(kl_A.sum()), len(answer)))
        else:
            found.append((0.0, 0))
        if on_done:
            on_done(done)
    return found


def _log_probs(model: Any, prompt: Ids, answer: Ids) -> torch.Tensor:
    """`[A, V]` log-probabilities of what may stand at each place of the answer."""
    import torch

    device = model.get_input_embeddings().weight.device
    ids_T = torch.tensor([[*prompt, *answer]], device=device)
    with torch.no_grad():
        logits = model(input_ids=ids_T, use_cache=False, logits_to_keep=len(answer) + 1).logits
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)


def windows(ids: Ids, size: int) -> Iterator[Ids]:
    """Consecutive pieces of a text, each of at most `size` tokens and at least 2."""
    for start in range(0, len(ids) - 1, size):
        if len(ids) - start >= 2:
            yield ids[start : start + size]


def text_losses(model: Any, pieces: Sequence[Ids], *, on_done: OnDone | None = None) -> list[tuple[float, int]]:
    """For each piece of text: negative log-likelihood in nats of its tokens after the first, and how many."""
    import torch

    device = model.get_input_embeddings().weight.device
    found = []
    for done, piece in enumerate(pieces, start=1):
        ids_T = torch.tensor([list(piece)], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids_T, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids_T[0, 1:], reduction="sum")
        found.append((float(loss), len(piece) - 1))
        if on_done:
            on_done(done)
    return found
