"""From a recipe to everything that is known before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.folder import check_folder
from lora_dpo.adapters.run_folder import check_space, partial_of
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.trl_common import check_optimizer
from lora_dpo.config.trl_dpo import trainer_config, trainer_settings
from lora_dpo.data import Message, PreferencePair, ReadReport, TokenPair, read_pairs, tokenize_pairs
from lora_dpo.data.answers import DEMONSTRATIONS, TokenAnswer, read_answers, tokenize_answers
from lora_dpo.data.doctor.checks import prompt_text
from lora_dpo.data.pairs import Dropped, Vote, evenly
from lora_dpo.data.questions import Question, read_questions
from lora_dpo.data.read import outcomes
from lora_dpo.data.template_notes import note_of_templates, notes_of_tokens
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.events import Note, OnEvent, Progress, Resolved, RowsDropped
from lora_dpo.model.base import decide_packed, load_skeleton, load_tokenizer
from lora_dpo.model.device import pick_device, pick_dtype
from lora_dpo.model.lora import attach_lora
from lora_dpo.model.tensor_file import open_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_FILES = 1 << 20
"""Bytes of what is small beside weights: settings, logs, random states, curves, the report."""

MAX_WEIGHT = 4.0
"""Most that a pair counts: scores such as votes are heavy-tailed, and a few pairs would be the whole gradient."""


class Stopped(Exception):
    """The run was asked to stop. `resumable` if a checkpoint was saved."""

    def __init__(self, output: Path, *, step: int, resumable: bool) -> None:
        super().__init__(f"stopped at step {step}")
        self.output, self.step, self.resumable = output, step, resumable


@dataclass
class StopSignal:
    """Set `requested` from a signal handler or another thread to end a run at its next safe point."""

    requested: bool = False
    keep: bool = False
    """Set it to end training at its next step and keep the adapter as it is then: it is measured and saved."""
    kept_at: int | None = None
    """Filled in by the run: the step, before the last, that `keep` ended it at."""
    output: Path | None = None
    """Filled in by the run: the adapter folder that it works towards."""


@dataclass
class Run:
    """Everything that is known before the weights are loaded."""

    recipe: Recipe
    output: Path
    emit: OnEvent
    stop: StopSignal
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    train: list[TokenPair] = field(default_factory=list)
    weights: list[float] | None = None
    """What each training pair's gradient counts; None if all count alike."""
    held_out: list[TokenPair] = field(default_factory=list)
    answers: list[TokenAnswer] = field(default_factory=list)
    """What SFT and KTO train on, in place of `train`."""
    held_out_answers: list[TokenAnswer] = field(default_factory=list)
    prompts: list[tuple[Message, ...]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    reports: dict[str, ReadReport] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """The folder of the unfinished run."""
        return partial_of(self.output)

    @property
    def beta(self) -> float:
        """β of DPO and KTO, TRL's default if the recipe names none; 1 for SFT, whose margins are in plain nats."""
        return 1.0 if self.recipe.method == "sft" else float(self.settings.get("beta", 0.1))

    @property
    def examples(self) -> int:
        """Rows that are trained on: pairs, or single answers."""
        return len(self.train) or len(self.answers)

    @property
    def unit(self) -> str:
        """What these rows are called."""
        return "pairs" if self.recipe.method == "dpo" else "answers"

    @property
    def batch(self) -> int:
        """Pairs (or answers) of an optimiser step."""
        return int(self.settings["per_device_train_batch_size"] * self.settings.get("gradient_accumulation_steps", 1))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        steps = self.settings.get("max_steps", -1)
        size, gathered = self.settings["per_device_train_batch_size"], self.batch
        # dataloader_drop_last leaves out a last batch that is not full
        batches = self.examples // size if self.settings.get("dataloader_drop_last") else ceil(self.examples / size)
        per_epoch = max(1, ceil(batches * size / gathered))
        return int(steps if steps > 0 else ceil(per_epoch * self.settings["num_train_epochs"]))

    def progress(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback for long stages that shows progress and notices a request to stop."""

        def tick(done: int) -> None:
            self.emit(Progress(stage, min(done, total), total))
            if self.stop.requested:
                raise Stopped(self.output, step=0, resumable=False)

        tick(0)
        return tick


def prepare(recipe: Recipe, output: Path, emit: OnEvent, stop: StopSignal) -> Run:
    """Read and tokenise the data, resolve every setting, and say so; no weights are loaded."""
    run = read_run(recipe, output, emit, stop)
    section = recipe.model
    dropped = [row for report in run.reports.values() for row in report.dropped]
    emit(RowsDropped(tuple((str(row.origin), row.reason) for row in dropped)))
    skeleton = load_skeleton(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    lines = list(_model_lines(recipe, skeleton))
    trainable = _count_trainable(recipe, skeleton)
    check_space(output, needed=space_needed(run, trainable))
    lines.append(("adapter", f"{trainable:,} trainable parameters in float32{_lora_line(recipe)}"))
    emit(Resolved((*lines, *_run_lines(run))))
    return run


def space_needed(run: Run, trainable: int) -> int:
    """Bytes that a run writes at most at a time: its checkpoints, one more while it is written, and the adapter.

    A checkpoint has the adapter in float32, TRL's copy of it as the reference, Adam's two moments, up to four states
    of the guard, and the tokenizer.
    """
    limit = run.settings.get("save_total_limit") or 0
    kept = limit if limit > 0 else _saves(run)
    checkpoint = trainable * 4 * (2 + 2 + 4) + _tokenizer_bytes(run.tokenizer) + SMALL_FILES
    return (kept + 1) * checkpoint + trainable * 4 + SMALL_FILES


def _saves(run: Run) -> int:
    """Checkpoints of a run that removes none; those made by time, after long steps, are not known before."""
    strategy, every = run.settings.get("save_strategy", "steps"), float(run.settings.get("save_steps", 500))
    if strategy == "no":
        return 1
    if strategy == "epoch":
        return ceil(float(run.settings["num_train_epochs"]))
    return ceil(run.steps / every if every >= 1 else 1 / every)  # below 1 it is a share of the steps


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """About what `save_pretrained` writes: each checkpoint has the tokenizer in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return len(backend.to_str(pretty=True).encode())
    place = Path(tokenizer.name_or_path)
    files = [place / name for name in tokenizer.vocab_files_names.values()]
    return sum(file.stat().st_size for file in files if file.is_file())


def read_run(recipe: Recipe, output: Path, emit: OnEvent, stop: StopSignal) -> Run:
    """Check the settings, read and tokenise the data; nothing is written; progress and warnings are told."""
    settings = trainer_settings(recipe)
    section = recipe.model
    dtype = pick_dtype(section.dtype, pick_device())
    folder = partial_of(output) / "checkpoints"
    # what TRL refuses by itself, before anything is loaded for nothing
    check_optimizer(trainer_config(settings, output_dir=folder, dtype=dtype, method=recipe.method))
    tokenizer = load_tokenizer(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    run = Run(recipe, output, emit, stop, tokenizer, settings)
    stop.output = output
    asked = _read_pairs(run) if recipe.method == "dpo" else _read_answers(run)
    unique = list(dict.fromkeys(json.dumps(prompt) for prompt in asked))
    spread = evenly(len(unique), recipe.evaluation.answers)  # files are often sorted by kind
    run.prompts = [tuple(json.loads(unique[index])) for index in spread]
    if recipe.evaluation.questions:
        run.questions = read_questions(recipe.evaluation.questions)
    return run


def _read_pairs(run: Run) -> list[tuple[Message, ...]]:
    """Fill in the pairs of a DPO run; returns the held-out prompts."""
    data = run.recipe.data
    pairs = _read(run, "train", data.train)
    run.train = _tokenize(run, "train", pairs)
    if data.pair_weight == "gap":
        run.weights = gap_weights(run.train)
    if data.eval is None:
        return []
    held_out = _read(run, "eval", data.eval)
    _warn_of_leaks(run, pairs, held_out)
    run.held_out = _tokenize(run, "eval", held_out)
    return [pair.prompt for pair in held_out]


def _read_answers(run: Run) -> list[tuple[Message, ...]]:
    """Fill in the single answers of an SFT or KTO run, and what pairs its held-out data has; returns the prompts."""
    data = run.recipe.data
    votes = _read_votes(run, "train", data.train)
    run.answers = _tokenize_votes(run, "train", votes)
    if data.eval is None:
        return []
    held_out = _read_votes(run, "eval", data.eval)
    _warn_of_leaks(run, votes, held_out)
    run.held_out_answers = _tokenize_votes(run, "eval", held_out)
    if data.format != DEMONSTRATIONS:
        found = [pair for outcome in outcomes(data.eval, form=data.format) for pair in outcome.pairs]
        run.held_out, _ = tokenize_pairs(run.tokenizer, found, max_length=run.settings.get("max_length", 1024))
    return [vote.prompt for vote in held_out]


def _read_votes(run: Run, which: str, sources: str | list[str]) -> list[Vote]:
    data = run.recipe.data
    good_only = run.recipe.method == "sft"
    votes, report = read_answers(sources, good_only=good_only, on_bad_row=data.on_bad_row, form=data.format)
    run.reports[which] = report
    kinds = {vote.up for vote in votes}
    if not good_only and which == "train" and len(kinds) == 1:
        raise DataError(
            f"All {len(votes)} training answers are {'good' if True in kinds else 'bad'}: KTO needs both kinds. "
            "Use method: sft for good answers alone."
        )
    return votes


def _tokenize_votes(run: Run, which: str, votes: Sequence[Vote]) -> list[TokenAnswer]:
    max_length = run.settings.get("max_length", 1024)
    tick = run.progress(f"tokenising {which} answers", len(votes))
    answers, dropped = tokenize_answers(run.tokenizer, votes, max_length=max_length, on_answer=tick)
    _account_for(run, which, dropped, left=len(answers))
    _warn_of_templates(run, which, votes, answers)
    return answers


def _read(run: Run, which: str, sources: str | list[str]) -> list[PreferencePair]:
    data = run.recipe.data
    min_gap = data.min_gap if which == "train" else None  # held-out pairs may have no scores
    pairs, report = read_pairs(sources, on_bad_row=data.on_bad_row, form=data.format, min_gap=min_gap)
    run.reports[which] = report
    return pairs


def _tokenize(run: Run, which: str, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
    max_length = run.settings.get("max_length", 1024)
    tick = run.progress(f"tokenising {which} pairs", len(pairs))
    tokens, dropped = tokenize_pairs(run.tokenizer, pairs, max_length=max_length, on_pair=tick)
    _account_for(run, which, dropped, left=len(tokens))
    _warn_of_templates(run, which, pairs, tokens)
    return tokens


def gap_weights(pairs: Sequence[TokenPair]) -> list[float]:
    """What each pair's gradient counts: its gap of scores over the mean gap, at most `MAX_WEIGHT`.

    Raises:
        DataError: a pair has no scores, or its chosen answer has not the higher one.
    """
    gaps = [pair.gap for pair in pairs if pair.gap is not None and pair.gap > 0]
    if len(gaps) < len(pairs):
        first = next(pair.origin for pair in pairs if pair.gap is None or pair.gap <= 0)
        raise DataError(
            f"data.pair_weight is gap, but {len(pairs) - len(gaps)} of {len(pairs)} training pairs have no two scores "
            f"with the chosen one higher, the first in {first.source}, row {first.row}. Drop them with data.min_gap, "
            "or set data.pair_weight: equal."
        )
    mean = fmean(gaps)
    return [min(gap / mean, MAX_WEIGHT) for gap in gaps]


def _account_for(run: Run, which: str, dropped: Sequence[Dropped], *, left: int) -> None:
    if dropped and run.recipe.data.on_bad_row == "error":
        raise DataError(f"{dropped[0].origin.source}, row {dropped[0].origin.row}: {dropped[0].reason}.")
    run.reports[which].dropped.extend(dropped)
    if not left:
        summary = run.reports[which].summary(run.unit)
        raise DataError(f"No {which} {run.unit[:-1]} is left: {summary}. Raise trainer.max_length?")


def _warn_of_templates(
    run: Run,
    which: str,
    rows: Sequence[PreferencePair] | Sequence[Vote],
    tokens: Sequence[TokenPair] | Sequence[TokenAnswer],
) -> None:
    what = f"{'training' if which == 'train' else 'held-out'} {run.unit}"
    for text in (note_of_templates(rows, what, run.tokenizer), *notes_of_tokens(tokens, what)):
        if text:
            run.emit(Note(text, warning=True))


def _warn_of_leaks(
    run: Run, rows: Sequence[PreferencePair] | Sequence[Vote], held_out: Sequence[PreferencePair] | Sequence[Vote]
) -> None:
    known = {prompt_text(row.prompt) for row in rows}
    leaked = sum(prompt_text(row.prompt) in known for row in held_out)
    if leaked:
        text = (
            f"{leaked} of {len(held_out)} held-out {run.unit} have a prompt that is also trained on: "
            "results will flatter."
        )
        run.emit(Note(text, warning=True))


def _count_trainable(recipe: Recipe, skeleton: PreTrainedModel) -> int:
    """Trainable parameters, counted without weights; the skeleton gets the adapter on it."""
    adapter = recipe.reference_adapter
    if adapter is None:
        model = attach_lora(skeleton, recipe.lora, seed=0)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if recipe.lora.model_fields_set:
        given = ", ".join(sorted(recipe.lora.model_fields_set))
        raise ConfigError(f"lora ({given}) comes from the reference adapter and cannot be set. Remove that section.")
    check_folder(adapter)
    with open_tensors(adapter / "adapter_model.safetensors") as tensors:
        return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118


def _model_lines(recipe: Recipe, skeleton: PreTrainedModel) -> Iterator[tuple[str, str]]:
    import torch

    device = pick_device()
    dtype = pick_dtype(recipe.model.dtype, device)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    yield "model", f"{recipe.model.name}, {total / 1e6:,.0f} M parameters"
    yield "device", torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield "weights", _weights_line(recipe, skeleton, device, dtype)
    yield _reference_line(recipe)


def _reference_line(recipe: Recipe) -> tuple[str, str]:
    if recipe.method == "sft":
        start = "the base" if recipe.reference == "base" else recipe.reference
        return "start", f"{start}; nothing is held to it, log-ratios are told against it"
    return (
        "reference",
        "the base, adapter off" if recipe.reference == "base" else f"a frozen copy of {recipe.reference}",
    )


def _run_lines(run: Run) -> Iterator[tuple[str, str]]:
    settings = run.settings
    for which, report in run.reports.items():
        yield f"{which} data", f"{report.summary(run.unit)}, read as {report.read_as}"
    if run.train:
        yield "tokens", _token_line(run.train)
        lengths = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in run.train]
    else:
        yield "tokens", _answers_line(run.answers)
        lengths = [len(one.prompt) + len(one.answer) for one in run.answers]
    batch, steps = run.batch, run.steps
    yield (
        "steps",
        f"{steps} of {batch} {run.unit} ({steps * batch / run.examples:.2f} passes over the data), "
        f"about {fmean(lengths) * batch:,.0f} tokens a step",
    )
    yield "objective", f"{_objective(run)}, learning rate {settings['learning_rate']:g}"
    yield "output", str(run.output)


def _objective(run: Run) -> str:
    settings = run.settings
    if run.recipe.method == "sft":
        return f"{settings.get('loss_type', 'nll')} of good answers"
    if run.recipe.method == "kto":
        good = sum(one.up for one in run.answers)
        weights = [settings.get(f"{kind}_weight", 1.0) for kind in ("desirable", "undesirable")]
        counts = f"{good} good at weight {weights[0]:g}, {len(run.answers) - good} bad at {weights[1]:g}"
        return f"{settings.get('loss_type', 'kto')}, β {run.beta:g}, {counts}"
    weights = settings.get("loss_weights") or [1.0] * len(settings["loss_type"])
    loss = " + ".join(f"{weight:g}·{name}" for name, weight in zip(settings["loss_type"], weights, strict=False))
    return f"{loss}, β {run.beta:g}"


def _weights_line(recipe: Recipe, skeleton: PreTrainedModel, device: torch.device, dtype: str) -> str:
    import torch

    if recipe.model.quantize == "none":
        return f"as stored, computed in {dtype}"
    packed = recipe.model.packed
    if packed == "auto":
        packed = decide_packed(skeleton, device, getattr(torch, dtype))
    held = "packed in 4 bits" if packed else "held dequantised"
    return f"NF4 with double quantisation, {held}, computed in {dtype}"


def _lora_line(recipe: Recipe) -> str:
    if recipe.reference != "base":
        return ", continued"
    lora = recipe.lora
    extras = [name for name, on in (("rsLoRA", lora.rslora), ("DoRA", lora.dora)) if on]
    layers = "" if lora.layers == "all" else f", layers {lora.layers}"
    return f", rank {lora.rank}, alpha {lora.alpha:g}, {lora.targets}{layers}{', '.join(['', *extras])}"


def _token_line(pairs: Sequence[TokenPair]) -> str:
    return _lengths_line(
        ("prompt", [len(pair.prompt) for pair in pairs]),
        ("chosen", [len(pair.chosen) for pair in pairs]),
        ("rejected", [len(pair.rejected) for pair in pairs]),
        cut=f"{sum(pair.truncated for pair in pairs)} pairs",
    )


def _answers_line(answers: Sequence[TokenAnswer]) -> str:
    return _lengths_line(
        ("prompt", [len(one.prompt) for one in answers]),
        ("good answer", [len(one.answer) for one in answers if one.up]),
        ("bad answer", [len(one.answer) for one in answers if not one.up]),
        cut=f"{sum(one.truncated for one in answers)} answers",
    )


def _lengths_line(*named: tuple[str, list[int]], cut: str) -> str:
    parts = [f"{name} {median(lengths):.0f} (longest {max(lengths)})" for name, lengths in named if lengths]
    return "median " + ", ".join(parts) + ("" if cut.startswith("0 ") else f"; {cut} cut at max_length")
