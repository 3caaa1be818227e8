"""From a recipe to everything that is known before any weight is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from lora_dpo.adapters.passport import check_folder, read_passport
from lora_dpo.adapters.run_folder import check_space, partial_of
from lora_dpo.adapters.store import find_adapter
from lora_dpo.config.improve_recipe import ImproveRecipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.trl_common import check_optimizer
from lora_dpo.config.trl_dpo import trainer_config, trainer_settings
from lora_dpo.data import Message, PreferencePair, TokenPair, read_pairs, tokenize_pairs
from lora_dpo.data.answers import DEMONSTRATIONS, TokenAnswer, read_answers, tokenize_answers
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.data.doctor.checks import prompt_text
from lora_dpo.data.keywords_read import note_of_keywords
from lora_dpo.data.pairs import Dropped, ReadReport, UnpairedAnswer, evenly_spaced
from lora_dpo.data.questions import read_questions
from lora_dpo.data.read import Made, outcomes
from lora_dpo.data.rows import refuse_missing
from lora_dpo.data.template_notes import note_of_templates, notes_of_tokens
from lora_dpo.data.write import hold_out_prompts
from lora_dpo.errors import ConfigError, DataError, ModelError
from lora_dpo.events import Note, OnEvent, Resolved, RowsDropped, StopSignal
from lora_dpo.model.base import held_by, load_skeleton, load_tokenizer
from lora_dpo.model.device import pick_device, pick_dtype
from lora_dpo.model.lora import attach_lora
from lora_dpo.model.tensor_file import open_tensors
from lora_dpo.text import shown
from lora_dpo.training.prepared import Run
from lora_dpo.training.resolved import lora_line, missed_text, model_lines, run_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AnyRecipe = TypeVar("AnyRecipe", Recipe, ImproveRecipe)

SMALL_FILES = 1 << 20
"""Bytes of what is small beside weights: settings, logs, random states, curves, the report."""

MAX_WEIGHT = 4.0
"""Most that a pair counts: scores such as votes are heavy-tailed, and a few pairs would be the whole gradient."""


def check_early(recipe: Recipe) -> None:
    """Refuse, within a second, what can be told without torch: wrong settings, and files and folders that are missing.

    Of the model only the config of a folder is looked at, for how its weights are stored: a command fetches a packaged
    one when everything else is right.

    Raises:
        LoraDPOError: as `read_run` would, a minute later on a slow machine.
    """
    trainer_settings(recipe)
    _check_stream(recipe)
    data, adapter = recipe.data, recipe.reference_adapter
    for sources in (data.train, data.eval or []):
        refuse_missing([sources] if isinstance(sources, str) else sources)
    if recipe.evaluation.questions:
        read_questions(recipe.evaluation.questions)
    if adapter is not None:
        check_folder(adapter)
    if os.path.isfile(Path(os.path.expanduser(recipe.model.name)) / "config.json"):
        held_by(recipe.model)


def _check_stream(recipe: Recipe) -> None:
    """Raise `ConfigError` where weights are to visit the device that are needed there all the time."""
    stream, lora = recipe.model.stream, recipe.lora
    if stream in ("auto", "off"):
        return
    if recipe.method != "dpo":
        raise ConfigError(f"model.stream is {stream}, which is for method: dpo, not {recipe.method}. Leave it out.")
    for on, name in ((lora.dora, "dora"), (lora.modules_to_save, "modules_to_save"), (lora.parameters, "parameters")):
        if on:
            raise ConfigError(
                f"model.stream is {stream}, which does not go together with lora.{name}: that needs the base's weights "
                "all the time. Leave one of them out."
            )


def with_reference(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with its reference adapter as a folder: it may name one as the command line does.

    The keywords for the chat template that the adapter was trained with go on, but for those that the recipe names:
    with others the training would begin at prompts that the adapter never saw.

    Raises:
        AdapterError: there is no such adapter, or its passport cannot be read.
        ConfigError: a `lora:` section beside it.
    """
    if recipe.reference == "base":
        return recipe
    if recipe.lora.model_fields_set:  # the adapter brings its own
        given = ", ".join(sorted(recipe.lora.model_fields_set))
        raise ConfigError(f"lora ({given}) comes from the reference adapter and cannot be set. Remove that section.")
    folder = find_adapter(recipe.reference.removeprefix("adapter:"))
    passport = read_passport(folder)
    template = {**(passport.chat_template_kwargs if passport else {}), **recipe.model.template}
    model = recipe.model.model_copy(update={"template": template}) if template else recipe.model
    return recipe.model_copy(update={"reference": f"adapter:{folder}", "model": model})


def prepare(
    recipe: Recipe, output: Path, emit: OnEvent, stop: StopSignal, *, more: Sequence[tuple[str, str]] = ()
) -> Run:
    """Read and tokenise the data, resolve every setting, and say so; no weights are loaded.

    Args:
        more: lines `(label, value)` to be told with the others.
    """
    run = read_run(recipe, output, emit, stop)
    section = recipe.model
    dropped = [row for report in run.reports.values() for row in report.dropped]
    emit(RowsDropped(tuple((str(row.origin), row.reason) for row in dropped)))
    skeleton = load_skeleton(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    _check_rows(run, skeleton)
    lines = list(model_lines(recipe, skeleton))
    trainable, missed = _count_trainable(recipe, skeleton)
    check_space(output, needed=space_needed(run, trainable))
    lines.append(("adapter", f"{trainable:,} trainable parameters in float32{lora_line(recipe)}{missed}"))
    emit(Resolved((*lines, *run_lines(run), *more)))
    return run


def _check_rows(run: Run, skeleton: PreTrainedModel) -> None:
    """Raise `ModelError` for a token without a row in the embeddings: a tokenizer that was extended by itself."""
    rows = skeleton.get_input_embeddings().weight.shape[0]
    pairs = (part for pair in (*run.train, *run.held_out) for part in (pair.prompt, pair.chosen, pair.rejected))
    answers = (part for one in (*run.answers, *run.held_out_answers) for part in (one.prompt, one.answer))
    kwargs = run.chat_template_kwargs
    asked = (prompt_ids(run.tokenizer, prompt, chat_template_kwargs=kwargs) for prompt in run.prompts)
    highest = max((max(ids, default=0) for ids in (*pairs, *answers, *asked)), default=0)
    if highest >= rows:
        token = shown(str(run.tokenizer.convert_ids_to_tokens(highest)))
        raise ModelError(
            f"The tokenizer of {run.recipe.model.name} writes token {highest} ({token}), but the model has rows for "
            f"{rows} tokens: it was extended without its model. Take both from one source, or resize the model's "
            "embeddings first."
        )


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
    if unread := note_of_keywords(tokenizer, run.chat_template_kwargs):
        emit(Note(unread, warning=True))
    asked = _read_pairs(run) if recipe.method == "dpo" else _read_answers(run)
    unique = list(dict.fromkeys(json.dumps(prompt) for prompt in asked))
    spread = evenly_spaced(len(unique), recipe.evaluation.answers)  # files are often sorted by kind
    run.prompts = [tuple(json.loads(unique[index])) for index in spread]
    if recipe.evaluation.questions:
        run.questions = read_questions(recipe.evaluation.questions)
    return run


def _read_pairs(run: Run) -> list[tuple[Message, ...]]:
    """Fill in the pairs of a DPO run; returns the held-out prompts."""
    data = run.recipe.data
    pairs, run.apart = _set_apart(run, _read(run, "train", data.train))
    run.train = _tokenize(run, "train", pairs)
    if data.pair_weight == "gap":
        run.weights = gap_weights(run.train)
    if not data.has_held_out:
        return []
    held_out = run.apart or _read(run, "eval", data.eval or [])
    _warn_of_leaks(run, pairs, held_out)
    run.held_out = _tokenize(run, "eval", held_out)
    return [pair.prompt for pair in held_out]


def _read_answers(run: Run) -> list[tuple[Message, ...]]:
    """Fill in the single answers of an SFT or KTO run, and what pairs its held-out data has; returns the prompts."""
    data = run.recipe.data
    votes, apart = _set_apart(run, _read_votes(run, "train", data.train))
    _check_kinds(run, votes)
    run.answers = _tokenize_votes(run, "train", votes)
    if not data.has_held_out:
        return []
    held_out = apart or _read_votes(run, "eval", data.eval or [])
    _warn_of_leaks(run, votes, held_out)
    run.held_out_answers = _tokenize_votes(run, "eval", held_out)
    if data.format != DEMONSTRATIONS:
        made = outcomes(data.eval or data.train, format=data.format, columns=data.columns, wanted="answers")
        asked = {prompt_text(vote.prompt) for vote in held_out}
        found = [pair for outcome in made for pair in outcome.pairs if prompt_text(pair.prompt) in asked]
        run.apart = found if apart else []
        max_length = run.settings.get("max_length", 1024)
        run.held_out, _ = tokenize_pairs(
            run.tokenizer, found, max_length=max_length, chat_template_kwargs=run.chat_template_kwargs
        )
    return [vote.prompt for vote in held_out]


def _set_apart(run: Run, rows: list[Made]) -> tuple[list[Made], list[Made]]:
    """Rows to train on, and those of `data.hold_out` prompts, with an account of their own; without it no rows.

    Raises:
        DataError: no prompt would be left to train on.
    """
    wanted = run.recipe.data.hold_out
    if wanted is None:
        return rows, []
    train, apart = hold_out_prompts(rows, wanted)
    run.reports["train"].held_out = len(apart)
    run.reports["eval"] = ReadReport(len(apart))
    return train, apart


def _read_votes(run: Run, which: str, sources: str | list[str]) -> list[UnpairedAnswer]:
    data = run.recipe.data
    good_only = run.recipe.method == "sft"
    votes, report = read_answers(
        sources, good_only=good_only, on_bad_row=data.on_bad_row, format=data.format, columns=data.columns
    )
    run.reports[which] = report
    return votes


def _check_kinds(run: Run, votes: Sequence[UnpairedAnswer]) -> None:
    kinds = {vote.up for vote in votes}
    if run.recipe.method == "kto" and len(kinds) == 1:
        raise DataError(
            f"All {len(votes)} training answers are {'good' if True in kinds else 'bad'}: KTO needs both kinds. "
            "Use method: sft for good answers alone."
        )


def _tokenize_votes(run: Run, which: str, votes: Sequence[UnpairedAnswer]) -> list[TokenAnswer]:
    max_length = run.settings.get("max_length", 1024)
    tick = run.progress(f"tokenising {which} answers", len(votes))
    kwargs = run.chat_template_kwargs
    answers, dropped = tokenize_answers(
        run.tokenizer, votes, max_length=max_length, chat_template_kwargs=kwargs, on_answer=tick
    )
    _account_for(run, which, dropped, left=len(answers))
    _warn_of_templates(run, which, votes, answers)
    return answers


def _read(run: Run, which: str, sources: str | list[str]) -> list[PreferencePair]:
    data = run.recipe.data
    min_gap = data.min_gap if which == "train" else None  # held-out pairs may have no scores
    pairs, report = read_pairs(
        sources, on_bad_row=data.on_bad_row, format=data.format, min_gap=min_gap, columns=data.columns
    )
    run.reports[which] = report
    return pairs


def _tokenize(run: Run, which: str, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
    max_length = run.settings.get("max_length", 1024)
    tick = run.progress(f"tokenising {which} pairs", len(pairs))
    kwargs = run.chat_template_kwargs
    tokens, dropped = tokenize_pairs(
        run.tokenizer, pairs, max_length=max_length, chat_template_kwargs=kwargs, on_pair=tick
    )
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
    rows: Sequence[PreferencePair] | Sequence[UnpairedAnswer],
    tokens: Sequence[TokenPair] | Sequence[TokenAnswer],
) -> None:
    what = f"{'training' if which == 'train' else 'held-out'} {run.unit}"
    for text in (note_of_templates(rows, what, run.tokenizer), *notes_of_tokens(tokens, what)):
        if text:
            run.emit(Note(text, warning=True))


def _warn_of_leaks(
    run: Run,
    rows: Sequence[PreferencePair] | Sequence[UnpairedAnswer],
    held_out: Sequence[PreferencePair] | Sequence[UnpairedAnswer],
) -> None:
    known = {prompt_text(row.prompt) for row in rows}
    leaked = sum(prompt_text(row.prompt) in known for row in held_out)
    if leaked:
        text = (
            f"{leaked} of {len(held_out)} held-out {run.unit} have a prompt that is also trained on: "
            "results will flatter."
        )
        run.emit(Note(text, warning=True))


def _count_trainable(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[int, str]:
    """Trainable parameters, counted without weights, and what is said of those that `all-linear` does not reach.

    The skeleton gets the adapter on it.
    """
    adapter = recipe.reference_adapter
    if adapter is None:
        model = attach_lora(skeleton, recipe.lora, seed=0)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return count, missed_text(model) if recipe.lora.targets == "all-linear" and recipe.lora.layers == "all" else ""
    check_folder(adapter)
    with open_tensors(adapter / "adapter_model.safetensors") as tensors:
        return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys()), ""  # noqa: SIM118
