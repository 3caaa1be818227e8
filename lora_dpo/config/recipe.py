"""The recipe: one YAML file that says everything about a run.

Each field's description is its documentation: `lora-dpo recipe` prints it, `docs/recipe.md` is made
from it. Unknown keys are errors with the nearest valid name; values are never guessed into shape.
Longer than 400 lines, so that all settings are in one place, in the order in which they are printed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lora_dpo.config.column_names import checked_columns
from lora_dpo.config.template_kwargs import checked_template_kwargs
from lora_dpo.text import shown

Quantize = Literal["auto", "nf4", "none"]
Stream = Literal["auto", "off", "embeddings", "on"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _at_home(value: Any) -> Any:
    """`~` is the home folder, as in a shell; in a list each path, anything else as it is."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


class Section(BaseModel):
    """A part of the recipe: strict types, no unknown keys, unchangeable once read."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # inside `trainer:` they are refused later, not written as null
        protected_namespaces=(),
    )


class ModelSection(Section):
    """Which base model, and how it is held in memory."""

    name: Annotated[
        str,
        Field(description="Base model: a name of `lora-dpo models list`, a folder, or a hub id."),
    ]
    revision: Annotated[
        str | None, Field(description="Hub revision (branch, tag or commit). Pin a commit to be sure.")
    ] = None
    quantize: Annotated[
        Quantize,
        Field(
            description="auto: as the checkpoint is quantised, and nf4 of one that is not. nf4: 4-bit NormalFloat with "
            "double quantisation. none: weights as stored."
        ),
    ] = "auto"
    packed: Annotated[
        bool | Literal["auto"],
        Field(
            description="Keep quantised weights packed (NF4: 4 bits each) or dequantised once at load: the same "
            "function, faster on a CPU, 4 to 8 times the memory. auto: packed on a GPU, dequantised on a CPU with room."
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Field(description="Compute dtype. auto: bfloat16 on Ampere and newer, float16 on older GPUs, float32 on CPUs."),
    ] = "auto"
    stream: Annotated[
        Stream,
        Field(
            description="While training with DPO, weights that live in main memory. embeddings: those and the head, in "
            "pieces. on: decoder layers too, one by one, for a base larger than the card. Nothing that is computed "
            "changes. auto: on where the base does not fit on an NVIDIA GPU, else off."
        ),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Field(description="Run Python code shipped with the model. Off: only for authors you trust.")
    ] = False
    template: Annotated[
        dict[str, Any],
        Field(
            description="Keywords for the chat template, such as {enable_thinking: false} (lora-dpo docs thinking). "
            "The adapter's passport keeps them, and they are given wherever it is used. A reference adapter's own "
            "go on where none of that name is set here."
        ),
    ] = {}

    _known_template = field_validator("template")(checked_template_kwargs)


class LoraSection(Section):
    """The adapter: W + scale · B·A (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, description="Rank r of the update B·A.")] = 16
    alpha: Annotated[float, Field(gt=0, description="Scale: the update is multiplied by alpha / rank.")] = 32
    dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="Dropout on the adapter's input. Needs trainer.disable_dropout: false."),
    ] = 0.0
    targets: Annotated[
        str | list[str],
        Field(description="all-linear, or the names of the linear layers to adapt, such as [q_proj, v_proj]."),
    ] = "all-linear"
    parameters: Annotated[
        list[str] | Literal["experts"],
        Field(
            description="Stacked weights to adapt as well, which are no linear layers: experts for all of a mixture's, "
            "or names such as [mlp.experts.down_proj]. Each expert gets a pair of matrices of this rank."
        ),
    ] = []
    layers: Annotated[
        str | list[int],
        Field(description="all, top-N (the last N decoder layers), or a list of layer numbers from 0."),
    ] = "all"
    rank_pattern: Annotated[
        dict[str, Annotated[int, Field(ge=1)]],
        Field(
            description="Other ranks for some layers, such as {down_proj: 32, layers.0.self_attn.q_proj: 4}: by the "
            "end of their names, the first that fits. Their scale is alpha over their own rank."
        ),
    ] = {}
    init: Annotated[
        Literal["default", "gaussian", "eva"],
        Field(
            description="What A is drawn from: Kaiming's uniform distribution, or a normal one of deviation 1 / rank. "
            "eva: the first principal directions of what each layer reads, over 2,048 tokens of the training data. "
            "B is zero, so that the policy begins as the reference."
        ),
    ] = "default"
    modules_to_save: Annotated[
        list[str],
        Field(
            description="Modules to train whole beside the adapter, by the ends of their names, such as [lm_head], "
            "[embed_tokens] or [model.norm]. Their weights are saved with the adapter. With a head among them, or tied "
            "embeddings, TRL's own passes run."
        ),
    ] = []
    rslora: Annotated[bool, Field(description="Rank-stabilised scale alpha / sqrt(rank).")] = False
    dora: Annotated[bool, Field(description="Weight-decomposed LoRA: trains magnitudes too; slower.")] = False

    @field_validator("layers")
    @classmethod
    def _layers_form(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, str) and not re.fullmatch(r"all|top-[1-9]\d*", value):
            raise ValueError("allowed: all, top-N such as top-8, or a list of layer numbers")
        return value

    @field_validator("rank_pattern", "modules_to_save")
    @classmethod
    def _names_alone(cls, value: dict[str, int] | list[str]) -> dict[str, int] | list[str]:
        odd = [name for name in value if not re.fullmatch(r"\w+(\.\w+)*", name)]
        if odd:
            raise ValueError(f"{shown(odd[0])} is no name of a layer: names and ends of names alone, no patterns")
        return value


class DataSection(Section):
    """Where the preference pairs come from."""

    train: Annotated[
        str | list[str],
        Field(
            description="Preference pairs: a file (.jsonl, .json, .csv, .tsv, .xlsx, .ods, .parquet, or gzip of "
            "these), a folder of such files, a hub id, or a list of these."
        ),
    ]
    eval: Annotated[
        str | list[str] | None,
        Field(description="Held-out pairs, in the same formats. Never trained on."),
    ] = None
    hold_out: Annotated[
        int | float | None,
        Field(
            description="In place of eval: so many different prompts of train are never trained on, and measured as "
            "held-out pairs. A number, or below 1 a share of the prompts; the same pairs give the same prompts."
        ),
    ] = None
    on_bad_row: Annotated[
        Literal["drop", "error"],
        Field(description="drop: leave unusable rows out and count them by reason. error: stop at the first."),
    ] = "drop"
    format: Annotated[
        str | None,
        Field(
            description="Format of all rows, training and held-out, by its name in lora-dpo docs data. "
            "Without it each row is looked at."
        ),
    ] = None
    columns: Annotated[
        dict[str, str],
        Field(
            description="Columns by what they are, where a file has names of its own: {prompt: Question, chosen: Good "
            "answer, rejected: Bad answer}. Also chosen_score, rejected_score, system and history; for single answers "
            "completion and label. Every file must have them."
        ),
    ] = {}
    min_gap: Annotated[
        float | None,
        Field(gt=0, description="Drop training pairs whose two scores are closer than this, or that have none."),
    ] = None
    pair_weight: Annotated[
        Literal["equal", "gap"],
        Field(
            description="gap: a pair's gradient counts by the difference of its two scores, over the mean difference "
            "and at most 4 times. Every training pair needs both scores. equal: all pairs count alike."
        ),
    ] = "equal"

    _home = field_validator("train", "eval")(_at_home)
    _known_columns = field_validator("columns")(checked_columns)

    @field_validator("hold_out")
    @classmethod
    def _some_prompts(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None:
            return None
        if value <= 0 or (value >= 1 and not isinstance(value, int)):
            raise ValueError("allowed: a number of prompts, or a share of them between 0 and 1")
        if info.data.get("eval") is not None:
            raise ValueError("data.eval names held-out pairs already. Leave one of the two out")
        return value

    @property
    def has_held_out(self) -> bool:
        """True if some pairs are measured and never trained on."""
        return self.eval is not None or self.hold_out is not None


class EvaluationSection(Section):
    """What is measured before and after training."""

    answers: Annotated[
        int,
        Field(ge=0, description="Held-out prompts, spread over the file, answered greedily before and after training."),
    ] = 32
    show: Annotated[int, Field(ge=0, description="How many of these answers are shown side by side.")] = 4
    max_new_tokens: Annotated[int, Field(ge=1, description="Longest answer, in tokens.")] = 160
    questions: Annotated[
        str | None,
        Field(description="JSONL of {prompt, accepted: [answers]}: the share answered correctly is measured."),
    ] = None

    _home = field_validator("questions")(_at_home)


class EngineSection(Section):
    """How steps are computed. Nothing here changes what is computed."""

    tokens: Annotated[
        int | Literal["auto"],
        Field(
            description="Most tokens that run at once; a step's pairs are packed into parts of them, with the gradient "
            "of the whole step. auto: measured, as many as fit and are useful."
        ),
    ] = "auto"
    split_pairs: Annotated[
        bool,
        Field(
            description="Run a pair's two answers one after the other: least memory, about twice the computing. The "
            "gradient stays the same."
        ),
    ] = False
    offload: Annotated[
        bool, Field(description="On a GPU: inputs of layers that are computed again wait in main memory. Costs copies.")
    ] = False
    reference_cache: Annotated[
        str,
        Field(
            description="Where the reference's log-probabilities are kept between runs: auto (the user's cache "
            "folder), off, or a folder."
        ),
    ] = "auto"
    trunk_cache: Annotated[
        Literal["memory", "disk", "off"],
        Field(
            description="With lora.layers: top-N, keep the output of the layers below per pair, so that they run once: "
            "in memory (at most a quarter of what is free), then on disk, or not at all."
        ),
    ] = "memory"
    fallback: Annotated[
        bool,
        Field(description="Train with TRL's own passes where this model cannot share prefixes. false: an error."),
    ] = True

    _home = field_validator("reference_cache")(_at_home)

    @field_validator("tokens")
    @classmethod
    def _some_tokens(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("allowed: auto, or 1 or more")
        return value


class HealthSection(Section):
    """What watches over the run, and what it does about an alarm."""

    action: Annotated[
        Literal["keep-best", "stop", "lower-lr", "warn", "none"],
        Field(
            description="On an alarm. keep-best: stop, and go back to the best state that was healthy. stop: stop "
            "there. lower-lr: halve the learning rate, at most three times, then keep-best. warn: say so, which is all "
            "that keep-best does with method: sft or kto. none: do not look."
        ),
    ] = "keep-best"
    every: Annotated[
        int | Literal["auto"],
        Field(description="Steps between two looks at answers. auto: half of the run, at least 8 and at most 50."),
    ] = "auto"
    prompts: Annotated[
        int, Field(ge=0, description="Prompts that are answered at each look, held-out ones if there are any.")
    ] = 6
    max_new_tokens: Annotated[int, Field(ge=8, description="Longest answer at a look, in tokens.")] = 32
    judge: Annotated[
        str | list[str] | None,
        Field(
            description="Judge of these answers (lora-dpo docs judges); the state with the best score is kept. Without "
            "one, held-out accuracy decides where trainer.eval_strategy measures it, else the last healthy state."
        ),
    ] = None
    displacement: Annotated[
        float,
        Field(gt=0, description="Alarm when the chosen answers lost so many nats a token (lora-dpo docs health)."),
    ] = 0.25
    kl: Annotated[
        float, Field(gt=0, description="Budget: alarm above so many nats of KL from the reference, a token.")
    ] = 1.0
    shortest: Annotated[
        float,
        Field(gt=0, lt=1, description="Alarm when answers are shorter than this share of what was to be expected."),
    ] = 0.45

    @field_validator("every")
    @classmethod
    def _some_steps(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("allowed: auto, or 1 or more")
        return value

    @property
    def judges(self) -> list[str]:
        """The judges as a list."""
        return [] if self.judge is None else [self.judge] if isinstance(self.judge, str) else self.judge


class Recipe(Section):
    """Everything about one run."""

    model: Annotated[ModelSection, Field(description="The base model, loaded once.")]
    lora: Annotated[LoraSection, Field(description="The adapter.")] = LoraSection()
    method: Annotated[
        Literal["dpo", "sft", "kto"],
        Field(
            description="dpo: learn from preference pairs. sft: imitate good answers. kto: learn from single answers "
            "that are good or bad (lora-dpo docs methods)."
        ),
    ] = "dpo"
    reference: Annotated[
        str,
        Field(
            description="What the policy is held to. base: the base model, adapters off. adapter:NAME or "
            "adapter:PATH: continue from that adapter; its frozen copy is the reference."
        ),
    ] = "base"
    data: Annotated[DataSection, Field(description="Preference pairs.")]
    evaluation: Annotated[EvaluationSection, Field(description="What is measured before and after training.")] = (
        EvaluationSection()
    )
    engine: Annotated[EngineSection, Field(description="How steps are computed.")] = EngineSection()
    health: Annotated[
        HealthSection, Field(description="What watches over the run, and what it does about an alarm.")
    ] = HealthSection()
    output: Annotated[
        str | None,
        Field(description="The adapter folder. Default: adapters/RECIPE-NAME, numbered if that is taken."),
    ] = None
    trainer: Annotated[
        dict[str, Any],
        Field(
            description="Any field of TRL's DPOConfig (SFTConfig, KTOConfig for those methods) by its own name: beta, "
            "learning_rate, loss_type, …"
        ),
    ] = {}

    _home = field_validator("output")(_at_home)

    @field_validator("model", "lora", "data", "evaluation", "engine", "health", "trainer", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value  # `trainer:` with all its lines commented out

    @field_validator("reference")
    @classmethod
    def _reference_form(cls, value: str) -> str:
        kind, _, path = value.partition(":")
        if value != "base" and not (kind == "adapter" and path):
            raise ValueError("allowed: base, or adapter:PATH")
        return value if value == "base" else f"adapter:{_at_home(path)}"

    @property
    def reference_adapter(self) -> Path | None:
        """The folder of the reference adapter, or None when the base is the reference."""
        return None if self.reference == "base" else Path(self.reference.removeprefix("adapter:"))
