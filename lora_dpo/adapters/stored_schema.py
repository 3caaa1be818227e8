"""What a page needs of the files that it shows, each part of its type: they may come from anywhere.

Checked once, when they are read; the pages rely on it. Parts that no page shows are not looked at, and what an older
version did not write may be missing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from lora_dpo.errors import AdapterError
from lora_dpo.text import plain

NAMES = {
    "accuracy": "reward accuracy",
    "accuracy-lc": "reward accuracy, length taken out",
    "learned": "accuracy on training prompts at first sight",
    "margin": "reward margin",
    "win-rate": "win rate",
    "win-rate-lc": "win rate, length taken out",
    "kl": "KL from the reference (nats a token)",
    "length": "answer length (tokens)",
    "length-change": "change of length (tokens)",
    "finished": "answers that end by themselves",
    "repetition": "repeated three-word sequences",
    "refusals": "refusals",
    "perplexity-ratio": "perplexity on plain text, × that of the base",
}

MOST = 10_000
"""Answers, alarms, findings, stages or files that a page shows at most."""


def _drawable(value: float) -> float:
    if math.isfinite(value) and abs(value) > 1e30:
        raise ValueError("larger than anything that is measured")
    return value


Number = Annotated[float, AfterValidator(_drawable)]
Count = Annotated[int, Field(ge=0, le=10**15)]


class Alarm(BaseModel):
    """An alarm of the guard."""

    step: Count
    name: str
    seen: str
    cause: str
    advice: str
    severe: bool


class Row(BaseModel):
    """A row of `metrics.jsonl`; other numbers of it are read by `stored_run.number`."""

    step: Count
    answers: Annotated[list[str], Field(max_length=MOST)] | None = None
    alarm: Alarm | None = None


class _Text(BaseModel):
    text: str


class _Answer(BaseModel):
    prompt: str
    before: _Text
    after: _Text


class _Health(BaseModel):
    steps: Count = 0
    kept: Count | None = None
    sentence: str | None = None
    seconds: Number | None = None
    alarms: Annotated[list[Alarm], Field(max_length=MOST)]


class _Ratios(BaseModel):
    chosen: list[Number] = []
    rejected: list[Number] = []


class _Finding(BaseModel):
    severity: str
    title: str
    count: Count | None
    meaning: str
    advice: str


class Recorded(BaseModel):
    """`measured.json`."""

    answers: Annotated[list[_Answer], Field(max_length=MOST)] = []
    log_ratios: _Ratios | None = None
    findings: Annotated[list[_Finding], Field(max_length=MOST)] | None = None
    health: _Health | None = None
    seconds: Annotated[dict[str, Number], Field(max_length=MOST)] = {}
    total_seconds: Number | None = None
    memory: dict[str, Number] = {}


class _Pairs(BaseModel):
    pairs: Count | None = None
    accuracy: Number | None = None
    margin: Number | None = None
    chosen_logratio: Number | None = None
    rejected_logratio: Number | None = None


class _Answers(BaseModel):
    answers: Count | None = None
    mean_tokens: Number | None = None
    chosen_mean_tokens: Number | None = None
    finished: Number | None = None
    correct: Number | None = None


class _When(BaseModel):
    pairs: _Pairs | None = None
    answers: _Answers | None = None


class _Metrics(BaseModel):
    before: _When = _When()
    after: _When = _When()


class _Data(BaseModel):
    pairs: Count | None = None
    answers: Count | None = None
    rows: Count | None = None
    dropped: Annotated[dict[str, Count], Field(max_length=MOST)] = {}
    sha256: Annotated[dict[str, str], Field(max_length=MOST)] = {}


class PassportParts(BaseModel):
    """`metrics` and `data` of a passport."""

    metrics: _Metrics
    data: Annotated[dict[str, _Data], Field(max_length=16)]


class _Trainer(BaseModel):
    beta: Annotated[float, Field(gt=1e-9, lt=1e9)] | None = None


class _Model(BaseModel):
    name: str | None = None


class RecipeParts(BaseModel):
    """`recipe.yaml`."""

    model: _Model | None = None
    trainer: _Trainer | None = None
    method: str | None = None
    reference: str | None = None


class _Checkup(BaseModel):
    texts: list[str] = []


class FirstLook(BaseModel):
    """`health-before.json`."""

    checkup: _Checkup | None = None


class TrainerState(BaseModel):
    """`trainer_state.json` of a checkpoint."""

    max_steps: Count | None = None


class _Interval(BaseModel):
    value: Number | None
    low: Number | None
    high: Number | None
    n: Count

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.low is not None and self.high is not None and self.value is None:
            raise ValueError("an interval without its middle")
        return self


class _Shares(BaseModel):
    tokens: _Interval | None = None
    finished: _Interval | None = None
    repetition: _Interval | None = None
    refusals: _Interval | None = None


class _Scored(BaseModel):
    pairs: Count
    log_ratios: _Ratios


class _Contest(BaseModel):
    judge: str
    wins: Count
    ties: Count
    losses: Count
    contradicted: Count
    unjudged: Count
    votes: Count | None = None


class _Plain(BaseModel):
    tokens: Count
    base: Number
    adapter: Number


class _Compared(BaseModel):
    prompt: str
    against: str
    adapter: str


class Evaluation(BaseModel):
    """`eval.json`."""

    adapter: str
    base: str
    against: str
    data: Annotated[list[str], Field(max_length=MOST)]
    beta: Number
    called: str
    verdict: str
    warnings: Annotated[list[str], Field(max_length=MOST)] = []
    numbers: dict[Literal[tuple(NAMES)], _Interval]  # type: ignore[valid-type]
    pairs: _Scored
    answers: Annotated[dict[str, _Shares], Field(max_length=16)]
    contest: _Contest | None
    text: _Plain | None
    rows: Annotated[list[_Compared], Field(max_length=MOST)]
    seconds: Number
    cost: str


def check(path: Path, kind: type[BaseModel], value: Any, where: str = "") -> None:
    """Raise `AdapterError` that names the file and the part unless a value is as `kind` says."""
    try:
        kind.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(map(str, first["loc"])) or "it"
        seen = "missing" if first["type"] == "missing" else plain(first["input"])
        reason = f"{plain(part)} is {seen}: {plain(first['msg'])}"
        raise AdapterError(f"{path}{where} cannot be read ({reason}). Make it again, or remove it.") from None
