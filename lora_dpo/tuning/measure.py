"""Measure policies on one part of the data, with the one base in memory.

What is the base's own is measured once and kept: its answers, and the reference's log-probabilities of the pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dpo.adapters.stored_pairs import Sides, StoredPairs
from lora_dpo.data import Message, PreferencePair, TokenPair, tokenize_pairs
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.data.doctor.checks import prompt_text
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.questions import Question, is_correct
from lora_dpo.data.thoughts import said_length
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import DataError
from lora_dpo.evaluation.kl import kl_to_reference
from lora_dpo.evaluation.suspicion import doubt_of
from lora_dpo.evaluation.verify_adapter import PAIRS as STORED
from lora_dpo.evaluation.verify_adapter import pad_of
from lora_dpo.evaluation.win_rate import judged
from lora_dpo.files import write_json
from lora_dpo.judging import Judge
from lora_dpo.model.base import Base
from lora_dpo.model.decoding import Answer, Sampling, generate
from lora_dpo.text import repetition
from lora_dpo.tuning.score import Measured

Tick = Callable[[str, int], Callable[[int], None]]
"""From a stage and its total to what is called with how much is done."""

GLANCE = 8
"""Pairs of a look in the middle of a trial."""
KL_ANSWERS = 8
"""Answers that KL is measured on: of each, one pass of the policy and one of the reference."""
CHAT = 0.25
"""Questions are asked of no base that gets fewer right: of another language, or of none."""


@dataclass(frozen=True)
class OfBase:
    """What the base says of a part: kept on the disk, and never measured twice."""

    answers: tuple[Answer, ...]
    """To the part's prompts, then to the questions."""
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    """The reference's log-probabilities of each pair's answers, nats."""


@dataclass(frozen=True)
class Found:
    """What was measured of a policy on a part."""

    measured: Measured
    answers: tuple[Answer, ...]
    """To the part's prompts."""
    scores: Sides
    """Log-probabilities of the chosen and the rejected answers of its pairs, nats."""


def of_each_prompt(pairs: Sequence[TokenPair], most: int) -> list[TokenPair]:
    """The first pair of each prompt, then the second of each, and so on, until there are `most`; in their own order.

    All pairs of a prompt are one unit of an interval, so a prompt's first pair tells more than its second.
    """
    seen: dict[tuple[int, ...], int] = {}
    ranked = []
    for index, pair in enumerate(pairs):
        turn = seen[tuple(pair.prompt)] = seen.get(tuple(pair.prompt), -1) + 1
        ranked.append((turn, index))
    return [pairs[index] for index in sorted(index for _, index in sorted(ranked)[:most])]


class Part:
    """One part of the data, tokenised: its pairs, the prompts that are answered, and the questions.

    Args:
        answers: prompts that are answered, at most, spread over the part.
        most_pairs: how many pairs are scored, if not all (`of_each_prompt`).

    Raises:
        DataError: no pair of it fits into `max_length`.
    """

    def __init__(
        self,
        name: str,
        base: Base,
        pairs: Sequence[PreferencePair],
        *,
        max_length: int,
        max_new_tokens: int,
        answers: int,
        most_pairs: int | None = None,
        questions: Sequence[Question] = (),
        judge: Judge | None = None,
        template: dict[str, Any] | None = None,
        tick: Tick,
    ) -> None:
        self.name, self.base, self.questions, self.judge, self.tick = name, base, list(questions), judge, tick
        self.template = template or {}
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        self.pairs, dropped = tokenize_pairs(
            base.tokenizer, pairs, max_length=max_length, chat_template_kwargs=self.template
        )
        if not self.pairs:
            raise DataError(f"No {name} pair is left: {dropped[0].reason}. Raise trainer.max_length?")
        first: dict[str, Prompt] = {}
        for pair in pairs:
            first.setdefault(prompt_text(pair.prompt), Prompt(pair.prompt, pair.origin.source, pair.origin.row))
        asked = list(first.values())
        self.prompts = [asked[index] for index in evenly_spaced(len(asked), answers)]
        if most_pairs is not None:
            self.pairs = of_each_prompt(self.pairs, most_pairs)
        self.chosen_tokens = fmean(said_length(base.tokenizer, pair.prompt, pair.chosen) for pair in self.pairs)
        self._of_base: OfBase | None = None
        self._measured_base: Measured | None = None

    @property
    def rows(self) -> int:
        """What is scored and answered when a policy is measured: pairs, prompts and questions."""
        return len(self.pairs) + len(self.prompts) + len(self.questions)

    # --- the base ---------------------------------------------------------------------------------

    def measure_base(self, cache: Path) -> None:
        """Measure the base, or read what was measured before.

        Args:
            cache: a file of JSON; written again where it holds another number of pairs or answers.
        """
        stored = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
        asked = len(self.prompts)
        known = (len(stored.get("answers", ())), len(stored.get("chosen", ())))
        if known == (asked + len(self.questions), len(self.pairs)):  # an earlier version measured more of a part
            answers = tuple(Answer(**answer) for answer in stored["answers"])
            self._of_base = OfBase(answers, tuple(stored["chosen"]), tuple(stored["rejected"]))
        else:
            model: Any = self.base.model
            scores = score_pairs(
                model,
                self.pairs,
                pad_id=pad_of(self.base.tokenizer),
                on_pair=self.tick(f"{self.name}: pairs, base", len(self.pairs)),
            )
            answers = tuple(self._answers(model, "base"))
            self._of_base = OfBase(answers, *map(tuple, scores))
            write_json(
                cache,
                {"answers": [asdict(answer) for answer in answers], "chosen": scores[0], "rejected": scores[1]},
            )
        right = sum(self._right(self._of_base.answers[asked:]))
        if self.questions and right < CHAT * len(self.questions):
            self.questions = []
            self._of_base = OfBase(self._of_base.answers[:asked], self._of_base.chosen, self._of_base.rejected)
            right = 0
        self._measured_base = self._measured(
            self._of_base.answers, right=[0.5] * len(self._by_prompt([0.5] * len(self.pairs))), margin=0.0, kl=0.0
        )

    @property
    def of_base(self) -> OfBase:
        """What the base says; `measure_base` comes first."""
        assert self._of_base is not None  # noqa: S101
        return self._of_base

    @property
    def base_measured(self) -> Measured:
        """The base as a candidate: no pair is won, and none lost."""
        assert self._measured_base is not None  # noqa: S101
        return self._measured_base

    # --- a policy ---------------------------------------------------------------------------------

    def measure(self, model: Any, name: str) -> Found:
        """Measure a policy, in eval mode: its pairs, its greedy answers, its KL, and what the judge says.

        Args:
            model: a PeftModel on the part's base.
            name: what the policy is called while it goes on.
        """
        scores = self._scores(model, self.pairs, name)
        margins = self._margins(scores, range(len(self.pairs)))
        right = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
        answers = self._answers(model, name)
        asked = answers[: len(self.prompts)]
        found = self._measured(
            answers, right=self._by_prompt(right), margin=fmean(margins), kl=self._kl(model, asked, name)
        )
        if self.judge is None:
            return Found(found, tuple(asked), scores)
        contest = judged(
            self.prompts,
            asked,
            self.of_base.answers[: len(self.prompts)],
            self.judge,
            against="base",
            on_prompt=self.tick(f"{self.name}: judging, {name}", len(self.prompts)),
        )
        found = Measured(**{**vars(found), "outcomes": contest.outcomes, "longer_by": contest.longer_by})
        return Found(found, tuple(asked), scores)

    def stored_pairs(self, scores: Sides) -> StoredPairs:
        """A few of the part's pairs with the scores that were measured, to be checked again by whoever has the adapter.

        Args:
            scores: of all the part's pairs (`Found.scores`).
        """
        places, base = evenly_spaced(len(self.pairs), STORED), self.of_base
        return StoredPairs(
            [self.pairs[index] for index in places],
            ([scores[0][index] for index in places], [scores[1][index] for index in places]),
            ([base.chosen[index] for index in places], [base.rejected[index] for index in places]),
        )

    def glance(self, model: Any) -> float:
        """Mean σ(log-ratio margin) of a few pairs: the probability that the policy's implied reward gives to the
        chosen answers, whatever β a candidate has. Between 0 and 1; one half for the reference.

        After Rafailov et al. 2023 (arXiv 2305.18290, eq. 6) with β = 1.
        """
        places = evenly_spaced(len(self.pairs), GLANCE)
        scores = self._scores(model, [self.pairs[index] for index in places], None)
        return fmean(doubt_of(-margin, beta=1.0) for margin in self._margins(scores, places))

    # --- parts of it ------------------------------------------------------------------------------

    def _scores(self, model: Any, pairs: Sequence[TokenPair], name: str | None) -> Sides:
        on_pair = self.tick(f"{self.name}: pairs, {name}", len(pairs)) if name is not None else None
        return score_pairs(model, pairs, pad_id=pad_of(self.base.tokenizer), on_pair=on_pair)

    def _margins(self, scores: Sides, places: Sequence[int]) -> list[float]:
        """The margin of the log-ratios of each pair, nats, from its scores and its place among the part's pairs."""
        base = self.of_base
        return [
            (ours - base.chosen[place]) - (theirs - base.rejected[place])
            for ours, theirs, place in zip(*scores, places, strict=True)
        ]

    def _by_prompt(self, values: Sequence[float]) -> list[float]:
        """Mean over the pairs of each prompt."""
        found: dict[tuple[int, ...], list[float]] = {}
        for pair, value in zip(self.pairs, values, strict=True):
            found.setdefault(tuple(pair.prompt), []).append(value)
        return [fmean(each) for each in found.values()]

    def _answers(self, model: Any, name: str) -> list[Answer]:
        asked: list[Sequence[Message]] = [prompt.messages for prompt in self.prompts]
        asked += [[Message(role="user", content=question.prompt)] for question in self.questions]
        tick = self.tick(f"{self.name}: answers, {name}", len(asked))
        return generate(
            model,
            self.base.tokenizer,
            asked,
            sampling=self.sampling,
            chat_template_kwargs=self.template,
            on_answer=tick,
        )

    def _right(self, answers: Sequence[Answer]) -> list[bool]:
        return [
            is_correct(answer.said, question.accepted) for answer, question in zip(answers, self.questions, strict=True)
        ]

    def _measured(self, answers: Sequence[Answer], *, right: Sequence[float], margin: float, kl: float) -> Measured:
        asked = answers[: len(self.prompts)]
        return Measured(
            right=tuple(right),
            margin=margin,
            finished=tuple(answer.finished for answer in asked),
            tokens=tuple(answer.said_tokens for answer in asked),
            repeated=tuple(repetition(answer.said) for answer in asked),
            chosen_tokens=self.chosen_tokens,
            known=sum(self._right(answers[len(self.prompts) :])),
            questions=len(self.questions),
            cut=sum(not answer.finished for answer in answers[len(self.prompts) :]),
            kl=kl,
        )

    def _kl(self, model: Any, answers: Sequence[Answer], name: str) -> float:
        """KL on the policy's own greedy answers, nats a token: a greedy one costs no further decoding, and where the
        policy goes is where it has to be near."""
        tokenizer = self.base.tokenizer
        places = evenly_spaced(len(answers), KL_ANSWERS)
        rows = [
            (
                prompt_ids(tokenizer, self.prompts[index].messages, chat_template_kwargs=self.template),
                tokenizer.encode(answers[index].text, add_special_tokens=False),
            )
            for index in places
        ]
        sums = kl_to_reference(model, rows, on_done=self.tick(f"{self.name}: KL, {name}", len(rows)))
        tokens = sum(count for _, count in sums)
        return sum(value for value, _ in sums) / tokens if tokens else 0.0
