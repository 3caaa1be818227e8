"""The recipe: one YAML file that says everything about a run.

Each field's description is its documentation: `lora-dpo recipe` prints it, `docs/recipe.md` is made
from it. Unknown keys are errors with the nearest valid name; values are never guessed into shape.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lora_dpo.config.yaml import dump_yaml, parse_yaml, typed_value
from lora_dpo.errors import ConfigError
from lora_dpo.text import SHOWN, one_line, shown

Quantize = Literal["nf4", "none"]
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
        Field(description="nf4: 4-bit NormalFloat with double quantisation. none: weights as stored."),
    ] = "nf4"
    packed: Annotated[
        bool | Literal["auto"],
        Field(
            description="Keep NF4 weights packed (4 bits each) or dequantised once at load: the same function, "
            "faster on a CPU, 4 to 8 times the memory. auto: packed on a GPU, dequantised on a CPU with room."
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Field(description="Compute dtype. auto: bfloat16 on Ampere and newer, float16 on older GPUs, float32 on CPUs."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Field(description="Run Python code shipped with the model. Off: only for authors you trust.")
    ] = False


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
    layers: Annotated[
        str | list[int],
        Field(description="all, top-N (the last N decoder layers), or a list of layer numbers from 0."),
    ] = "all"
    rslora: Annotated[bool, Field(description="Rank-stabilised scale alpha / sqrt(rank).")] = False
    dora: Annotated[bool, Field(description="Weight-decomposed LoRA: trains magnitudes too; slower.")] = False

    @field_validator("layers")
    @classmethod
    def _layers_form(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, str) and not re.fullmatch(r"all|top-[1-9]\d*", value):
            raise ValueError("allowed: all, top-N such as top-8, or a list of layer numbers")
        return value


class DataSection(Section):
    """Where the preference pairs come from."""

    train: Annotated[
        str | list[str],
        Field(
            description="Preference pairs: a file (.jsonl, .json, .csv, .parquet, or gzip of these), a folder of such "
            "files, a hub id, or a list of these."
        ),
    ]
    eval: Annotated[
        str | list[str] | None,
        Field(description="Held-out pairs, in the same forms. Never trained on."),
    ] = None
    on_bad_row: Annotated[
        Literal["drop", "error"],
        Field(description="drop: leave unusable rows out and count them by reason. error: stop at the first."),
    ] = "drop"
    format: Annotated[
        str | None,
        Field(
            description="Form of all rows, training and held-out, by its name in docs/data.md. "
            "Without it each row is looked at."
        ),
    ] = None
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
            description="Judge of these answers (docs/judges.md); the state with the best score is kept. Without one, "
            "held-out accuracy decides where trainer.eval_strategy measures it, else the last healthy state."
        ),
    ] = None
    displacement: Annotated[
        float, Field(gt=0, description="Alarm when the chosen answers lost so many nats a token (docs/health.md).")
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
            "that are good or bad (docs/methods.md)."
        ),
    ] = "dpo"
    reference: Annotated[
        str,
        Field(
            description="What the policy is held to. base: the base model, adapters off. adapter:PATH: continue "
            "from that adapter; its frozen copy is the reference."
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


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides with dotted keys.

    Raises:
        ConfigError: missing file, broken YAML, unknown key, or a value of the wrong kind.
    """
    return check_recipe(read_settings(path, overrides), where=str(path))


def read_settings(path: str | Path, overrides: Sequence[str] = (), kind: type[Section] = Recipe) -> dict[str, Any]:
    """The plain settings of a YAML file, `key=value` overrides applied; they are not checked yet.

    Args:
        kind: what they are settings of: values of overrides are read as what their keys take.

    Raises:
        ConfigError: missing file, broken YAML, or no settings in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe at {path}.{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}") from error
    settings = parse_settings(text, where=str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{shown(override)} is not a setting. Write key=value, such as trainer.beta=0.2.")
        _set_dotted(settings, key, typed_value(value, _kind_of(key, kind), where=override))
    return settings


def check_recipe(settings: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate plain settings. Raises `ConfigError` that names the key, the value and what is allowed."""
    if "improve" in settings:
        raise ConfigError(f"{where} is a recipe for lora-dpo improve: it has a section improve. Use that command.")
    return check_settings(Recipe, settings, where=where)


AnySection = TypeVar("AnySection", bound=Section)


def check_settings(kind: type[AnySection], settings: dict[str, Any], *, where: str) -> AnySection:
    """Validate plain settings as a section of this kind. Raises `ConfigError` as `check_recipe` does."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + " ".join(_sentences(error, kind))) from None


def parse_settings(text: str, *, where: str) -> dict[str, Any]:
    """The plain settings in a text of YAML; they are not checked yet. Raises `ConfigError` if there are none."""
    settings = parse_yaml(text, where=where)
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} is not a recipe: expected settings such as 'model:' and 'data:'.")
    return settings


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every setting written out."""
    # A reference adapter brings its own LoRA settings: written out they would be refused when read again.
    return dump_settings(recipe, hidden=set() if recipe.reference_adapter is None else {"lora"})


def dump_settings(section: Section, *, hidden: set[str]) -> str:
    """A section as YAML, every setting written out but the hidden ones."""
    settings = section.model_dump(mode="json", exclude=hidden)
    return dump_yaml(settings)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint ` Did you mean …?` for a mistyped name, or the empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless a command-line option has one of its allowed values."""
    if value not in allowed:
        raise ConfigError(f"{option} is {shown(value)}: allowed are {', '.join(allowed)}.{nearest(value, allowed)}")


def describe_fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield `(dotted key, default, description)` for every setting, in the recipe's order."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe_fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else dump_yaml(info.default).split("\n")[0]
            yield f"{prefix}{name}", default, info.description or ""


def _kind_of(dotted: str, section: type[Section]) -> Any:
    """What a setting takes; `Any` for one that is none, and for the fields of TRL under `trainer`."""
    first, _, rest = dotted.partition(".")
    found = section.model_fields.get(first)
    kind: Any = Any if found is None else found.annotation
    inside = isinstance(kind, type) and issubclass(kind, Section)
    if rest:
        return _kind_of(rest, kind) if inside else Any
    return dict if inside else kind


def _set_dotted(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise ConfigError(f"{dotted}: {parent} is a single value, it has no settings inside.")
    settings[last] = value


def _sentences(error: ValidationError, kind: type[Section]) -> Iterator[str]:
    known = [key for key, _, _ in describe_fields(kind)]
    for problem in error.errors()[:3]:
        key = one_line(".".join(str(part) for part in problem["loc"] if not _is_type_tag(part)), SHOWN)
        if problem["type"] == "extra_forbidden":
            hint = _meant(key, problem["input"], known)
            yield f"{key} is not a setting.{hint or ' Fields of TRL go under trainer:.'}"
        elif problem["type"] == "missing":
            yield f"{key} is missing; it has no default."
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{key} is {shown(problem['input'])}: {message[0].lower()}{message[1:]}."


def _meant(key: str, value: Any, known: list[str]) -> str:
    """A hint for a key that does not exist."""
    if isinstance(value, dict):  # a section: `train: {max_steps: 2}`
        return nearest(key, [*{name.partition(".")[0] for name in known if "." in name}, "trainer"])
    # The same last part anywhere, so that `rank` finds `lora.rank`; then what looks alike.
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    return f" Did you mean {same_name[0]}?" if same_name else nearest(key, [*known, "trainer"])


def _is_type_tag(part: str | int) -> bool:
    """pydantic appends the tried type of a union to the location: `str`, `list[str]`, `literal[…]`."""
    return isinstance(part, str) and bool(re.match(r"(str|bool|int|float|list\[.*|literal\[.*)$", part))


def _nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    recipes = [str(found) for found in sorted(folder.glob("*.yaml"))] if folder.is_dir() else []
    return nearest(str(path), recipes) or (f" There is {', '.join(recipes)}." if recipes else "")
