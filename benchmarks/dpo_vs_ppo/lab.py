"""One base in memory, sampled from and scored; adapters come and go on it.

Shape suffixes: B sequences, T answer tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_dpo import Sampling, attach_lora, reference
from lora_dpo.config.recipe import LoraSection
from lora_dpo.model.base import Base
from lora_dpo.model.decoding import decode, stop_token_ids
from lora_dpo.model.lora import base_of, detach

from .maths import exact_kl
from .reward import rewards

ROWS = 32
"""Sequences that are scored together: two tables of log-probabilities over the vocabulary are held at once."""


@dataclass(frozen=True)
class Answer:
    """A sampled continuation and its true reward."""

    prompt: int
    """Number of the prompt in the list that was asked."""
    tokens: list[int]
    text: str
    reward: float


@dataclass
class Lab:
    """The base, and what everything on it may use."""

    base: Base
    lora: LoraSection
    longest: int
    """Tokens of a continuation; one that the model ends itself is shorter."""
    tokens_sampled: int = field(default=0)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain openings."""
        return [list(self.base.tokenizer(text)["input_ids"]) for text in texts]

    @contextmanager
    def fresh(self, seed: int) -> Iterator[Any]:
        """A new adapter on the base, taken off at the end of the block."""
        model = attach_lora(self.base.model, self.lora, seed=seed)
        try:
            yield model
        finally:
            self.base.model = detach(model)

    @contextmanager
    def saved(self, folder: Path | None, *, trainable: bool = False) -> Iterator[Any]:
        """An adapter of this study on the base, or the base itself; taken off at the end of the block."""
        if folder is None:
            yield self.base.model
            return
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.base.model, str(folder), is_trainable=trainable)
        try:
            yield model.train(trainable)
        finally:
            self.base.model = detach(model)

    def sample(
        self, model: Any, prompts: Sequence[Sequence[int]], *, seed: int, temperature: float = 1.0
    ) -> list[Answer]:
        """One continuation a prompt, drawn from the whole distribution."""
        stops = stop_token_ids(base_of(model), self.base.tokenizer)
        sampling = Sampling(max_new_tokens=self.longest, temperature=temperature, seed=seed)
        tokens: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(prompts), ROWS):
            part = prompts[start : start + ROWS]
            for row, token in decode(model, part, stops, _with_seed(sampling, seed + start)):
                tokens[start + row].append(token)
        self.tokens_sampled += sum(map(len, tokens))
        texts = [str(self.base.tokenizer.decode(one, skip_special_tokens=True)) for one in tokens]
        found = zip(tokens, texts, rewards(texts), strict=True)
        return [Answer(index, one, text, reward) for index, (one, text, reward) in enumerate(found)]


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=seed)


# --- scoring --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Openings and continuations as one padded table; continuations start in the same column."""

    ids: torch.Tensor
    attention: torch.Tensor
    answers: torch.Tensor
    """`[B, T]` ids; 0 where the mask is."""
    mask: torch.Tensor
    """`[B, T]`, 1 on answer tokens."""


def rows_of(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Rows:
    """Openings padded on the left, continuations on the right."""
    before, after = max(map(len, prompts)), max(map(len, answers))
    ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = before - len(prompt), before + len(answer)
        ids[row, start:end] = torch.tensor([*prompt, *answer])
        attention[row, start:end] = 1
    return Rows(ids, attention, ids[:, before:], attention[:, before:].float())


def hidden_of(model: Any, rows: Rows) -> torch.Tensor:
    """`[B, T, H]`: the last hidden state at the place that predicts each answer token."""
    inner = base_of(model)
    count = rows.answers.shape[1]
    device = inner.get_input_embeddings().weight.device
    attention = rows.attention.to(device)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    states = inner.base_model(
        input_ids=rows.ids.to(device), attention_mask=attention, position_ids=positions, use_cache=False
    ).last_hidden_state
    return states[:, -count - 1 : -1]


def logps_of(model: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
    """`[B, T, V]` log-probabilities."""
    return torch.log_softmax(base_of(model).get_output_embeddings()(hidden_BTH).float(), dim=-1)


def taken(table_BTV: torch.Tensor, rows: Rows) -> torch.Tensor:
    """`[B, T]`: the log-probabilities of the answers' own tokens, 0 outside the mask."""
    chosen = table_BTV.gather(2, rows.answers.to(table_BTV.device)[..., None]).squeeze(2).cpu()
    return chosen * rows.mask


@dataclass(frozen=True)
class Scored:
    """`[B, T]` each: log π, log π_ref, KL of the next token, and the hidden states `[B, T, H]` of the policy."""

    logps: torch.Tensor
    ref: torch.Tensor
    kl: torch.Tensor
    hidden: torch.Tensor


def score(model: Any, rows: Rows) -> Scored:
    """Policy and reference on the same answers: adapters on, then off. No gradient."""
    with torch.no_grad():
        hidden = hidden_of(model, rows)
        policy_BTV = logps_of(model, hidden)
        with reference(model):
            ref_BTV = logps_of(model, hidden_of(model, rows))
        kl = exact_kl(policy_BTV, ref_BTV).cpu() * rows.mask
        return Scored(taken(policy_BTV, rows), taken(ref_BTV, rows), kl, hidden.float().cpu())


def kl_of(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """KL(π‖base) in nats of each sampled answer."""
    found: list[float] = []
    for start in range(0, len(prompts), ROWS):
        rows = rows_of(prompts[start : start + ROWS], answers[start : start + ROWS])
        found += score(model, rows).kl.sum(dim=1).tolist()
    return found


def log_ratios(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """log π(y) - log π_base(y) of each answer: DPO's implicit reward over β."""
    found: list[float] = []
    for start in range(0, len(prompts), ROWS):
        scored = score(model, rows_of(prompts[start : start + ROWS], answers[start : start + ROWS]))
        found += (scored.logps - scored.ref).sum(dim=1).tolist()
    return found


# --- what a piece of work costs -------------------------------------------------------------------


@dataclass
class Cost:
    """Seconds, sampled tokens, and the highest memory of the process above what it held at the start."""

    seconds: float = 0.0
    tokens: int = 0
    peak_gb: float = 0.0


@contextmanager
def costing(lab: Lab) -> Iterator[Cost]:
    """Measure the block; memory is looked at 20 times a second."""
    cost, process, done = Cost(), psutil.Process(), threading.Event()
    before, tokens, started = process.memory_info().rss, lab.tokens_sampled, time.perf_counter()

    def watch() -> None:
        while not done.wait(0.05):
            cost.peak_gb = max(cost.peak_gb, (process.memory_info().rss - before) / 1e9)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield cost
    finally:
        done.set()
        watcher.join()
        cost.seconds = time.perf_counter() - started
        cost.tokens = lab.tokens_sampled - tokens
