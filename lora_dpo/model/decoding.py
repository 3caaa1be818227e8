"""Answers from a model: one decode loop for chat, evaluation and sampling.

Shape suffixes: B rows of a batch, P longest prompt, V vocabulary.

Finished rows leave the batch, so a batch of uneven answers costs what its tokens cost. (With plain
`generate` every row runs as long as the longest one.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data.chat_template import Message, prompt_ids
from lora_dpo.data.thoughts import answer_decoder, opened_thought, split_thought, thought_tokens
from lora_dpo.errors import ConfigError
from lora_dpo.model.answering import AnsweringAdapter
from lora_dpo.model.device import free_bytes
from lora_dpo.text import shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MAX_TEMPERATURE = 100.0
"""Every token is as likely as any other there."""
SHORTCUT = 1024
"""The likeliest tokens, which hold `top_p` but for rare rows."""
MIN_TEMPERATURE = 1e-6
"""Below it quotients of logits would overflow float32; there the likeliest token alone is drawn, but for ties."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy: always the likeliest token.

    Raises:
        ConfigError: a value with which nothing can be drawn.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values: they come from commands, recipes, pages and requests."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {shown(self.max_new_tokens)}: an answer has 1 or more.")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:  # NaN is not, either
            raise ConfigError(f"temperature is {shown(self.temperature)}: allowed is 0 to {MAX_TEMPERATURE:g}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {shown(self.top_p)}: allowed is above 0, up to 1.")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed is {shown(self.seed)}: allowed is what 64 bits hold.")


@dataclass(frozen=True)
class Answer:
    """One generated answer. `tokens` counts the answer without its end-of-turn token."""

    text: str
    tokens: int
    finished: bool
    """True if the model ended the turn itself, False if `max_new_tokens` cut it."""
    thought_tokens: int = 0
    """Tokens of `tokens` that were thought before the answer."""

    @property
    def said(self) -> str:
        """`text` without the thought at its start."""
        return split_thought(self.text)[1] if self.thought_tokens else self.text

    @property
    def said_tokens(self) -> int:
        """`tokens` without those of the thought."""
        return self.tokens - self.thought_tokens


def note_of_thoughts(answers: Sequence[Answer]) -> str | None:
    """That answers begin with thoughts, and what these are not counted in; None if none does."""
    thinking = [answer for answer in answers if answer.thought_tokens]
    if not thinking:
        return None
    cut = sum(not answer.said and not answer.finished for answer in thinking)
    return (
        f"{len(thinking)} of {len(answers)} answers begin with a thought: lengths, repetition and judges leave it out"
        + (f"; {cut} were cut before they said anything, so raise max_new_tokens" if cut else "")
        + "."
    )


def answer_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], stops: frozenset[int]
) -> Answer:
    """The answer that ids spell, without a stop token at their end; a thought that the prompt began is whole in it."""
    finished = bool(ids) and ids[-1] in stops
    kept = list(ids[:-1] if finished else ids)
    opened = opened_thought(tokenizer, prompt)
    text = opened + answer_decoder(tokenizer)(kept).strip()
    return Answer(text, len(kept), finished, thought_tokens(tokenizer, kept, opened=bool(opened)))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    sampling: Sampling | None = None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    batch_size: int | None = None,
    on_answer: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer each conversation with the model as it is now (adapters on or off).

    Args:
        conversations: chat messages, each list ending with the user's turn.
        chat_template_kwargs: keywords for the chat template.
        batch_size: rows decoded together; prompts of like length share a batch. None: as many as fit, at most 128.
        on_answer: called with the number of answers done so far.

    Returns:
        One `Answer` per conversation, in the order given.
    """
    sampling = sampling or Sampling()
    prompts = [prompt_ids(tokenizer, said, chat_template_kwargs=chat_template_kwargs) for said in conversations]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    together = batch_size or rows_that_fit(model, longest)
    ended = 0
    answers: dict[int, Answer] = {}
    for start in range(0, len(prompts), together):
        rows = by_length[start : start + together]
        written: list[list[int]] = [[] for _ in rows]
        stops = stop_token_ids(model, tokenizer)
        for row, token in decode(model, [prompts[index] for index in rows], stops, sampling):
            written[row].append(token)
            if on_answer and token in stops:
                ended += 1
                on_answer(ended)
        for index, tokens in zip(rows, written, strict=True):
            answers[index] = answer_of(tokenizer, prompts[index], tokens, stops)
        if on_answer and ended < len(answers):
            on_answer(len(answers))  # those that `max_new_tokens` cut
        ended = len(answers)
    return [answers[index] for index in range(len(prompts))]


def rows_that_fit(model: PreTrainedModel, tokens: int) -> int:
    """Rows of `tokens` tokens whose keys and values take at most a quarter of the free memory: 1 to 128.

    A step of one row costs nearly as much as a step of 32, since both read every weight once. The quickstart's 101
    prompts took 81 s in batches of 32, 52 s of 64 and 41 s in one (2 CPU cores).
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embeddings = model.get_input_embeddings()
    # Keys and values are in the base's numbers. A copy that is trained whole is float32, and its output is cast.
    weight = getattr(embeddings, "original_module", embeddings).weight
    return rows_in(
        free_bytes(weight.device), 2 * config.num_hidden_layers * heads * size * weight.element_size() * tokens
    )


def rows_in(free: float, row_bytes: int) -> int:
    """Rows that are written at once with so much free memory, if each keeps `row_bytes` of keys and values."""
    return int(max(1, min(128, free // 4 // row_bytes)))


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    *,
    sampling: Sampling | None = None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> Generator[str, None, Answer]:
    """Yield one answer in pieces of text, as they are decoded; the generator's return value is the whole `Answer`.

    A thought that the prompt began is whole: its tag comes first.
    """
    prompt = prompt_ids(tokenizer, conversation, chat_template_kwargs=chat_template_kwargs)
    opened = opened_thought(tokenizer, prompt)
    if opened:
        yield opened
    answer = yield from stream_from(model, tokenizer, prompt, sampling=sampling)
    return replace(answer, text=opened + answer.text)


def stream_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Generator[str, None, Answer]:
    """`stream` for a prompt of token ids.

    Yields one piece a token, also where it is empty, so that a caller can stop at any of them: text is held back
    while it may still be a part of a character or of a text in `stop`.

    Args:
        stop: the answer ends before the first of these texts, as if the model had ended its turn there.
    """
    stops = stop_token_ids(model, tokenizer)
    opened, text_of = bool(opened_thought(tokenizer, prompt)), answer_decoder(tokenizer)
    tokens: list[int] = []
    text, shown, finished = "", 0, False
    for _, token in decode(model, [prompt], stops, sampling or Sampling()):
        if token in stops:
            finished = True
            break
        tokens.append(token)
        text = text_of(tokens)
        if (end := first_of(text, stop)) is not None:
            yield text[shown:end]
            return Answer(text[:end], len(tokens), True, thought_tokens(tokenizer, tokens, opened=opened))
        # A character may take several tokens; until it is whole it decodes to U+FFFD.
        ready = shown if text.endswith("\ufffd") else max(shown, len(text) - held_back(text, stop))
        yield text[shown:ready]
        shown = ready
    if len(text) > shown:
        yield text[shown:]  # an answer that ends inside a character, or with the beginning of a stop text
    return Answer(text, len(tokens), finished, thought_tokens(tokenizer, tokens, opened=opened))


def first_of(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of some texts begins in `text`; None if none of them is in it."""
    return min((text.find(word) for word in stop if word in text), default=None)


def held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of one of the texts in `stop`."""
    longest = max(map(len, stop), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if any(word.startswith(text[-length:]) for word in stop)), 0)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a turn: the tokenizer's EOS and all that the generation config names."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stops: frozenset[int], sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """Yield `(row, token)` for each new token, a stop token included; rows end independently."""
    import torch
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    draws = torch.Generator(device=device).manual_seed(sampling.seed)
    ids_BP, mask_BP = _left_pad(prompts, pad=min(stops, default=0), device=device)
    position_B = mask_BP.sum(dim=1)
    inputs = {"input_ids": ids_BP, "position_ids": (mask_BP.cumsum(dim=1) - 1).clamp(min=0)}
    cache = DynamicCache(config=model.config)
    rows = list(range(len(prompts)))  # the prompt that each row of the batch answers
    alive = list(range(len(prompts)))  # the rows still writing
    adapter = AnsweringAdapter(model)
    for _ in range(sampling.max_new_tokens):
        with torch.no_grad(), adapter.on():  # not inside the yield: the caller's grad mode is its own
            output = model(**inputs, attention_mask=mask_BP, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = pick(output.logits[:, -1].float(), sampling, draws)
        token_list = tokens.tolist()
        yield from ((rows[i], token_list[i]) for i in alive)
        alive = [i for i in alive if token_list[i] not in stops]
        if not alive:
            return
        if len(alive) <= 0.8 * len(rows):  # each shrink copies the cache: not for every single row
            keep = torch.tensor(alive, device=device)
            cache.batch_select_indices(keep)
            tokens, mask_BP, position_B = tokens[keep.to(tokens.device)], mask_BP[keep], position_B[keep]
            rows = [rows[i] for i in alive]
            alive = list(range(len(rows)))
        inputs = {"input_ids": tokens[:, None].to(device), "position_ids": position_B[:, None]}
        mask_BP = torch.cat([mask_BP, mask_BP.new_ones(len(rows), 1)], dim=1)
        position_B = position_B + 1


def pick(logits_BV: torch.Tensor, sampling: Sampling, draws: torch.Generator) -> torch.Tensor:
    """Choose one token a row: `[B, V]` logits to `[B]` ids (nucleus sampling, Holtzman et al. 2020).

    All of it is computed where the logits are; `draws` is a generator of that device.
    """
    import torch

    if sampling.temperature <= 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV / max(sampling.temperature, MIN_TEMPERATURE), dim=-1)
    if sampling.top_p >= 1:
        return torch.multinomial(probs_BV, 1, generator=draws).squeeze(1)
    # Sorting a whole vocabulary costs as much as a third of a small model's step: sort the likeliest
    # 1,024 first, and the rest only in rows where they hold less than top_p.
    top_BK, order_BK = probs_BV.topk(min(SHORTCUT, probs_BV.shape[1]), dim=-1)
    wide_B = top_BK.sum(dim=-1) < sampling.top_p
    chosen_B = order_BK.gather(1, torch.multinomial(_nucleus(top_BK, sampling.top_p), 1, generator=draws)).squeeze(1)
    if bool(wide_B.any()):
        top_WV, order_WV = probs_BV[wide_B].sort(dim=-1, descending=True)
        drawn_W1 = torch.multinomial(_nucleus(top_WV, sampling.top_p), 1, generator=draws)
        chosen_B[wide_B] = order_WV.gather(1, drawn_W1).squeeze(1)
    return chosen_B


def _nucleus(sorted_BK: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities, the likeliest first, with 0 in place of those beyond the smallest set that reaches `top_p`."""
    # A token is dropped if those before it already reach it.
    beyond_BK = sorted_BK.cumsum(dim=-1) - sorted_BK >= top_p
    beyond_BK[:, 0] = False  # the likeliest stays, also if float32 holds top_p as 0
    return sorted_BK.masked_fill(beyond_BK, 0.0)


def _left_pad(prompts: Sequence[Sequence[int]], *, pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to `[B, P]` ids and mask, real tokens at the right end."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), longest), pad)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask_BP[row, longest - len(prompt) :] = 1
    return ids_BP.to(device), mask_BP.to(device)
