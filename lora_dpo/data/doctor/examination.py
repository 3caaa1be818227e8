"""The doctor: one pass over preference data that finds what would spoil a DPO run, with rows and examples.

Memory grows by about a kilobyte a pair, whatever its length: texts are hashed and let go.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.data.chat_template import Message, prompt_ids
from lora_dpo.data.columns import Wanted
from lora_dpo.data.doctor.catalogue import CHECKS, Check
from lora_dpo.data.doctor.checks import (
    Texts,
    ends_with_marker,
    prompt_text,
    special_findings,
    text_findings,
    thought_length,
)
from lora_dpo.data.doctor.near_duplicates import NearDuplicates
from lora_dpo.data.doctor.statistics import LengthBias, Noise, length_bias, percentiles
from lora_dpo.data.language import named_language
from lora_dpo.data.pairs import Origin, PreferencePair, ReadReport
from lora_dpo.data.read import account, outcomes
from lora_dpo.data.thoughts import opened_thought, thought_tokens
from lora_dpo.data.tokenize import special_tokens, tokenize_pair
from lora_dpo.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
CUTS = (512, 1024, 2048, 4096)
_OF_KIND = {"missing": "malformed"}
"""Checks of the reasons for which a row is no pair, where the names differ."""
BIASED, BIASED_FROM = 0.7, 30
"""Length bias is a finding from this share on, and from this many pairs on: fewer say little."""


@dataclass
class Finding:
    """One check that found something."""

    check: Check
    rows: list[Origin] = field(default_factory=list)
    examples: list[tuple[Origin, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Rows found."""
        return len(self.rows)


@dataclass
class Diagnosis:
    """What the doctor says about a data set."""

    report: ReadReport = field(default_factory=ReadReport)
    findings: dict[str, Finding] = field(default_factory=dict)
    lengths: dict[str, array[int]] = field(
        default_factory=lambda: {part: array("L") for part in ("prompt", "chosen", "rejected")}
    )
    """Of each pair, in tokens with a tokenizer, else in characters."""
    said: dict[str, array[int]] = field(default_factory=lambda: {part: array("L") for part in ("chosen", "rejected")})
    """The same of the answers, without the thoughts at their starts."""
    thinking: int = 0
    """Pairs of which an answer begins with a thought."""
    unit: str = "characters"
    languages: Counter[str] = field(default_factory=Counter)
    """Of the chosen answers: the language if it can be told, the script if it is not Latin, else why it is not told."""
    noise: Noise = field(default_factory=Noise)
    bias: LengthBias = field(default_factory=LengthBias)
    max_length: int | None = None
    scored: int = 0
    prompts: int = 0
    """Different prompts."""

    @property
    def errors(self) -> int:
        """Rows with findings that are errors, each finding counted."""
        return sum(finding.count for finding in self.findings.values() if finding.check.severity == "error")

    @property
    def pairs(self) -> int:
        """Pairs that were looked at."""
        return len(self.lengths["prompt"])

    @property
    def note_of_thoughts(self) -> str | None:
        """That answers begin with thoughts, and what these are not counted in; None if none does."""
        if not self.thinking:
            return None
        counted = "; max_length cuts them, too" if self.unit == "tokens" else ""
        what = "an answer begins with a thought: lengths and length bias leave it out"
        return f"in {self.thinking} of {self.pairs} pairs {what}{counted}"

    def removals(self) -> dict[Origin, str]:
        """Rows that `--fix` takes out, with the first reason."""
        out: dict[Origin, str] = {}
        for finding in self.findings.values():
            if finding.check.removes:
                for origin in finding.rows:
                    out.setdefault(origin, finding.check.title)
        return out

    def share_cut(self, max_length: int) -> float:
        """Share of pairs of which a sequence is longer than `max_length` tokens."""
        longest = zip(self.lengths["prompt"], self.lengths["chosen"], self.lengths["rejected"], strict=True)
        return sum(prompt + max(sides) > max_length for prompt, *sides in longest) / max(1, self.pairs)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values, all row numbers included."""
        tokens = self.unit == "tokens"
        return {
            "rows": self.report.rows,
            "pairs": self.pairs,
            "dropped": len(self.report.dropped),
            "dropped_reasons": dict(self.report.reasons()),
            "read_as": dict(self.report.formats),
            "notes": self.report.notes,
            "different_prompts": self.prompts,
            "pairs_with_scores": self.scored,
            "findings": [_finding_as_json(finding) for finding in self.findings.values()],
            "length": {
                "unit": self.unit,
                **{part: percentiles(values) for part, values in {**self.lengths, **self.said}.items()},
                "share_cut": {str(cut): self.share_cut(cut) for cut in self.cuts()} if tokens else None,
            },
            "pairs_with_thoughts": self.thinking,
            "length_bias": self.bias.as_json(),
            "label_noise": self.noise.as_json(),
            "languages": dict(self.languages.most_common()),
        }

    def cuts(self) -> list[int]:
        """The `max_length`s that the report compares."""
        return sorted({*CUTS, *([self.max_length] if self.max_length else [])})


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    check = finding.check
    return {
        "check": check.name,
        "severity": check.severity,
        "title": check.title,
        "count": finding.count,
        "meaning": check.meaning,
        "advice": check.advice,
        "rows": [str(origin) for origin in finding.rows],
        "examples": [{"row": str(origin), "text": text} for origin, text in finding.examples],
    }


def examine(
    sources: Sequence[str],
    *,
    format: str | None = None,
    min_gap: float | None = None,
    columns: Mapping[str, str] | None = None,
    wanted: Wanted = "pairs",
    held_out: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
    max_length: int | None = 1024,
    on_rows: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Look at preference data as a run would read it.

    Args:
        columns: names of columns by what they are, as for `read_pairs`.
        wanted: "answers" if rows with one answer are no mistake.
        held_out: data whose prompts must not be among those of `sources`.
        chat_template_kwargs: keywords for its chat template.
        tokenizer: also look at pairs as the model will read them; lengths are in tokens then.
        max_length: longest sequence in tokens; used with a tokenizer.
        on_rows: called with the number of rows read so far.

    Raises:
        DataError: a source cannot be read at all.
        UnclearColumns: what a table's columns are cannot be told, or one that is named is not there.
        ConfigError: there is no format of that name.
    """
    doctor = _Doctor(tokenizer, max_length, _prompts_of(held_out, format, columns), chat_template_kwargs or {})
    report = doctor.found.report
    for outcome in outcomes(
        sources, format=format, min_gap=min_gap, columns=columns, wanted=wanted, tolerant=True, on_note=report.note
    ):
        account(report, outcome)
        for dropped in outcome.dropped:
            doctor.note(_OF_KIND.get(dropped.kind, dropped.kind), dropped.origin, dropped.reason)
        for pair in outcome.pairs:
            doctor.look_at(pair)
        if on_rows:
            on_rows(report.rows)
    return doctor.conclude()


def prompt_key(prompt: Sequence[Message]) -> int:
    """The same for prompts that `prompt_text` takes for the same."""
    return hash(prompt_text(prompt))


def _prompts_of(sources: Sequence[str], format: str | None, columns: Mapping[str, str] | None) -> set[int]:
    """Keys of all prompts: of pairs, and of votes that made none, since these too are measured on."""
    found: set[int] = set()
    for source in sources:
        asked = [
            prompt_key(prompt)
            for outcome in outcomes(source, format=format, columns=columns, tolerant=True)
            for prompt in (*(pair.prompt for pair in outcome.pairs), *outcome.asked)
        ]
        if not asked:
            raise DataError(
                f"{source} holds no usable pair or vote, so no prompt can leak from it. Is it the right file?"
            )
        found.update(asked)
    return found


class _Doctor:
    """Findings so far, and what must be remembered of earlier pairs to make more."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        held_out: set[int],
        kwargs: TemplateKwargs,
    ) -> None:
        self.found = Diagnosis(unit="characters" if tokenizer is None else "tokens", max_length=max_length)
        self.tokenizer, self.max_length, self.held_out, self.kwargs = tokenizer, max_length, held_out, kwargs
        self.origins: list[Origin] = []
        self.judged: dict[int, int] = {}  # comparison -> first pair, times two, plus its direction
        self.repeated: dict[int, list[int]] = {}  # comparison -> all pairs, likewise, where there are several
        self.prompts: set[int] = set()
        self.near = NearDuplicates()
        self.marked = array("B")  # whether the chosen answer ends with an end-of-turn token
        self.special = None if tokenizer is None else special_tokens(tokenizer)

    def note(self, name: str, origin: Origin, evidence: str) -> None:
        finding = self.found.findings.setdefault(name, Finding(CHECKS[name]))
        finding.rows.append(origin)
        if len(finding.examples) < EXAMPLES:
            finding.examples.append((origin, evidence[:160]))

    def look_at(self, pair: PreferencePair) -> None:
        texts = Texts.of(pair)
        index = len(self.origins)
        self.origins.append(pair.origin)
        shown = dict(text_findings(pair, texts))
        if self.tokenizer is not None and self.special is not None:
            for name, evidence in special_findings(pair, self.special, self.tokenizer.bos_token):
                shown.setdefault(name, evidence)
        for name, evidence in shown.items():
            self.note(name, pair.origin, evidence)
        self._compare(index, texts, pair)
        self.marked.append(ends_with_marker(texts.chosen))
        self.found.languages[named_language(texts.chosen)] += 1
        self.found.scored += pair.gap is not None
        thoughts = thought_length(pair.chosen), thought_length(pair.rejected)
        self.found.thinking += any(thoughts)
        if self.tokenizer is None:
            self._measure(len(texts.prompt), len(texts.chosen), len(texts.rejected), thoughts)
        else:
            self._tokenize(pair, self.tokenizer, known="double-bos" in shown)

    def _measure(self, prompt: int, chosen: int, rejected: int, thoughts: tuple[int, int] = (0, 0)) -> None:
        for part, length in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            self.found.lengths[part].append(length)
        self.found.said["chosen"].append(chosen - thoughts[0])
        self.found.said["rejected"].append(rejected - thoughts[1])

    def _compare(self, index: int, texts: Texts, pair: PreferencePair) -> None:
        """With earlier pairs and with held-out prompts."""
        origin, tools = pair.origin, json.dumps(pair.tools, sort_keys=True) if pair.tools else ""
        key = prompt_key(pair.prompt)
        self.prompts.add(key)
        if key in self.held_out:
            self.note("leak", origin, texts.prompt)
        sides = hash(texts.chosen), hash(texts.rejected)
        direction = int(sides[0] < sides[1])
        comparison = hash((texts.prompt, tools, min(sides), max(sides)))
        first = self.judged.setdefault(comparison, 2 * index + direction)
        near = self.near.add(texts)
        if first >> 1 != index:
            self.repeated.setdefault(comparison, [first]).append(2 * index + direction)
        elif near is not None:
            self.note("near-duplicate", origin, f"like {self.origins[near]}: {texts.prompt}")

    def _tokenize(self, pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, *, known: bool) -> None:
        """Look at a pair as the model reads it; `known` is True if a beginning-of-text token was seen in its text."""
        try:
            tokens = tokenize_pair(tokenizer, pair, max_length=None, chat_template_kwargs=self.kwargs)
        except ModelError as error:
            if not tokenizer.chat_template:
                raise
            self.note("template", pair.origin, str(error))
            self._measure(0, 0, 0)
            return
        opened = bool(opened_thought(tokenizer, tokens.prompt))
        chosen, rejected = (thought_tokens(tokenizer, ids, opened=opened) for ids in (tokens.chosen, tokens.rejected))
        self._measure(len(tokens.prompt), len(tokens.chosen), len(tokens.rejected), (chosen, rejected))
        bos = tokenizer.bos_token_id
        if not known and bos is not None and (bos, bos) in pairwise(tokens.prompt):
            self.note("double-bos", pair.origin, tokenizer.decode(tokens.prompt[:8]))
        if tokens.left_out:
            self.note("left-out", pair.origin, f"trained on: {tokenizer.decode(tokens.chosen)}")
        if tokens.other_start:
            asked = prompt_ids(tokenizer, pair.prompt, chat_template_kwargs=self.kwargs)
            self.note("other-start", pair.origin, f"…{tokenizer.decode(asked[-12:])}")
        if tokens.chosen == tokens.rejected:
            self.note("equal", pair.origin, "the same once written for the model")
            return
        if self.max_length is None:
            return
        room = self.max_length - len(tokens.prompt)
        if room <= 0:
            self.note("prompt-fills", pair.origin, f"{len(tokens.prompt)} tokens")
        elif tokens.chosen[:room] == tokens.rejected[:room]:
            self.note("same-after-cut", pair.origin, f"the same for {room} tokens after the prompt")
        elif max(len(tokens.chosen), len(tokens.rejected)) > room:
            self.note("cut", pair.origin, f"{len(tokens.chosen)} and {len(tokens.rejected)} tokens, room for {room}")

    def conclude(self) -> Diagnosis:
        """What can be said only when all pairs have been seen."""
        found = self.found
        for judgements in self.repeated.values():
            directions = {judgement & 1 for judgement in judgements}
            found.noise.add(sum(judgement & 1 for judgement in judgements), len(judgements))
            first = self.origins[judgements[0] >> 1]
            for judgement in judgements if len(directions) == 2 else judgements[1:]:
                origin = self.origins[judgement >> 1]
                other = first if origin != first else self.origins[judgements[-1] >> 1]
                self.note("contradiction" if len(directions) == 2 else "duplicate", origin, f"compare {other}")
        if self.marked and 0.5 <= sum(self.marked) / len(self.marked) < 1:
            for origin, marked in zip(self.origins, self.marked, strict=True):
                if not marked:
                    self.note("lost-end", origin, "no end-of-turn token, which most of the others have")
        found.prompts = len(self.prompts)
        found.bias = length_bias(found.said["chosen"], found.said["rejected"])
        if found.bias.predicts >= BIASED and found.pairs >= BIASED_FROM:
            finding = found.findings.setdefault("length-bias", Finding(CHECKS["length-bias"]))
            finding.examples.append((Origin("all pairs", 0), found.bias.sentence(found.unit)))
        order = list(CHECKS)
        found.findings = dict(sorted(found.findings.items(), key=lambda item: order.index(item[0])))
        return found
