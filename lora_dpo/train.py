"""A recipe becomes a run: read, resolve, load once, measure, train, measure again, save.

`train` emits events and never prints. The whole run uses one base model in memory: with the adapter
it is the policy, without it the reference and the "before" of every comparison.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters import attach_adapter, make_passport, write_passport
from lora_dpo.card import write_card, write_curves
from lora_dpo.config import Recipe, dump_recipe
from lora_dpo.data import Message, PreferencePair, ReadReport, TokenPair, read_pairs, tokenize_pairs
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.evaluate import (
    AnswerMetrics,
    PairMetrics,
    Question,
    answer_metrics,
    pair_metrics,
    read_questions,
    score_pairs,
    to_json,
    write_json,
)
from lora_dpo.events import Answered, Compared, Note, OnEvent, Progress, Resolved, RowsDropped, Saved, StepLogged
from lora_dpo.files import atomic_folder, disk_errors, sha256_of
from lora_dpo.generate import Answer, Sampling, generate
from lora_dpo.model import (
    POLICY,
    Base,
    attach_lora,
    decide_packed,
    load_base,
    load_skeleton,
    load_tokenizer,
    pick_device,
    pick_dtype,
    reference,
)
from lora_dpo.runs import RunLog, check_space, choose_output, open_run, partial_of
from lora_dpo.settings import trainer_config, trainer_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig


class Stopped(Exception):
    """The run was asked to stop. `resumable` if a checkpoint was saved."""

    def __init__(self, output: Path, *, step: int, resumable: bool) -> None:
        super().__init__(f"stopped at step {step}")
        self.output, self.step, self.resumable = output, step, resumable


@dataclass
class StopSignal:
    """Set `requested` from a signal handler or another thread to end a run at its next safe point."""

    requested: bool = False


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the adapter on disk, the model in memory, and what was measured."""

    folder: Path
    base: Base
    model: PeftModel
    before: Measured
    after: Measured


@dataclass(frozen=True)
class Measured:
    """Held-out measurements of one state of the model; None where the recipe measures nothing."""

    pairs: PairMetrics | None = None
    answers: AnswerMetrics | None = None
    texts: tuple[Answer, ...] = ()


@dataclass
class _Run:
    """Everything that is known before the weights are loaded."""

    recipe: Recipe
    output: Path
    emit: OnEvent
    stop: StopSignal
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    train: list[TokenPair] = field(default_factory=list)
    held_out: list[TokenPair] = field(default_factory=list)
    prompts: list[tuple[Message, ...]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    reports: dict[str, ReadReport] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return partial_of(self.output)

    def progress(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback for long stages that shows progress and notices a request to stop."""

        def tick(done: int) -> None:
            self.emit(Progress(stage, min(done, total), total))
            if self.stop.requested:
                raise Stopped(self.output, step=0, resumable=False)

        tick(0)
        return tick


def train(
    recipe: Recipe,
    *,
    name: str = "adapter",
    base: Base | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
    stop: StopSignal | None = None,
) -> TrainResult:
    """Run a recipe from preference files to an adapter folder.

    Args:
        name: the recipe's name; the adapter is `adapters/NAME` unless the recipe sets `output`.
        base: a base model that is loaded already; it must be the one that the recipe names.
        resume: continue an interrupted run from its last checkpoint, with the same losses.
        on_event: receives what happens (`lora_dpo.events`).
        stop: set its `requested` to save a checkpoint and end at the next step.

    Raises:
        LoraDPOError: anything that a user can mend; nothing half-written is left.
        Stopped: `stop` was requested; says whether a checkpoint was saved.
    """
    output = choose_output(recipe, name, resume=resume)
    recipe = recipe.model_copy(update={"output": str(output)})
    emit = on_event or (lambda event: None)
    run = _prepare(recipe, output, emit, stop or StopSignal())
    checkpoint = open_run(recipe, output, resume=resume)
    try:
        with disk_errors(output), _quiet_libraries():
            return _execute(run, base, checkpoint)
    except Stopped as stopped:
        if not stopped.resumable and not list(run.partial.glob("checkpoints/*")):
            shutil.rmtree(run.partial, ignore_errors=True)
        raise
    except BaseException:
        if not list(run.partial.glob("checkpoints/*")):
            shutil.rmtree(run.partial, ignore_errors=True)  # nothing in it could be resumed
        raise


def _prepare(recipe: Recipe, output: Path, emit: OnEvent, stop: StopSignal) -> _Run:
    """Read and tokenise the data, resolve every setting, and say so; no weights are loaded."""
    settings = trainer_settings(recipe)
    section = recipe.model
    tokenizer = load_tokenizer(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    run = _Run(recipe, output, emit, stop, tokenizer, settings)
    pairs = _read(run, "train", recipe.data.train)
    run.train = _tokenize(run, "train", pairs)
    if recipe.data.eval is not None:
        held_out = _read(run, "eval", recipe.data.eval)
        _warn_of_leaks(run, pairs, held_out)
        run.held_out = _tokenize(run, "eval", held_out)
        unique = list(dict.fromkeys(json.dumps(pair.prompt) for pair in held_out))
        run.prompts = [tuple(json.loads(prompt)) for prompt in unique[: recipe.evaluation.answers]]
    if recipe.evaluation.questions:
        run.questions = read_questions(recipe.evaluation.questions)
    dropped = [row for report in run.reports.values() for row in report.dropped]
    emit(RowsDropped(tuple((str(row.origin), row.reason) for row in dropped)))
    trainable = _count_trainable(recipe)
    check_space(output, needed=trainable * 4 * 8)  # adapter, two checkpoints with Adam's two moments, one to spare
    emit(Resolved(tuple(_resolved_lines(run, trainable))))
    return run


def _execute(run: _Run, base: Base | None, checkpoint: Path | None) -> TrainResult:
    from datasets import Dataset

    from lora_dpo.trainer import DPOTrainer

    recipe = run.recipe
    base = base or _load(run)
    model = _attach(base, recipe, seed=run.settings["seed"])
    pad = run.tokenizer.pad_token_id if run.tokenizer.pad_token_id is not None else run.tokenizer.eos_token_id
    before_file = run.partial / "before.json"
    ref_scores, before = _measure_before(run, model, pad, before_file)
    config = trainer_config(run.settings, output_dir=run.partial / "checkpoints", dtype=base.dtype)
    log = RunLog(run.partial / "metrics.jsonl", from_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1)
    callback = _make_callback(run, log)
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list([_columns(pair) for pair in run.train]),
        eval_dataset=Dataset.from_list([_columns(pair) for pair in run.held_out]) if run.held_out else None,
        processing_class=run.tokenizer,
        callbacks=[callback],
    )
    _drop_printing_callbacks(trainer)
    trainer.reference_guard = checkpoint is None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if run.stop.requested:
        raise Stopped(run.output, step=trainer.state.global_step, resumable=True)
    model.eval()
    after = _measure_after(run, model, pad, ref_scores)
    _report(run, before, after)
    _save(run, base, model, log, before, after)
    return TrainResult(run.output, base, model, before, after)


# --- before the weights ---------------------------------------------------------------------------


def _read(run: _Run, which: str, sources: str | list[str]) -> list[PreferencePair]:
    pairs, report = read_pairs(sources, on_bad_row=run.recipe.data.on_bad_row)
    run.reports[which] = report
    return pairs


def _tokenize(run: _Run, which: str, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
    max_length = run.settings.get("max_length", 1024)
    tick = run.progress(f"tokenising {which} pairs", len(pairs))
    tokens, dropped = tokenize_pairs(run.tokenizer, pairs, max_length=max_length, on_pair=tick)
    run.reports[which].dropped.extend(dropped)
    if not tokens:
        raise DataError(f"No {which} pair is left: {run.reports[which].summary()}. Raise trainer.max_length?")
    return tokens


def _warn_of_leaks(run: _Run, pairs: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> None:
    known = {json.dumps(pair.prompt) for pair in pairs}
    leaked = sum(json.dumps(pair.prompt) in known for pair in held_out)
    if leaked:
        text = f"{leaked} of {len(held_out)} held-out pairs have a prompt that is also trained on: results will flatter."
        run.emit(Note(text, warning=True))


def _count_trainable(recipe: Recipe) -> int:
    """Trainable parameters, counted on a model without weights."""
    adapter = recipe.reference_adapter
    if adapter is not None:
        from safetensors import safe_open

        from lora_dpo.adapters import check_folder

        check_folder(adapter)
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
        return sum(_product(shape) for shape in shapes)
    skeleton = _skeleton(recipe)
    plain = Base(skeleton, None, "", None, "none", False, "float32", None)  # type: ignore[arg-type]
    model = attach_lora(plain, recipe.lora, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _skeleton(recipe: Recipe) -> Any:
    section = recipe.model
    return load_skeleton(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _resolved_lines(run: _Run, trainable: int) -> Iterator[tuple[str, str]]:
    import torch

    recipe, settings = run.recipe, run.settings
    device = pick_device()
    dtype = pick_dtype(recipe.model.dtype, device)
    skeleton = _skeleton(recipe)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield "model", f"{recipe.model.name}, {total / 1e6:,.0f} M parameters"
    yield "device", where
    yield "weights", _weights_line(recipe, skeleton, device, dtype)
    yield "reference", "the base, adapter off" if recipe.reference == "base" else f"a frozen copy of {recipe.reference}"
    yield "adapter", f"{trainable:,} trainable parameters in float32 ({trainable / total:.2%}){_lora_line(recipe)}"
    for which, report in run.reports.items():
        yield f"{which} data", report.summary()
    yield "tokens", _token_line(run.train)
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    per_epoch = -(-len(run.train) // batch)
    steps = settings.get("max_steps", -1)
    steps = steps if steps > 0 else round(per_epoch * settings["num_train_epochs"])
    mean = fmean(len(p.prompt) * 2 + len(p.chosen) + len(p.rejected) for p in run.train)
    yield "steps", (
        f"{steps} of {batch} pairs ({steps * batch / len(run.train):.2f} passes over the data), "
        f"about {mean * batch:,.0f} tokens a step"
    )
    weights = settings.get("loss_weights") or [1.0] * len(settings["loss_type"])
    loss = " + ".join(f"{weight:g}·{name}" for name, weight in zip(settings["loss_type"], weights, strict=False))
    yield "objective", f"{loss}, β {settings.get('beta', 0.1):g}, learning rate {settings['learning_rate']:g}"
    yield "output", str(run.output)


def _weights_line(recipe: Recipe, skeleton: Any, device: Any, dtype: str) -> str:
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
    parts = []
    for name, lengths in (
        ("prompt", [len(pair.prompt) for pair in pairs]),
        ("chosen", [len(pair.chosen) for pair in pairs]),
        ("rejected", [len(pair.rejected) for pair in pairs]),
    ):
        parts.append(f"{name} {median(lengths):.0f} (longest {max(lengths)})")
    cut = sum(pair.truncated for pair in pairs)
    return "median " + ", ".join(parts) + (f"; {cut} pairs cut at max_length" if cut else "")


# --- one base in memory ---------------------------------------------------------------------------


def _load(run: _Run) -> Base:
    section = run.recipe.model
    tick = run.progress("loading the model", 1)
    base = load_base(
        section.name,
        revision=section.revision,
        quantize=section.quantize,
        packed=section.packed,
        dtype=section.dtype,
        trust_remote_code=section.trust_remote_code,
    )
    tick(1)
    return base


def _attach(base: Base, recipe: Recipe, *, seed: int) -> PeftModel:
    from peft import PeftModel

    if isinstance(base.model, PeftModel):
        raise ConfigError("The base handed in has an adapter on it already. Load a base without one.")
    if recipe.reference_adapter is None:
        return attach_lora(base, recipe.lora, seed=seed)
    if recipe.lora.model_fields_set:
        given = ", ".join(sorted(recipe.lora.model_fields_set))
        raise ConfigError(f"lora ({given}) comes from the reference adapter and cannot be set. Remove that section.")
    return attach_adapter(base, recipe.reference_adapter, trainable=True)


def _columns(pair: TokenPair) -> dict[str, list[int]]:
    return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}


def _make_callback(run: _Run, log: RunLog) -> Any:
    from transformers import TrainerCallback

    class Events(TrainerCallback):  # type: ignore[misc]
        """Turns the Trainer's log calls into events, and a request to stop into a checkpoint."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.emit(Progress("training", state.global_step, state.max_steps))
            if run.stop.requested or state.global_step == state.max_steps:
                control.should_save = True  # a finished run too: its evaluation may be interrupted
            if run.stop.requested:
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
            if "loss" in numbers or any(key.startswith("eval_") for key in numbers):
                log.append({"step": state.global_step, **numbers})
                run.emit(StepLogged(state.global_step, state.max_steps, numbers))

    return Events()


def _drop_printing_callbacks(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep data sets' progress bars out of the way: events say what happens."""
    import datasets

    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


# --- measuring ------------------------------------------------------------------------------------


def _measure_before(run: _Run, model: PeftModel, pad: int, cache: Path) -> tuple[Any, Measured]:
    """Score and answer as the reference. The policy equals it before the first step: the guard checks that."""
    if cache.is_file():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        scores, texts = stored["scores"], [Answer(**answer) for answer in stored["answers"]]
    else:
        scores = None
        if run.held_out:
            tick = run.progress("scoring held-out pairs with the reference", len(run.held_out))
            scores = score_pairs(model, run.held_out, pad_id=pad, as_reference=True, on_pair=tick)
        with reference(model):
            texts = _answer(run, model, "answering before training")
        write_json(cache, {"scores": scores, "answers": [answer.__dict__ for answer in texts]})
    pairs = pair_metrics(scores, scores, beta=_beta(run)) if scores else None
    return scores, Measured(pairs, _answer_metrics(run, texts), tuple(texts))


def _measure_after(run: _Run, model: PeftModel, pad: int, ref_scores: Any) -> Measured:
    pairs = None
    try:
        if run.held_out:
            tick = run.progress("scoring held-out pairs with the adapter", len(run.held_out))
            scores = score_pairs(model, run.held_out, pad_id=pad, on_pair=tick)
            pairs = pair_metrics(scores, ref_scores, beta=_beta(run))
        texts = _answer(run, model, "answering after training")
    except Stopped:
        raise Stopped(run.output, step=0, resumable=True) from None  # the last checkpoint is on disk
    return Measured(pairs, _answer_metrics(run, texts), tuple(texts))


def _beta(run: _Run) -> float:
    return float(run.settings.get("beta", 0.1))


def _answer(run: _Run, model: PeftModel, stage: str) -> list[Answer]:
    asked = [*run.prompts, *([Message(role="user", content=question.prompt)] for question in run.questions)]
    if not asked:
        return []
    sampling = Sampling(max_new_tokens=run.recipe.evaluation.max_new_tokens)
    tick = run.progress(stage, len(asked))
    return generate(model, run.tokenizer, asked, sampling=sampling, on_answer=tick)  # type: ignore[arg-type]


def _answer_metrics(run: _Run, texts: Sequence[Answer]) -> AnswerMetrics | None:
    if not texts:
        return None
    split = len(run.prompts)
    return answer_metrics(
        texts[:split],
        chosen_mean_tokens=fmean(len(pair.chosen) - 1 for pair in run.held_out) if run.held_out else 0.0,
        questions=run.questions,
        question_answers=texts[split:],
    )


def _report(run: _Run, before: Measured, after: Measured) -> None:
    run.emit(Compared(tuple(comparison(before, after))))
    shown = evenly(len(run.prompts), run.recipe.evaluation.show)
    rows = [(run.prompts[i][-1]["content"], before.texts[i].text, after.texts[i].text) for i in shown]
    if rows:
        run.emit(Answered(tuple(rows)))


def comparison(before: Measured, after: Measured) -> Iterator[tuple[str, str, str]]:
    """Rows `(name, before, after)` of all that was measured, formatted."""
    if before.pairs and after.pairs:
        for label, key, form in (
            ("reward accuracy", "accuracy", "{:.3f}"),
            ("reward margin", "margin", "{:.3f}"),
            ("chosen log-ratio (nats)", "chosen_logratio", "{:+.2f}"),
            ("rejected log-ratio (nats)", "rejected_logratio", "{:+.2f}"),
        ):
            yield label, form.format(getattr(before.pairs, key)), form.format(getattr(after.pairs, key))
    if before.answers and after.answers:
        a, b = before.answers, after.answers
        if a.answers:
            yield f"answer length (tokens; chosen {a.chosen_mean_tokens:.0f})", f"{a.mean_tokens:.1f}", f"{b.mean_tokens:.1f}"
            yield "answers that end by themselves", f"{a.finished:.0%}", f"{b.finished:.0%}"
        if a.correct is not None and b.correct is not None:
            counts = [f"{m.correct:.0%} ({round(m.correct * m.questions)}/{m.questions})" for m in (a, b) if m.correct is not None]
            yield "known answers right", counts[0], counts[1]


def evenly(total: int, count: int) -> list[int]:
    """`count` indices spread evenly over `range(total)`: a fair sample, not the best."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


# --- the result -----------------------------------------------------------------------------------


def _save(run: _Run, base: Base, model: PeftModel, log: RunLog, before: Measured, after: Measured) -> None:
    metrics = {
        "before": {"pairs": to_json(before.pairs), "answers": to_json(before.answers)},
        "after": {"pairs": to_json(after.pairs), "answers": to_json(after.answers)},
    }
    data = {which: _data_record(sources, run.reports[which]) for which, sources in _sources(run.recipe)}
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    passport = make_passport(base, reference=run.recipe.reference, data=data, metrics=metrics, created=created)
    shown = evenly(len(run.prompts), max(run.recipe.evaluation.show, 8))
    samples = [(run.prompts[i][-1]["content"], before.texts[i].text, after.texts[i].text) for i in shown]
    with atomic_folder(run.output) as folder:
        model.save_pretrained(str(folder), selected_adapters=[POLICY])
        write_passport(folder, passport)
        (folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
        shutil.copyfile(log.path, folder / "metrics.jsonl")
        write_curves(folder / "curves.png", log.rows, beta=_beta(run))
        write_card(folder / "README.md", run.recipe, passport, list(comparison(before, after)), samples)
    shutil.rmtree(run.partial, ignore_errors=True)
    run.emit(Saved(run.output))


def _sources(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    for which, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if sources is not None:
            yield which, [sources] if isinstance(sources, str) else sources


def _data_record(sources: list[str], report: ReadReport) -> dict[str, Any]:
    hashes = {source: sha256_of(Path(source)) if Path(source).is_file() else None for source in sources}
    return {"sha256": hashes, "rows": report.rows, "pairs": report.kept, "dropped": dict(report.reasons())}
