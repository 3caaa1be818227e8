"""What a judge is: one function from a prompt and its answers to their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lora_dpo.data.prompts import Prompt
from lora_dpo.errors import JudgeError, LoraDPOError
from lora_dpo.model.decoding import Answer
from lora_dpo.text import shown

Scores = Sequence[float | None]
"""One number an answer, higher is better; None where the judge cannot say."""


class ScoreFunction(Protocol):
    """The protocol that every judge keeps, a user's own function too.

    `prompt.messages` is the conversation, `prompt.text` its last message, `prompt.accepted` the known
    answers if there are any. An answer has `text`, `tokens` and `finished` (it ended by itself); what a model
    thought before it is not in them.
    Scores are compared only with scores of the same prompt.
    """

    def __call__(self, prompt: Prompt, answers: Sequence[Answer], /) -> Scores:
        """Score the answers to one prompt, in their order."""
        ...


@dataclass(frozen=True)
class Judge:
    """A judge that is ready to score."""

    spec: str
    """As the user wrote it."""
    function: ScoreFunction
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else its scores depend on; recorded with every pair."""
    cost: Callable[[], str] = lambda: ""
    """What it has used so far, in words; empty for judges that cost nothing."""
    about: str = ""
    """What it is, in words, if there is more to say than its spec."""
    needs_accepted: bool = False
    """True if prompts without known answers cannot be judged."""
    reads_thoughts: bool = False
    """True if it is given what a model thought before it answered, too: a likelihood is that of all it wrote."""

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        """The function's scores, checked. It is given the answers without their thoughts, unless it reads these.

        Raises:
            JudgeError: the judge failed, or did not return one finite number (or None) an answer.
        """
        where = f"The judge {self.spec}, on {prompt.source} row {prompt.row},"
        read = answers if self.reads_thoughts else [_without_thought(answer) for answer in answers]
        try:
            scores = list(self.function(prompt, read))
        except LoraDPOError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise JudgeError(f"{where} failed: {type(error).__name__}: {error}. See where with --debug.") from error
        if len(scores) != len(answers):
            raise JudgeError(f"{where} gave {len(scores)} scores for {len(answers)} answers. It must give one each.")
        checked: list[float | None] = []
        for value in scores:
            number = None if value is None else _as_number(value)
            if number is not None and not math.isfinite(number):
                raise JudgeError(f"{where} gave the score {shown(value)}. It must be a finite number, or None.")
            checked.append(number)
        return checked


def _without_thought(answer: Answer) -> Answer:
    if not answer.thought_tokens:
        return answer
    return replace(answer, text=answer.said, tokens=answer.said_tokens, thought_tokens=0)


def _as_number(value: Any) -> float:
    """Whatever float() takes, so numpy's and torch's numbers, too, but no text; NaN for anything else."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except Exception:  # torch raises RuntimeError for a tensor of two numbers, others whatever they like
        return math.nan


def add_up(judges: Sequence[tuple[float, Judge]]) -> Judge:
    """One judge whose score is the weighted sum of several; None if one of them gives None."""
    if len(judges) == 1 and judges[0][0] == 1:
        return judges[0][1]

    def total(prompt: Prompt, answers: Sequence[Answer]) -> Scores:
        columns = [(weight, judge.score(prompt, answers)) for weight, judge in judges]
        return [_sum([(weight, scores[index]) for weight, scores in columns]) for index in range(len(answers))]

    return Judge(
        spec=" + ".join(judge.spec if weight == 1 else f"{weight:g}*{judge.spec}" for weight, judge in judges),
        function=total,
        facts={judge.spec: dict(judge.facts) for _, judge in judges if judge.facts},
        cost=lambda: "; ".join(filter(None, (judge.cost() for _, judge in judges))),
        about="; ".join(filter(None, (judge.about for _, judge in judges))),
        needs_accepted=any(judge.needs_accepted for _, judge in judges),
        reads_thoughts=True,  # each of them takes out what it does not read
    )


def _sum(parts: Sequence[tuple[float, float | None]]) -> float | None:
    values = [weight * value for weight, value in parts if value is not None]
    return sum(values) if len(values) == len(parts) else None
