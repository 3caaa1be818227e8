"""A recipe becomes a run: read, resolve, load once, measure, train, measure again, save.

`train` emits events and never prints. The whole run uses one base model in memory: with the adapter
it is the policy, without it the reference and the "before" of every comparison.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo import places
from lora_dpo.adapters.checkpoints import (
    check_states,
    checkpoint_callback,
    checkpoints,
    clear_torn,
    read_state,
    tokens_seen,
)
from lora_dpo.adapters.folder import restore_adapter
from lora_dpo.adapters.passport import Sources, make_passport, sources_of, write_passport
from lora_dpo.adapters.run_folder import METRICS, RunLog, choose_output, discard_own, open_run, release, resume_command
from lora_dpo.adapters.stored_margins import PairMargin, write_margins
from lora_dpo.adapters.stored_pairs import HELD_OUT
from lora_dpo.config.reading import dump_recipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.trl_common import trl_refusals
from lora_dpo.config.trl_dpo import trainer_config
from lora_dpo.data import TokenPair
from lora_dpo.data.answers import crossed
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.data.write import write_pairs
from lora_dpo.engine.token_budget import memory_advice
from lora_dpo.errors import ModelError, OutputError
from lora_dpo.evaluation.metrics import to_json
from lora_dpo.evaluation.report.model_card import write_card, write_curves
from lora_dpo.evaluation.report.write import PAGE, report_of
from lora_dpo.evaluation.verify_adapter import write_stored_pairs
from lora_dpo.events import Answered, Compared, Note, OnEvent, Progress, Saved, StepLogged, Stopped, StopSignal
from lora_dpo.files import atomic_folder, disk_errors
from lora_dpo.model.base import Base
from lora_dpo.model.device import out_of_memory
from lora_dpo.model.lora import POLICY
from lora_dpo.quiet import quiet_libraries
from lora_dpo.training.before_after import Measured, comparison, held_out_losses, measure_after, measure_before
from lora_dpo.training.data_record import changed_data, data_record
from lora_dpo.training.guard.callback import add_guard
from lora_dpo.training.guard.training_guard import Guard, Outcome, check_health, was_stopped
from lora_dpo.training.pairs_seen import margins_in, margins_of
from lora_dpo.training.policy import attached, load
from lora_dpo.training.prepare import check_early, prepare, with_reference
from lora_dpo.training.prepared import Run
from lora_dpo.training.run_summary import Stopwatch, findings, record, write_record

if TYPE_CHECKING:
    from peft import PeftModel

Look = Callable[[int, int, "PeftModel"], None]
"""Called with the step, the number of steps, and the model in training, to ask it something."""
Rows = list[tuple[str, str, str]]


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the adapter on disk, the model in memory, and what was measured."""

    folder: Path
    base: Base
    model: PeftModel
    before: Measured
    after: Measured
    outcome: Outcome
    """What the guard did: alarms, where it stopped, which step's adapter this is."""


def train(
    recipe: Recipe,
    *,
    name: str = "adapter",
    base: Base | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
    stop: StopSignal | None = None,
    look: Look | None = None,
    candidate_of: Path | None = None,
) -> TrainResult:
    """Run a recipe from preference files to an adapter folder.

    Args:
        name: the recipe's name; the adapter is `adapters/NAME` unless the recipe sets `output`.
        base: a base model that is loaded already; it must be the one that the recipe names. A run that ends early
            gives it back as it was, without an adapter.
        resume: continue an interrupted run from its last checkpoint, with the same losses.
        on_event: receives what happens (`lora_dpo.events`).
        stop: set its `requested` to save a checkpoint and end at the next step; its `keep`, to save the adapter then.
        look: called before the first step and after each one, with the model in eval mode; it changes nothing.
        candidate_of: the folder of a search, which measures what comes of it: the guard does not look at answers just
            before that, the search stores the pairs that `verify` rescores, and its candidates share in that folder
            what the base says before the first step.

    Raises:
        LoraDPOError: anything that a user can mend; nothing half-written is left.
        Stopped: `stop` was requested; says whether a checkpoint was saved.
    """
    recipe = with_reference(recipe)
    output = choose_output(recipe, name, resume=resume)
    changed = changed_data(recipe, name, output)
    recipe = recipe.model_copy(update={"output": output.as_posix()})
    check_health(recipe)
    check_early(recipe)
    emit = Stopwatch(on_event or (lambda event: None))
    with quiet_libraries():
        run = prepare(recipe, output, emit, stop or StopSignal(), more=[changed] if changed else [])
    checkpoint = open_run(recipe, output, resume=resume, say=lambda text: emit(Note(text, warning=True)))
    try:
        if checkpoint is not None:
            with disk_errors(output), quiet_libraries():
                check_states(checkpoint)
        with _how_to_go_on(run), disk_errors(output), _memory_errors(recipe.method), quiet_libraries():
            return _execute(run, base, checkpoint, look, candidate_of)
    finally:
        _leave(run.partial)


@contextlib.contextmanager
def _how_to_go_on(run: Run) -> Iterator[None]:
    """An error of the disk ends a run, and its checkpoints stay."""
    try:
        yield
    except OutputError as error:
        if not checkpoints(run.partial):
            raise
        raise OutputError(
            f"{error} The run's last checkpoint is whole; go on from it with: {resume_command(run.output)}"
        ) from error


def _leave(partial: Path) -> None:
    """End a run: what nothing could go on from is removed."""
    try:
        with contextlib.suppress(OSError):  # a disk that fails must not hide why the run ended; it stays as a leftover
            if checkpoints(partial):
                clear_torn(partial)
            else:
                discard_own(partial)
    finally:
        release(partial)


def _execute(
    run: Run, base: Base | None, checkpoint: Path | None, look: Look | None, candidate_of: Path | None
) -> TrainResult:
    odd = findings(run.recipe.data, run.reports["train"].rows, run.recipe.method)
    base = base or load(run)
    sources = sources_of(base, run.recipe.reference)  # hours later they may have moved
    with attached(run, base, fresh=checkpoint is None) as model:
        pad = run.tokenizer.pad_token_id if run.tokenizer.pad_token_id is not None else run.tokenizer.eos_token_id
        ref_scores, before = measure_before(run, model, pad, run.partial / "before.json")
        state = read_state(checkpoint) if checkpoint else {}
        log = RunLog(run.partial / METRICS, from_step=state.get("global_step", -1))
        guard = Guard(run, model, log, before.texts[: len(run.prompts)], candidate_of=candidate_of)
        if checkpoint and (state["global_step"] >= state["max_steps"] or was_stopped(checkpoint)):
            restore_adapter(model, checkpoint)  # only the measuring was interrupted
            guard.begin(checkpoint, state["global_step"])
            margins, scoring = margins_in(run, checkpoint), 0.0
        else:
            margins, scoring = _optimise(run, base, model, log, checkpoint, guard, look)
        outcome = guard.finish()
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad):
            raise ModelError("Training ended in NaN or infinite weights. Lower trainer.learning_rate and start again.")
        model.eval()
        after = measure_after(run, model, pad, ref_scores)
        rows = [*comparison(before, after), *held_out_losses(run, log.rows)]
        _report(run, before, after, rows)
        found = record(run, before, after, outcome, odd, scoring)
        stored = [] if candidate_of else run.held_out or run.train or crossed(run.answers)
        _save(run, base, model, log, sources, (before, after), rows, found, margins, stored)
        return TrainResult(run.output, base, model, before, after, outcome)


def _optimise(
    run: Run, base: Base, model: PeftModel, log: RunLog, checkpoint: Path | None, guard: Guard, look: Look | None
) -> tuple[list[PairMargin], float]:
    """The training loop: TRL's, from the checkpoint if there is one. Raises `Stopped` if asked to.

    Returns:
        What the engine's steps made of each pair, and the seconds in which it scored pairs with the reference; nothing
        of other methods and of TRL's own passes.
    """
    callback = _make_callback(run, log)
    if run.recipe.method == "dpo":
        trainer: Any = _dpo_trainer(run, model, dtype=base.dtype, callback=callback)
        if trainer.engine is not None:
            run.emit(Note(f"prompts are shared: {trainer.engine.proof.line}"))
    else:
        from lora_dpo.training.sft_kto_trainers import answer_trainer

        trainer = answer_trainer(run, model, dtype=base.dtype, callback=callback)
    _drop_printing_callbacks(trainer)
    _keep_tensorboard(trainer, run)
    if look is not None:
        trainer.add_callback(_make_look(look))
    add_guard(trainer, guard, checkpoint)
    trainer.add_callback(checkpoint_callback(trainer, log.sync))  # the last one: the others put files into a checkpoint
    if checkpoint:
        trainer._total_train_tokens = tokens_seen(checkpoint)
    try:
        if run.held_out_answers and not checkpoint:
            trainer.evaluate()  # the loss before the first step, into the log
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if run.held_out_answers and not run.stop.requested:
            trainer.evaluate()
        engine = getattr(trainer, "engine", None)
    finally:
        trainer.close()
    if run.stop.requested:
        raise Stopped(run.output, step=trainer.state.global_step, resumable=True)
    return margins_of(run, engine), engine.reference_seconds if engine else 0.0


def _dpo_trainer(run: Run, model: PeftModel, *, dtype: str, callback: Any) -> Any:
    from datasets import Dataset

    from lora_dpo.training.dpo_trainer import DPOTrainer

    with trl_refusals():
        return DPOTrainer(
            model,
            args=trainer_config(run.settings, output_dir=run.partial / "checkpoints", dtype=dtype),
            train_dataset=_training_set(run),
            eval_dataset=Dataset.from_list([_columns(pair) for pair in run.held_out]) if run.held_out else None,
            processing_class=run.tokenizer,
            callbacks=[callback],
            engine=run.recipe.engine,
            pair_weights=run.weights is not None,
        )


# --- the trainer's parts --------------------------------------------------------------------------


def _training_set(run: Run) -> Any:
    from datasets import Dataset

    rows = Dataset.from_list([_columns(pair) for pair in run.train])
    return rows if run.weights is None else rows.add_column("pair_weight", run.weights)


def _columns(pair: TokenPair) -> dict[str, list[int]]:
    return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}


def _make_callback(run: Run, log: RunLog) -> Any:
    from transformers import TrainerCallback

    class Events(TrainerCallback):  # type: ignore[misc]
        """Turns the Trainer's log calls into events, and a request to stop into a checkpoint."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.emit(Progress("training", state.global_step, state.max_steps))
            if run.stop.requested or run.stop.keep or state.global_step == state.max_steps:
                control.should_save = True  # a finished run too: its evaluation may be interrupted
            if run.stop.requested or run.stop.keep:
                control.should_training_stop = True
            if run.stop.keep and state.global_step < state.max_steps:
                run.stop.kept_at = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
            if "loss" in numbers or any(key.startswith("eval_") for key in numbers):
                log.append({"step": state.global_step, **numbers})
                run.emit(StepLogged(state.global_step, state.max_steps, numbers))

    return Events()


def _keep_tensorboard(trainer: Any, run: Run) -> None:
    """TensorBoard's files go to runs/NAME: transformers writes them among the checkpoints, which do not stay."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(places.runs() / run.output.name)
            run.emit(Note(f"TensorBoard's files go to {callback.logging_dir}"))


def _make_look(look: Look) -> Any:
    from transformers import TrainerCallback

    class Looks(TrainerCallback):  # type: ignore[misc]
        """Shows the model in training between two steps."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._show(state, model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._show(state, model)

        def _show(self, state: Any, model: Any) -> None:
            modes = [(part, part.training) for part in model.modules()]
            model.eval()
            try:
                look(state.global_step, state.max_steps, model)
            finally:
                for part, mode in modes:
                    part.training = mode

    return Looks()


def _drop_printing_callbacks(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


@contextlib.contextmanager
def _memory_errors(method: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        raise ModelError(f"Memory ran out. {memory_advice(method)}") from error


# --- measuring ------------------------------------------------------------------------------------


def _report(run: Run, before: Measured, after: Measured, compared: Rows) -> None:
    run.emit(Compared(tuple(compared)))
    shown = evenly_spaced(len(run.prompts), run.recipe.evaluation.show)
    rows = [(run.prompts[i][-1]["content"], before.texts[i].text, after.texts[i].text) for i in shown]
    if rows:
        run.emit(Answered(tuple(rows)))


# --- the result -----------------------------------------------------------------------------------


def _save(
    run: Run,
    base: Base,
    model: PeftModel,
    log: RunLog,
    sources: Sources,
    measured: tuple[Measured, Measured],
    compared: Rows,
    found: dict[str, Any],
    margins: Sequence[PairMargin],
    stored: Sequence[TokenPair],
) -> None:
    before, after = measured
    metrics: dict[str, Any] = {
        "before": {"pairs": to_json(before.pairs), "answers": to_json(before.answers)},
        "after": {"pairs": to_json(after.pairs), "answers": to_json(after.answers)},
    }
    if run.stop.kept_at is not None:
        metrics["stopped"] = {"step": run.stop.kept_at, "of": run.steps}
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = run.recipe.model_dump(mode="json")
    passport = make_passport(
        base,
        reference=run.recipe.reference,
        data=data_record(run),
        metrics=metrics,
        created=created,
        recipe=settings,
        chat_template_kwargs=run.chat_template_kwargs,
        sources=sources,
    )
    shown = evenly_spaced(len(run.prompts), max(run.recipe.evaluation.show, 8))
    samples = [(run.prompts[i][-1]["content"], before.texts[i].text, after.texts[i].text) for i in shown]
    with atomic_folder(run.output) as folder:
        model.save_pretrained(str(folder), selected_adapters=[POLICY])
        write_passport(folder, passport)
        if stored:
            write_stored_pairs(folder, model, stored, tokenizer=run.tokenizer)
        if run.apart:
            write_pairs(run.apart, folder / HELD_OUT)
        (folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8", newline="\n")
        shutil.copyfile(log.path, folder / METRICS)
        write_curves(folder / "curves.png", log.rows, beta=run.beta, method=run.recipe.method)
        write_card(folder / "README.md", run.recipe, passport, compared, samples, stopped=found["health"]["sentence"])
        write_record(folder, found)
        write_margins(folder, margins)
        (folder / PAGE).write_text(report_of([folder], name=run.output.name), encoding="utf-8", newline="\n")
    with contextlib.suppress(OSError):  # the adapter is there; what cannot be removed is a leftover
        discard_own(run.partial)
    run.emit(Saved(run.output))
