"""K answers to every prompt, sampled in batches and kept in a journal, so that nothing is sampled twice.

The batches and each batch's seed follow from prompts and settings alone: a run that was killed and went
on has the same answers as one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data import Message
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.data.journal import Journal, Row
from lora_dpo.data.prompts import Prompt, prompts_hash
from lora_dpo.model.decoding import Answer, Sampling, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """An answer, and what it takes to draw it again."""

    answer: Answer
    id: str
    """`PROMPT/ANSWER`, both counted from 0, as in the journal."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How many answers, drawn how."""

    answers: int = 4
    """Answers a prompt."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.95))
    system: str | None = None
    """A system turn before every prompt while sampling; it does not become part of a pair."""
    batch_size: int = 32
    """Answers decoded together. Other batches draw other answers, so it is part of the plan."""

    def facts(self) -> dict[str, Any]:
        """The plan as plain values, for the journal and the origin of pairs."""
        how = self.sampling
        return {
            "answers": self.answers,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "max_new_tokens": how.max_new_tokens,
            "seed": how.seed,
            "system": self.system,
            "batch_size": self.batch_size,
        }


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    plan: SamplePlan,
    *,
    journal: Path,
    policy: Mapping[str, Any],
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    on_answer: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """Sample `plan.answers` answers to each prompt; continue if the journal holds some already.

    Args:
        policy: what identifies the model that answers; answers of another one are refused.
        chat_template_kwargs: keywords for the chat template; they belong to `policy`, too.
        on_answer: called with the number of answers that there are, the journal's included.

    Returns:
        The answers of each prompt, in the order of `prompts`.

    Raises:
        OutputError: the journal holds answers of other prompts, settings or weights.
    """
    log = Journal(journal, {**policy, **plan.facts(), "prompts_sha256": prompts_hash(prompts)})
    batches = _batches(tokenizer, prompts, plan, chat_template_kwargs)
    done = _finished_batches(log, batches)
    found = {(row["prompt"], row["answer"]): _sample(row) for row in log.rows if row["batch"] in done}
    if on_answer:
        on_answer(len(found))
    for number, batch in enumerate(batches):
        if number in done:
            continue
        rows = _draw(model, tokenizer, prompts, plan, batch, number, chat_template_kwargs)
        log.append(rows)
        found.update({(row["prompt"], row["answer"]): _sample(row) for row in rows})
        if on_answer:
            on_answer(len(found))
    return [[found[index, which] for which in range(plan.answers)] for index in range(len(prompts))]


def _draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    plan: SamplePlan,
    batch: Sequence[tuple[int, int]],
    number: int,
    kwargs: TemplateKwargs,
) -> list[Row]:
    """One batch of answers as rows of the journal."""
    seed = batch_seed(plan.sampling.seed, number)
    asked = [conversation(prompts[index], plan.system) for index, _ in batch]
    sampling = replace(plan.sampling, seed=seed)
    answers = generate(model, tokenizer, asked, sampling=sampling, chat_template_kwargs=kwargs, batch_size=len(batch))
    return [
        {
            "prompt": index,
            "answer": which,
            "text": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
            **({"thought_tokens": answer.thought_tokens} if answer.thought_tokens else {}),
            "batch": number,
            "seed": seed,
        }
        for (index, which), answer in zip(batch, answers, strict=True)
    ]


def batch_seed(seed: int, batch: int) -> int:
    """A seed of its own for each batch, unlike those of runs with a neighbouring seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:6])


def conversation(prompt: Prompt, system: str | None) -> list[Message]:
    """What the model is asked: the prompt, after the plan's system turn unless it has one of its own."""
    own = prompt.messages[0]["role"] == "system"
    turns = [Message(role="system", content=system)] if system and not own else []
    return [*turns, *prompt.messages]


def _batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], plan: SamplePlan, kwargs: TemplateKwargs
) -> list[list[tuple[int, int]]]:
    """`(prompt, answer)` pairs, cut into batches of prompts of like length."""
    asked = [conversation(prompt, plan.system) for prompt in prompts]
    lengths = [len(prompt_ids(tokenizer, turns, chat_template_kwargs=kwargs)) for turns in asked]
    order = sorted(range(len(prompts)), key=lambda index: lengths[index])
    rows = [(index, which) for index in order for which in range(plan.answers)]
    return [rows[start : start + plan.batch_size] for start in range(0, len(rows), plan.batch_size)]


def _finished_batches(log: Journal, batches: Sequence[Sequence[tuple[int, int]]]) -> set[int]:
    """Batches whose answers are all in the journal; one that was cut off in the middle is drawn again."""
    held: dict[int, set[tuple[int, int]]] = {}
    for row in log.rows:
        held.setdefault(row["batch"], set()).add((row["prompt"], row["answer"]))
    return {number for number, batch in enumerate(batches) if held.get(number) == set(batch)}


def _sample(row: Row) -> Sample:
    answer = Answer(row["text"], row["tokens"], row["finished"], row.get("thought_tokens", 0))
    return Sample(answer, f"{row['prompt']}/{row['answer']}", row["seed"])
