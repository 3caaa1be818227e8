"""What is measured before and after training, with the one model in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_dpo.data import Message
from lora_dpo.data.thoughts import said_length
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.evaluation.metrics import AnswerMetrics, PairMetrics, answer_metrics, pair_metrics
from lora_dpo.events import Note, Stopped
from lora_dpo.files import write_json
from lora_dpo.model.decoding import Answer, Sampling, generate, note_of_thoughts
from lora_dpo.model.lora import reference
from lora_dpo.training.prepared import Run

if TYPE_CHECKING:
    from peft import PeftModel

Scores = tuple[list[float], list[float]]
"""Log-probabilities of the held-out chosen and rejected answers."""


@dataclass(frozen=True)
class Measured:
    """Held-out measurements of one state of the model; None where the recipe measures nothing."""

    pairs: PairMetrics | None = None
    answers: AnswerMetrics | None = None
    texts: tuple[Answer, ...] = ()
    scores: Scores | None = None
    """What the metrics of the pairs are made of."""


def measure_before(run: Run, model: PeftModel, pad: int, cache: Path) -> tuple[Scores | None, Measured]:
    """Score and answer before the first step, when the policy is the reference: the guard checks that."""
    if cache.is_file():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        scores, texts = stored["scores"], [Answer(**answer) for answer in stored["answers"]]
    else:
        scores = None
        # A fresh adapter changes nothing yet, and without it the same numbers are cheaper.
        with reference(model) if run.recipe.reference_adapter is None else contextlib.nullcontext():
            if run.held_out:
                tick = run.progress("held-out pairs, reference", len(run.held_out))
                scores = score_pairs(model, run.held_out, pad_id=pad, on_pair=tick)
            texts = _answer(run, model, "answers before training")
        write_json(cache, {"scores": scores, "answers": [asdict(answer) for answer in texts]})
    pairs = pair_metrics(scores, scores, beta=run.beta) if scores else None
    return scores, Measured(pairs, _answer_metrics(run, texts), tuple(texts), scores)


def measure_after(run: Run, model: PeftModel, pad: int, ref_scores: Scores | None) -> Measured:
    """Score and answer as the policy, against the reference's scores from before."""
    pairs = scores = None
    try:
        if ref_scores:
            tick = run.progress("held-out pairs, adapter", len(run.held_out))
            scores = score_pairs(model, run.held_out, pad_id=pad, on_pair=tick)
            pairs = pair_metrics(scores, ref_scores, beta=run.beta)
        texts = _answer(run, model, "answers after training")
    except Stopped:
        raise Stopped(run.output, step=0, resumable=True) from None  # the last checkpoint is on disk
    return Measured(pairs, _answer_metrics(run, texts), tuple(texts), scores)


def _answer(run: Run, model: PeftModel, stage: str) -> list[Answer]:
    asked = [*run.prompts, *([Message(role="user", content=question.prompt)] for question in run.questions)]
    if not asked:
        return []
    sampling = Sampling(max_new_tokens=run.recipe.evaluation.max_new_tokens)
    tick = run.progress(stage, len(asked))
    kwargs = run.chat_template_kwargs
    answers = generate(model, run.tokenizer, asked, sampling=sampling, chat_template_kwargs=kwargs, on_answer=tick)
    if thoughts := note_of_thoughts(answers):
        run.emit(Note(f"{stage}: {thoughts}"))
    return answers


def _answer_metrics(run: Run, texts: Sequence[Answer]) -> AnswerMetrics | None:
    if not texts:
        return None
    split = len(run.prompts)
    return answer_metrics(
        texts[:split],
        chosen_mean_tokens=_yardstick(run),
        questions=run.questions,
        question_answers=texts[split:],
    )


def _yardstick(run: Run) -> float:
    """Mean length of the held-out answers that are good, without their end-of-turn token."""
    held_out = [(pair.prompt, pair.chosen) for pair in run.held_out]
    good = held_out or [(one.prompt, one.answer) for one in run.held_out_answers if one.up]
    return fmean(said_length(run.tokenizer, prompt, answer) for prompt, answer in good) if good else 0.0


def comparison(before: Measured, after: Measured) -> Iterator[tuple[str, str, str]]:
    """Rows `(name, before, after)` of all that was measured, formatted."""
    if before.pairs and after.pairs:
        for label, key, form in (
            ("reward accuracy", "accuracy", "{:z.3f}"),
            ("reward margin", "margin", "{:z.3f}"),
            ("chosen log-ratio (nats)", "chosen_logratio", "{:+z.2f}"),
            ("rejected log-ratio (nats)", "rejected_logratio", "{:+z.2f}"),
        ):
            yield label, form.format(getattr(before.pairs, key)), form.format(getattr(after.pairs, key))
    if before.answers and after.answers:
        a, b = before.answers, after.answers
        if a.answers:
            thought = max(a.thought_tokens, b.thought_tokens) > 0
            yield (
                f"answer length (tokens{' without thoughts' if thought else ''}; chosen {a.chosen_mean_tokens:.0f})",
                f"{a.mean_tokens:.1f}",
                f"{b.mean_tokens:.1f}",
            )
            if thought:
                yield "thought before an answer (tokens)", f"{a.thought_tokens:.1f}", f"{b.thought_tokens:.1f}"
            yield "answers that end by themselves", f"{a.finished:.0%}", f"{b.finished:.0%}"
        if a.correct is not None and b.correct is not None:
            counts = [
                f"{m.correct:.0%} ({round(m.correct * m.questions)}/{m.questions})"
                for m in (a, b)
                if m.correct is not None
            ]
            yield "known answers right", counts[0], counts[1]


def held_out_losses(run: Run, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """A row `(name, before, after)` of TRL's own loss on held-out single answers, if the log has both ends."""
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    last = max((row["step"] for row in rows if "loss" in row), default=0)
    if run.held_out_answers and last and {0, last} <= losses.keys():
        unit = " (nats a token)" if run.settings.get("loss_type", "nll") == "nll" and run.recipe.method == "sft" else ""
        yield f"held-out loss{unit}", f"{losses[0]:.3f}", f"{losses[last]:.3f}"
