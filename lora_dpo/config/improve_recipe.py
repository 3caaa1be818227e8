"""The recipe of `lora-dpo improve`: a training recipe without data, and where the data is to come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lora_dpo.config.reading import check_settings, dump_settings, read_settings
from lora_dpo.config.recipe import LoraSection, ModelSection, Recipe, Section


class ImproveSection(Section):
    """How the model's own answers become training data, round after round."""

    prompts: Annotated[str, Field(description="Prompts to train on: a .txt, rows with `prompt`, or preference data.")]
    held_out: Annotated[
        str, Field(description="Prompts to measure on after each round, at least 8; none of them is in `prompts`.")
    ]
    judge: Annotated[
        str | list[str], Field(description="One judge or several that add up, as `lora-dpo pairs --judge` takes them.")
    ]
    rounds: Annotated[
        int, Field(ge=1, description="Most rounds. A round that does not raise the score is the last.")
    ] = 3
    limit: Annotated[int | None, Field(ge=1, description="Use this many prompts, spread evenly over the file.")] = None
    held_out_limit: Annotated[
        int | None, Field(ge=1, description="Measure on this many held-out prompts, spread evenly over the file.")
    ] = None
    answers: Annotated[int, Field(ge=2, description="Answers sampled to each prompt.")] = 4
    temperature: Annotated[float, Field(gt=0, description="Of the sampling. Held-out answers are greedy.")] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1, description="Draw from the likeliest tokens of this share.")] = 0.95
    max_new_tokens: Annotated[int, Field(ge=1, description="Longest answer, in tokens, sampled or held-out.")] = 256
    batch_size: Annotated[int, Field(ge=1, description="Answers decoded together.")] = 32
    seed: Annotated[int, Field(description="Seed of the draws; each round adds its number.")] = 0
    select: Annotated[
        Literal["best-worst", "gaps"],
        Field(description="best-worst: at most one pair a prompt. gaps: all answers that are far enough apart."),
    ] = "best-worst"
    min_gap: Annotated[float, Field(ge=0, description="Smallest difference of two scores.")] = 0.0
    questions: Annotated[
        str | None,
        Field(description="JSONL of {prompt, accepted}: asked before and after each training, to see what is lost."),
    ] = None
    show: Annotated[int, Field(ge=0, description="Held-out answers shown side by side at the end.")] = 4
    criterion: Annotated[str | None, Field(description="What an LLM judge is to look at.")] = None
    judge_per_minute: Annotated[float | None, Field(gt=0, description="Most requests to an LLM judge.")] = None
    judge_prices: Annotated[
        list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None,
        Field(min_length=2, max_length=2, description="[IN, OUT]: prices of a million tokens, to count the cost."),
    ] = None

    @property
    def judges(self) -> list[str]:
        """The judges as a list."""
        return [self.judge] if isinstance(self.judge, str) else self.judge


class ImproveRecipe(Section):
    """Everything about one run of rounds."""

    model: Annotated[ModelSection, Field(description="The base model, loaded once.")]
    lora: Annotated[LoraSection, Field(description="The adapter.")] = LoraSection()
    reference: Annotated[str, Field(description="What round 1 starts from and is held to: base, or adapter:PATH.")] = (
        "base"
    )
    improve: Annotated[ImproveSection, Field(description="Prompts, judge and rounds.")]
    output: Annotated[
        str | None, Field(description="Round N's adapter is OUTPUT-roundN. Default: adapters/RECIPE-NAME.")
    ] = None
    trainer: Annotated[
        dict[str, Any], Field(description="Any field of TRL's DPOConfig, for each round's training.")
    ] = {}  # noqa: RUF012 - pydantic copies it

    _empty_section = field_validator("model", "lora", "trainer", mode="before")(
        lambda value: {} if value is None else value
    )

    @field_validator("reference", "output")
    @classmethod
    def _as_in_a_recipe(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        settings = {"model": {"name": "x"}, "data": {"train": "x"}, info.field_name: value}
        return str(getattr(Recipe.model_validate(settings), info.field_name))

    def training(self, *, reference: str, pairs: Path, output: Path) -> Recipe:
        """The training recipe of one round.

        The `lora` section goes with a fresh adapter only: a reference adapter brings its own.
        """
        settings: dict[str, Any] = {
            "model": self.model,
            "reference": reference,
            "data": {"train": str(pairs)},
            "evaluation": {"questions": self.improve.questions, "max_new_tokens": self.improve.max_new_tokens},
            "output": str(output),
            "trainer": self.trainer,
            # The judge measures each round on held-out answers and decides which is kept; alarms are said.
            "health": {"action": "warn"},
        }
        if reference == "base":
            settings["lora"] = self.lora
        return Recipe.model_validate(settings)


def read_improve_recipe(path: str | Path, overrides: Sequence[str] = ()) -> ImproveRecipe:
    """Read the file and apply `key=value` overrides. Raises `ConfigError` as `read_recipe` does."""
    return check_settings(ImproveRecipe, read_settings(path, overrides, ImproveRecipe), where=str(path))


def dump_improve_recipe(recipe: ImproveRecipe) -> str:
    """The recipe as YAML, every setting written out."""
    return dump_settings(recipe, hidden=set())
