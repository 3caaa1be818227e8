"""A look at a model in the middle of its training: answers to a few fixed prompts, and what is measured beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.thoughts import said_length
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.evaluation.kl import kl_to_reference
from lora_dpo.files import write_json
from lora_dpo.judging import Judge
from lora_dpo.model.decoding import Answer, Sampling, answer_of, decode, stop_token_ids
from lora_dpo.model.lora import reference
from lora_dpo.training.guard.monitor import HealthSample

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_dpo.data import TokenPair
    from lora_dpo.data.answers import TokenAnswer
    from lora_dpo.training.prepared import Run


@dataclass(frozen=True)
class HealthPrompt:
    """A prompt to answer, and how long a good answer to it is; both in tokens."""

    prompt: list[int]
    good: int


class CompletionSampler:
    """Looks at one run's model. Nothing of it is random, and the model is left as it was."""

    def __init__(self, run: Run, model: PeftModel) -> None:
        self.run, self.model = run, model
        self.limit = run.recipe.health.max_new_tokens
        kwargs = run.chat_template_kwargs
        asked = [prompt_ids(run.tokenizer, prompt, chat_template_kwargs=kwargs) for prompt in run.prompts]
        self._messages = {tuple(ids): prompt for ids, prompt in zip(asked, run.prompts, strict=True)}
        self.prompts = health_prompts(run, self._messages.keys())
        """What is answered at each look."""
        self.judge: Judge | None = None
        self.reference_before: float | None = None
        """The reference's score before the first step."""
        self.seconds = 0.0
        """Spent so far."""

    def first(self, known: Sequence[Answer] = (), *, shared: Path | None = None) -> HealthSample | None:
        """The look before the first step, when the policy is the reference; None without prompts.

        Args:
            known: greedy answers to the run's prompts that are there already; only other prompts are answered anew.
            shared: a file that runs on the same base share: the look that the first of them takes here is that of all
                with the same prompts.
        """
        with self._at_rest():
            self.reference_before = self._reference_score()
            if not self.prompts:
                return None
            if self.run.recipe.evaluation.max_new_tokens >= self.limit:
                by_prompt = dict(zip(self._messages, known, strict=False))
                found = [by_prompt.get(tuple(prompt.prompt)) for prompt in self.prompts]
                answers = [self._cut(answer) for answer in found if answer is not None]
                if len(answers) == len(self.prompts):
                    return self._sample(0, answers, None)
            return self._answers(0) if shared is None else self._shared(shared)

    def _shared(self, path: Path) -> HealthSample:
        asked = [prompt.prompt for prompt in self.prompts]
        found = {"prompts": asked, "limit": self.limit, "judges": self.run.recipe.health.judges}
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if {name: stored.get(name) for name in found} == found:
            return HealthSample.restored(stored["sample"])
        sample = self._answers(0)
        write_json(path, {**found, "sample": asdict(sample)})
        return sample

    def look(self, step: int) -> HealthSample:
        """Answer the prompts with the model as it is now."""
        with self._at_rest():
            sample = self._answers(step)
            score = self._reference_score()
        if score is None or self.reference_before is None:
            return sample
        return replace(sample, reference_shift=abs(score - self.reference_before))

    def asked(self) -> list[str]:
        """The prompts as text."""
        return [self._text_of(prompt.prompt) for prompt in self.prompts]

    def chosen_tokens(self) -> tuple[int, ...]:
        """Length of each prompt's good answer, cut as the answers are."""
        return tuple(min(prompt.good, self.limit) for prompt in self.prompts)

    def _answers(self, step: int) -> HealthSample:
        tokenizer, prompts = self.run.tokenizer, [prompt.prompt for prompt in self.prompts]
        stops = stop_token_ids(self.model, tokenizer)
        written: list[list[int]] = [[] for _ in prompts]
        for row, token in decode(self.model, prompts, stops, Sampling(max_new_tokens=self.limit)):
            written[row].append(token)
        answers = [answer_of(tokenizer, ids, said, stops) for ids, said in zip(prompts, written, strict=True)]
        kl = None
        if step:  # before the first step the policy is the reference
            # Every third answer: scoring one costs as much as writing it.
            sums = kl_to_reference(self.model, list(zip(prompts, written, strict=True))[::3])
            tokens = sum(count for _, count in sums)
            kl = sum(value for value, _ in sums) / tokens if tokens else None
        return self._sample(step, answers, kl)

    def _cut(self, answer: Answer) -> Answer:
        """A longer answer as it would have been at a look."""
        if answer.tokens < self.limit:
            return answer
        thought = min(answer.thought_tokens, self.limit)
        ids = self.run.tokenizer.encode(answer.text, add_special_tokens=False)[: self.limit]
        return Answer(str(self.run.tokenizer.decode(ids)).strip(), self.limit, False, thought)

    def _sample(self, step: int, answers: Sequence[Answer], kl: float | None) -> HealthSample:
        return HealthSample(
            step=step,
            tokens=tuple(_length(answer) for answer in answers),
            finished=tuple(answer.finished for answer in answers),
            texts=tuple(answer.said for answer in answers),
            kl=kl,
            score=self._score(answers),
        )

    def _score(self, answers: Sequence[Answer]) -> float | None:
        if self.judge is None:
            return None
        scores = []
        for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True), start=1):
            messages = self._messages.get(tuple(prompt.prompt))
            if messages is not None:
                scores += self.judge.score(Prompt(messages, "health", number), [answer])
        known = [score for score in scores if score is not None]
        return fmean(known) if known else None

    def _reference_score(self) -> float | None:
        """The reference's log-probability of the shortest training pair, nats a token."""
        if not self.run.train:
            return None
        pair = min(self.run.train, key=lambda one: len(one.prompt) + len(one.chosen) + len(one.rejected))
        pad = self.run.tokenizer.pad_token_id
        with reference(self.model):
            chosen, rejected = score_pairs(self.model, [pair], pad_id=pad if pad is not None else 0)
        return (chosen[0] + rejected[0]) / (len(pair.chosen) + len(pair.rejected))

    def _text_of(self, prompt: list[int]) -> str:
        messages = self._messages.get(tuple(prompt))
        if messages is not None:
            return messages[-1]["content"]
        return str(self.run.tokenizer.decode(prompt, skip_special_tokens=True))

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        was_training, began = self.model.training, time.perf_counter()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)
            self.seconds += time.perf_counter() - began


def _length(answer: Answer) -> int:
    """Tokens that an answer says; of one that was cut while it thought all of them, since it is no short answer."""
    return answer.said_tokens if answer.said or answer.finished else answer.tokens


def health_prompts(run: Run, answered: Collection[tuple[int, ...]] = ()) -> list[HealthPrompt]:
    """`health.prompts` prompts, spread over the held-out data if there is any, each prompt once.

    Args:
        answered: prompts that are answered before training anyway: if there are any of them, no others are taken.
    """
    good = _good_answers(run.held_out, run.held_out_answers) or _good_answers(run.train, run.answers)
    unique: dict[tuple[int, ...], HealthPrompt] = {}
    for prompt, answer in good:
        # what follows the question, such as an empty thought that the template adds, is the model's own to write
        asked = max((ids for ids in answered if tuple(prompt[: len(ids)]) == ids), key=len, default=tuple(prompt))
        # less one: the end of turn, which answers are counted without
        unique.setdefault(asked, HealthPrompt(list(asked), said_length(run.tokenizer, prompt, answer)))
    found = [prompt for ids, prompt in unique.items() if ids in answered] or list(unique.values())
    return [found[index] for index in evenly_spaced(len(found), run.recipe.health.prompts)]


def _good_answers(pairs: Sequence[TokenPair], answers: Sequence[TokenAnswer]) -> list[tuple[list[int], list[int]]]:
    """Prompts, each with an answer that is known to be good."""
    if pairs:
        return [(pair.prompt, pair.chosen) for pair in pairs]
    return [(one.prompt, one.answer) for one in answers if one.up]
