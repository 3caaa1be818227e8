"""Preference pairs from a model's own answers: sample, judge, choose, write.

FILE                 the pairs, packed if its name ends in .gz
FILE.samples.jsonl   every answer, as it was sampled
FILE.scores.jsonl    every score
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from lora_dpo.data.chat_template import assistant_turn
from lora_dpo.data.journal import Journal, Row, alone
from lora_dpo.data.prompts import Prompt, accepted_hash
from lora_dpo.data.write import check_name, write_rows
from lora_dpo.errors import ConfigError, NoPairs
from lora_dpo.events import Note, OnEvent, Progress
from lora_dpo.files import refuse_existing
from lora_dpo.judging import Judge
from lora_dpo.judging.samples import Sample, SamplePlan, sample_answers
from lora_dpo.model.decoding import Answer, note_of_thoughts

if TYPE_CHECKING:
    from lora_dpo.adapters.loading import LoadedModel

Select = Literal["best-worst", "gaps"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which judged answers become pairs."""

    select: Select = "best-worst"
    """best-worst: at most one pair a prompt. gaps: every two answers whose scores are far enough apart."""
    min_gap: float = 0.0
    """Smallest difference of scores. Equal scores never make a pair."""


@dataclass
class PairReport:
    """The account of one making of pairs: `prompts = with a pair + sum(skipped)`."""

    output: Path
    prompts: int
    answers: int
    mean_score: float | None = None
    """Over all answers that were scored."""
    pairs: int = 0
    chosen_words: float = 0.0
    rejected_words: float = 0.0
    chosen_longer: float = 0.0
    """Share of pairs whose chosen answer has more words: far from a half, length alone predicts the judge."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Prompts that gave no pair, by reason."""
    cost: str = ""
    """What the judge used, in words."""


def make_pairs(
    prompts: Sequence[Prompt],
    policy: LoadedModel,
    judge: Judge,
    output: Path,
    *,
    plan: SamplePlan | None = None,
    selection: Selection | None = None,
    samples: Path | None = None,
    on_event: OnEvent | None = None,
) -> PairReport:
    """Sample answers, judge them and write pairs; continues where a killed run was.

    Args:
        policy: the model that answers, in memory.
        output: the `.jsonl` or `.jsonl.gz` to write; it must not exist, and appears whole at the end.
        samples: where sampled answers are kept; by default beside `output`.

    Raises:
        ConfigError: the output has another suffix, or the judge needs known answers that no prompt has.
        OutputError: the output exists, or its journals hold work of other settings.
        JudgeError: the judge failed. What it scored before is kept.
        NoPairs: all prompts were sampled and judged, and none gave a pair.
    """
    check_name(output)
    refuse_existing(output)
    plan, selection = plan or SamplePlan(), selection or Selection()
    emit = on_event or (lambda event: None)
    kept = samples or output.with_name(output.name + ".samples.jsonl")
    if judge.needs_accepted and not any(prompt.accepted for prompt in prompts):
        raise ConfigError(f"The judge {judge.spec} compares with known answers: the prompts' rows need 'accepted'.")
    with alone(output):
        answers = sample_answers(
            policy.model,
            policy.base.tokenizer,
            prompts,
            plan,
            journal=kept,
            policy={key: value for key, value in policy.facts.items() if key != "adapter"},  # it may have moved
            chat_template_kwargs=policy.chat_template_kwargs,
            on_answer=_progress(emit, "sampling answers", len(prompts) * plan.answers),
        )
        if thoughts := note_of_thoughts([sample.answer for row in answers for sample in row]):
            emit(Note(thoughts))
        scores = judge_answers(
            prompts,
            answers,
            judge,
            journal=output.with_name(output.name + ".scores.jsonl"),
            samples=kept,
            on_prompt=_progress(emit, "judging prompts", len(prompts)),
        )
        report = PairReport(output, len(prompts), sum(map(len, answers)), cost=judge.cost())
        common = {
            "judge": judge.spec,
            **({"judge_facts": dict(judge.facts)} if judge.facts else {}),
            **policy.facts,
            "sampling": plan.facts(),
        }
        rows = list(_pair_rows(prompts, answers, scores, selection, common, report))
        if not rows:
            why = ", ".join(f"{count} {reason}" for reason, count in report.skipped.most_common())
            raise NoPairs(f"No prompt gave a pair ({why}). The answers are kept in {kept}.")
        write_rows(rows, output)
    _warn(emit, report)
    return report


def judge_answers(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sample]],
    judge: Judge,
    *,
    journal: Path,
    samples: Path,
    on_prompt: Callable[[int], None] | None = None,
) -> list[list[float | None]]:
    """The judge's scores of all answers; continues if the journal holds some already.

    Args:
        samples: where the answers are kept, to be named where the journal holds scores of another judge.
    """
    texts = [[sample.answer.text for sample in row] for row in answers]
    settings = {"judge": judge.spec, "facts": dict(judge.facts), "answers_sha256": _hash(texts)}
    if any(prompt.accepted for prompt in prompts):
        settings["accepted_sha256"] = accepted_hash(prompts)
    instead = (
        f"Remove {journal} to judge the kept answers anew, or judge them into another output with --samples {samples}."
    )
    log = Journal(journal, settings, instead=instead)
    found = {row["prompt"]: row["scores"] for row in log.rows}
    for index, (prompt, row) in enumerate(zip(prompts, answers, strict=True)):
        if on_prompt:
            on_prompt(index)
        if index not in found:
            found[index] = judge.score(prompt, [sample.answer for sample in row])
            log.append([{"prompt": index, "scores": found[index]}])
    if on_prompt:
        on_prompt(len(prompts))
    return [found[index] for index in range(len(prompts))]


def choose(
    answers: Sequence[Answer], scores: Sequence[float | None], selection: Selection
) -> tuple[list[tuple[int, int]], str]:
    """Which answers of one prompt make pairs.

    An answer that was cut off by the length limit is never chosen: training on it would teach to stop in
    the middle of a sentence. Empty and unscored answers are in no pair.

    Returns:
        `(chosen, rejected)` indices, the largest gap first, and the reason if there are none.
    """
    judged = {index: score for index, score in enumerate(scores) if score is not None and answers[index].said.strip()}
    if not judged:
        return [], "without a scored answer"
    best_first = sorted(judged, key=lambda index: -judged[index])
    winners = [index for index in best_first if answers[index].finished]
    if not winners:
        return [], "without an answer that ended by itself"
    gaps = [(judged[a] - judged[b], a, b) for a in winners for b in best_first if answers[a].text != answers[b].text]
    apart = [(gap, a, b) for gap, a, b in gaps if gap > 0 and gap >= selection.min_gap]
    if not apart:
        return [], "with answers scored alike"
    apart.sort(key=lambda item: -item[0])
    return [(a, b) for _, a, b in (apart[:1] if selection.select == "best-worst" else apart)], ""


def _pair_rows(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sample]],
    scores: Sequence[Sequence[float | None]],
    selection: Selection,
    common: Mapping[str, Any],
    report: PairReport,
) -> Iterator[Row]:
    """The pairs as rows to write; fills in the report."""
    known = [score for row in scores for score in row if score is not None]
    report.mean_score = fmean(known) if known else None
    lengths = []
    for prompt, samples, row in zip(prompts, answers, scores, strict=True):
        chosen_rejected, reason = choose([sample.answer for sample in samples], row, selection)
        if reason:
            report.skipped[reason] += 1
        for a, b in chosen_rejected:
            sides = {"chosen": samples[a], "rejected": samples[b]}
            lengths.append(tuple(len(sample.answer.said.split()) for sample in sides.values()))
            yield {
                "prompt": [dict(message) for message in prompt.messages],
                **{side: [assistant_turn(sides[side].answer.text)] for side in sides},
                "chosen_score": row[a],
                "rejected_score": row[b],
                "origin": {
                    **common,
                    "prompt": {"source": prompt.source, "row": prompt.row},
                    "answers": {side: sample.id for side, sample in sides.items()},
                    "seeds": {side: sample.seed for side, sample in sides.items()},
                },
            }
    report.pairs = len(lengths)
    if lengths:
        report.chosen_words = fmean(chosen for chosen, _ in lengths)
        report.rejected_words = fmean(rejected for _, rejected in lengths)
        report.chosen_longer = fmean(chosen > rejected for chosen, rejected in lengths)


def _warn(emit: OnEvent, report: PairReport) -> None:
    cut = report.skipped["without an answer that ended by itself"]
    if cut > 0.2 * report.prompts:
        text = f"{cut} of {report.prompts} prompts have no answer that ended by itself: raise max_new_tokens."
        emit(Note(text, warning=True))


def _progress(emit: OnEvent, stage: str, total: int) -> Callable[[int], None]:
    return lambda done: emit(Progress(stage, done, total))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
