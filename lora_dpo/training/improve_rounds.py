"""Rounds of sample, judge, train: a model learns from its own answers, on one loaded base.

Round r samples from round r-1's adapter, which is also the reference of its training. What is finished is on
the disk, so that the same command goes on after any step:

OUTPUT-round1, OUTPUT-round2 …            the adapters
OUTPUT.improve/recipe.yaml                what the rounds were begun with
OUTPUT.improve/round1.pairs.jsonl         pairs, with their journals beside them
OUTPUT.improve/round0.heldout.json        answers and scores on held-out prompts; round 0 is the start
OUTPUT.improve/rounds.json                the table
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dpo import places
from lora_dpo.adapters.checkpoints import checkpoints
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import LoadedModel
from lora_dpo.adapters.passport import read_passport
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.config.improve_recipe import ImproveRecipe, dump_improve_recipe
from lora_dpo.config.trl_dpo import trainer_settings
from lora_dpo.data.journal import alone, write_new
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.data.prompts import Prompt, accepted_hash, prompts_hash, prompts_with_report
from lora_dpo.errors import ConfigError, DataError, NoPairs, OutputError
from lora_dpo.events import Answered, Event, Note, OnEvent, Progress, RoundsMeasured, Stopped, StopSignal
from lora_dpo.files import disk_errors, refuse_existing, replace_file
from lora_dpo.judging import Judge, Means, open_judge
from lora_dpo.judging.endpoint import EndpointSettings
from lora_dpo.judging.pair_making import Selection, make_pairs
from lora_dpo.judging.samples import SamplePlan
from lora_dpo.judging.specs import check_specs, is_implicit
from lora_dpo.leftovers import settle
from lora_dpo.model.base import Base, load_recipe_base
from lora_dpo.model.decoding import Answer, Sampling, generate
from lora_dpo.model.lora import detach
from lora_dpo.training.prepare import with_reference
from lora_dpo.training.round_scores import Measurement, score_table
from lora_dpo.training.run import train

FEWEST_HELD_OUT = 8


@dataclass
class ImproveResult:
    """What came of the rounds."""

    measured: list[Measurement]
    best: int
    """The round with the highest score; 0 if no round was better than the start."""
    adapter: Path | None
    """The best round's adapter; None for the base itself."""
    cost: str = ""


@dataclass
class _Rounds:
    recipe: ImproveRecipe
    output: Path
    emit: OnEvent
    stop: StopSignal
    prompts: list[Prompt]
    held_out: list[Prompt]
    measured: list[Measurement] = field(default_factory=list)
    base: Base | None = None
    judge: Judge | None = None

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".improve")

    def adapter(self, number: int) -> Path | None:
        """The adapter that round `number` ended with; round 0 is the start."""
        if number == 0:
            start = self.recipe.reference
            return None if start == "base" else Path(start.removeprefix("adapter:"))
        return self.output.with_name(f"{self.output.name}-round{number}")

    def pairs(self, number: int) -> Path:
        return self.folder / f"round{number}.pairs.jsonl"

    def tell(self, event: Event) -> None:
        """Pass an event on; a request to stop is heard here, between steps that are on the disk."""
        self.emit(event)
        if self.stop.requested:
            raise Stopped(self.output, step=0, resumable=True)


def improve(
    recipe: ImproveRecipe,
    *,
    name: str = "improved",
    on_event: OnEvent | None = None,
    stop: StopSignal | None = None,
) -> ImproveResult:
    """Run rounds until the held-out score stops rising, or `improve.rounds` of them are done.

    A round counts as better if its mean gain over the best round so far, prompt by prompt, is larger than the
    gain's standard error. The first round that is not better is the last.

    Args:
        name: the recipe's name; round N's adapter is `adapters/NAME-roundN` unless the recipe sets `output`.
        stop: set its `requested` to end after the step under way; the same call goes on from there.

    Raises:
        LoraDPOError: anything that a user can mend; finished steps are kept.
        Stopped: `stop` was requested.
    """
    run = _prepare(recipe, name, on_event or (lambda event: None), stop or StopSignal())
    with alone(run.folder / "recipe.yaml"):
        _claim(run)
        settle(run.folder.parent)  # a round that was killed in its last clean-up is not trained again
        best = 0
        run.measured.append(_measured(run, 0))
        for number in range(1, recipe.improve.rounds + 1):
            try:
                _make_pairs(run, number)
            except NoPairs as nothing:
                if number == 1:
                    raise
                run.emit(Note(f"Round {number} has nothing to learn from. {nothing}"))
                break
            _train(run, number)
            run.measured.append(_measured(run, number))
            _write_table(run)
            gain, error = run.measured[number].gain_over(run.measured[best])
            if not gain > error:
                text = f"Round {number} did not raise the score: gain {gain:+z.3f}, standard error {error:.3f}."
                run.emit(Note(text))
                break
            best = number
        run.emit(Answered(tuple(_side_by_side(run, best))))
        return ImproveResult(run.measured, best, run.adapter(best), run.judge.cost() if run.judge else "")


# --- before the first round -----------------------------------------------------------------------


def read_rounds(recipe: ImproveRecipe) -> tuple[ImproveRecipe, list[Prompt], list[Prompt], list[str]]:
    """Check the settings and read the prompts, without torch: what is wrong with them is said within seconds.

    Returns:
        The recipe with its reference as a folder, the prompts, the held-out prompts, and an account of both files.

    Raises:
        LoraDPOError: as `improve` would.
    """
    section = recipe.improve
    check_specs(section.judges)
    if any(map(is_implicit, section.judges)):
        raise ConfigError(
            "The implicit judge changes with every round, so its scores cannot show whether rounds help. Use another "
            "judge, or lora-dpo pairs --judge implicit for one round."
        )
    recipe = with_reference(recipe)
    if recipe.lora.modules_to_save and section.rounds > 1 and recipe.model.dtype != "float32":
        raise ConfigError(
            "Rounds go on from the last one's adapter, and with lora.modules_to_save that is not done in 16 bits. Set "
            "model.dtype: float32, or improve.rounds: 1."
        )
    trainer_settings(recipe.training(reference=recipe.reference, pairs=Path("pairs"), output=Path("output")))
    prompts, read = prompts_with_report(section.prompts, limit=section.limit)
    held_out, read_held_out = prompts_with_report(section.held_out, limit=section.held_out_limit)
    if len(held_out) < FEWEST_HELD_OUT:
        raise DataError(
            f"{section.held_out} holds {len(held_out)} prompts: too few to see whether a round helped. "
            f"Give at least {FEWEST_HELD_OUT}."
        )
    asked = set(map(_asked, prompts))
    leaked = [prompt for prompt in held_out if _asked(prompt) in asked]
    if leaked:
        raise DataError(
            f"{len(leaked)} of the {len(held_out)} held-out prompts are trained on, too (the first is "
            f"{leaked[0].source} row {leaked[0].row}). Take them out of one of the files."
        )
    accounts = [f"prompts: {read.summary(section.prompts)}"]
    accounts.append(f"held-out prompts: {read_held_out.summary(section.held_out)}")
    return recipe, prompts, held_out, accounts


def _prepare(recipe: ImproveRecipe, name: str, emit: OnEvent, stop: StopSignal) -> _Rounds:
    recipe, prompts, held_out, accounts = read_rounds(recipe)
    for text in accounts:
        emit(Note(text))
    output = Path(recipe.output) if recipe.output else places.adapters() / name
    return _Rounds(recipe, output, emit, stop, prompts, held_out)


def _asked(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """The conversation, without regard to case and white space."""
    return tuple((said["role"], " ".join(said["content"].casefold().split())) for said in prompt.messages)


def _claim(run: _Rounds) -> None:
    """Write down the recipe, or check that it is the one that the rounds were begun with."""
    path, text = run.folder / "recipe.yaml", dump_improve_recipe(run.recipe)
    if not path.exists():
        for number in range(1, run.recipe.improve.rounds + 1):
            refuse_existing(run.adapter(number) or path)
        write_new(path, text)
        return
    with disk_errors(path):
        old = path.read_text(encoding="utf-8")
    changed = _changed_lines(old, text)
    if changed:
        raise ConfigError(
            f"The rounds in {run.folder} were begun with other settings (now: {'; '.join(changed[:3])}). "
            "Go on with those settings, or set another output."
        )


def _changed_lines(old: str, new: str) -> list[str]:
    """What differs, but for the number of rounds: more of them may be asked for later."""
    before, now = ([line for line in text.splitlines() if not line.startswith("  rounds:")] for text in (old, new))
    if before == now:
        return []
    changed = [line.strip() for line in now if line not in before]
    return changed or [f"without {line.strip()}" for line in before if line not in now] or ["another order"]


# --- the steps of a round -------------------------------------------------------------------------


def _make_pairs(run: _Rounds, number: int) -> None:
    target, section = run.pairs(number), run.recipe.improve
    if target.exists():
        return
    how = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=section.seed + number,
    )
    run.tell(Note(f"round {number}: sampling and judging"))
    with _policy(run, number - 1) as policy:
        make_pairs(
            run.prompts,
            policy,
            _judge(run),
            target,
            plan=SamplePlan(answers=section.answers, sampling=how, batch_size=section.batch_size),
            selection=Selection(select=section.select, min_gap=section.min_gap),
            on_event=run.tell,
        )


def _train(run: _Rounds, number: int) -> None:
    output = run.adapter(number)
    assert output is not None  # noqa: S101 - every round but the start has one
    if output.exists():
        passport = read_passport(output)
        if passport is None or str(run.pairs(number)) not in passport.data.get("train", {}).get("sha256", {}):
            raise OutputError(f"{output} already exists and is not of this run. Set another output.")
        return
    run.tell(Note(f"round {number}: training"))
    before = run.adapter(number - 1)
    reference = "base" if before is None else f"adapter:{before}"
    recipe = run.recipe.training(reference=reference, pairs=run.pairs(number), output=output)
    resume = bool(checkpoints(partial_of(output)))
    result = train(recipe, base=_base(run), resume=resume, on_event=run.emit, stop=run.stop)
    _base(run).model = detach(result.model)


def _measured(run: _Rounds, number: int) -> Measurement:
    """The round's held-out answers and scores: from the disk, or made now."""
    path = run.folder / f"round{number}.heldout.json"
    asked = {"prompts_sha256": prompts_hash(run.held_out), "accepted_sha256": accepted_hash(run.held_out)}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if any(stored.get(name) != value for name, value in asked.items()):
            raise OutputError(
                f"{path} holds answers to other held-out prompts: {run.recipe.improve.held_out} has changed since. Put "
                "it back as it was, or set another output."
            )
        found = Measurement(
            number, tuple(Answer(**answer) for answer in stored["answers"]), tuple(stored["scores"]), stored["pairs"]
        )
    else:
        found = measure_round(run, number)
        text = {**asked, "answers": [asdict(a) for a in found.answers], "scores": found.scores, "pairs": found.pairs}
        write_new(path, json.dumps(text, indent=1, ensure_ascii=False) + "\n")
    run.tell(RoundsMeasured(tuple(score_table([*run.measured, found]))))
    return found


def measure_round(run: _Rounds, number: int) -> Measurement:
    """Answer the held-out prompts with the policy of a round, and have the answers scored."""
    sampling = Sampling(max_new_tokens=run.recipe.improve.max_new_tokens)
    total = len(run.held_out)
    with _policy(run, number) as policy:
        answers = generate(
            policy.model,
            policy.base.tokenizer,
            [prompt.messages for prompt in run.held_out],
            sampling=sampling,
            chat_template_kwargs=run.recipe.model.template,
            batch_size=run.recipe.improve.batch_size,
            on_answer=lambda done: run.tell(Progress(f"held-out answers, round {number}", done, total)),
        )
    judge, scores = _judge(run), []
    start = run.measured[0].answers if run.measured else answers
    for index, prompt in enumerate(run.held_out):
        # Beside the start's answer: a judge that compares then gives the share of prompts where this round wins,
        # and one that looks at each answer alone gives what it would give anyway.
        scores.append(judge.score(prompt, [start[index], answers[index]])[1])
        run.tell(Progress(f"judging held-out answers, round {number}", index + 1, total))
    if all(score is None for score in scores):
        raise DataError(f"The judge {judge.spec} scored no held-out answer. Give prompts that it can judge.")
    pairs = run.pairs(number).read_bytes().count(b"\n") if number else 0
    return Measurement(number, tuple(answers), tuple(scores), pairs)


# --- what is in memory, once and only when it is needed -------------------------------------------


def _base(run: _Rounds) -> Base:
    if run.base is None:
        run.base = load_recipe_base(run.recipe.model)
    return run.base


@contextmanager
def _policy(run: _Rounds, number: int) -> Iterator[LoadedModel]:
    """Round `number`'s model, on the one base; its adapter is taken off again at the end."""
    base, adapter = _base(run), run.adapter(number)
    if adapter is None:
        yield LoadedModel(base, base.model, chat_template_kwargs=run.recipe.model.template)
        return
    model: Any = attach_adapter(base, adapter)
    try:
        yield LoadedModel(base, model, adapter, run.recipe.model.template)
    finally:
        base.model = detach(model)


def _judge(run: _Rounds) -> Judge:
    if run.judge is None:
        section = run.recipe.improve
        endpoint = EndpointSettings(
            per_minute=section.judge_per_minute,
            prices=(section.judge_prices[0], section.judge_prices[1]) if section.judge_prices else None,
            criterion=section.criterion or EndpointSettings.criterion,
        )
        run.judge = open_judge(section.judges, Means(endpoint=endpoint, cache=run.folder / "judge.sqlite"))
    return run.judge


def _write_table(run: _Rounds) -> None:
    """`rounds.json`: the table for programs. It follows from the held-out files, so it may be replaced."""
    rows = [
        {
            "round": found.round,
            "adapter": str(run.adapter(found.round)) if run.adapter(found.round) else None,
            "score": found.score,
            "mean_tokens": fmean(answer.said_tokens for answer in found.answers),
            "finished": fmean(answer.finished for answer in found.answers),
            "pairs": found.pairs,
        }
        for found in run.measured
    ]
    path = run.folder / "rounds.json"
    with disk_errors(path):
        replace_file(path, json.dumps(rows, indent=2) + "\n")


def _side_by_side(run: _Rounds, best: int) -> Iterator[tuple[str, str, str]]:
    """Held-out answers of the start and of the best round, spread over the file: a fair sample."""
    for index in evenly_spaced(len(run.held_out), run.recipe.improve.show) if best else ():
        texts = [run.measured[number].answers[index].text for number in (0, best)]
        yield run.held_out[index].text, texts[0], texts[1]
