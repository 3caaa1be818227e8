"""Is an adapter better, and what did it cost? Everything is measured with one base in memory, with 95% intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from lora_dpo.adapters.folder import check_adapter, put_beside, warn_of
from lora_dpo.adapters.loading import LoadedModel, attach_reference, beta_of
from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.adapters.passport import check_folder, read_passport
from lora_dpo.data import PreferencePair, TokenPair, read_pairs, tokenize_pairs
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.rows import file_of
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import AdapterError, DataError
from lora_dpo.evaluation.intervals import Interval, length_controlled, mean, rate
from lora_dpo.evaluation.kl import draw, kl_to_reference, text_losses, windows
from lora_dpo.evaluation.prequential import at_first_sight
from lora_dpo.evaluation.result import AnswerPart, Assessment, PairPart, TextPart
from lora_dpo.evaluation.verify_adapter import pad_of
from lora_dpo.evaluation.win_rate import WinRate, judged, voted
from lora_dpo.events import Note, OnEvent, Progress
from lora_dpo.files import sha256_of
from lora_dpo.judging import Judge
from lora_dpo.model.decoding import Answer, Sampling, generate, note_of_thoughts
from lora_dpo.model.lora import POLICY, REFERENCE, reference
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import refuses, repetition

AGAINST = "against"
"""Name on the model of the adapter that is compared with."""
WINDOW = 512
"""Tokens of a piece of plain text."""


@dataclass(frozen=True, kw_only=True)
class AssessPlan:
    """What is measured."""

    answers: int = 64
    """Prompts that are answered, spread over the data."""
    kl_answers: int = 24
    """Answers that are drawn at temperature 1 to measure KL on; 0 leaves it out."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the answers that are judged are drawn; greedy by default."""
    max_length: int = 2048
    """Longest prompt and answer of a pair, in tokens."""
    against: str = "base"
    """`base`, or another adapter's folder."""
    votes: str | None = None
    text: str | None = None
    """A file of plain text, for perplexity."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns of the data by what they are, as for `read_pairs`."""


def assess(
    policy: LoadedModel,
    data: Sequence[str],
    *,
    plan: AssessPlan | None = None,
    judge: Judge | None = None,
    prompts: Sequence[Prompt] | None = None,
    on_event: OnEvent | None = None,
) -> Assessment:
    """Measure an adapter that is on its base in memory.

    Args:
        policy: from `load_policy` with an adapter.
        data: held-out preference pairs, never trained on.
        judge: compares answers; without one there is no win rate, unless `plan.votes` has one.
        prompts: what is answered, by default the prompts of `data`.

    Raises:
        AdapterError: there is no adapter, or the one to compare with does not fit.
        DataError: there is no usable pair, or what a judge or vote needs is missing.
    """
    plan, emit = plan or AssessPlan(), on_event or (lambda event: None)
    if policy.adapter is None:
        raise AdapterError("There is no adapter to assess. Load one with load_policy(adapter=…).")
    began = time.perf_counter()
    run = _Work(policy, plan, emit)
    with quiet_libraries():
        pieces, contest = run.pieces(), run.votes()  # first, so that a wrong path costs nothing
        pairs, tokens = run.read(data)
        run.load_other()
        scored = run.score(tokens)
        asked = list(prompts) if prompts is not None else _prompts_of(pairs)
        asked = [asked[index] for index in evenly_spaced(len(asked), plan.answers)]
        ours = run.answer(asked, "answers of the adapter")
        with run.other():
            theirs = run.answer(asked, f"answers of {run.against}")
        if thoughts := note_of_thoughts([*ours, *theirs]):
            emit(Note(thoughts))
        contest = contest or run.contest(asked, ours, theirs, judge)
        kl = run.kl(asked)
        text = run.perplexity(pieces)
    return Assessment(
        adapter=str(policy.adapter),
        base=policy.base.name,
        against=run.against,
        data=tuple(data),
        beta=beta_of(policy.adapter),
        pairs=scored,
        ours=describe(ours),
        theirs=describe(theirs),
        length_change=mean([float(a.said_tokens - b.said_tokens) for a, b in zip(ours, theirs, strict=True)])
        if ours
        else None,
        contest=contest,
        learned=at_first_sight(policy.adapter),
        kl=kl,
        text=text,
        rows=tuple((p.text, b.text, a.text) for p, a, b in zip(asked, ours, theirs, strict=True)),
        seconds=time.perf_counter() - began,
        cost=judge.cost() if judge else "",
        trained_on=trained_on(policy.adapter, data),
    )


def trained_on(adapter: Path, data: Sequence[str]) -> tuple[str, ...]:
    """Those of some files (or hub data sets) that an adapter was trained on, by its passport."""
    passport = read_passport(adapter)
    hashes = passport.data.get("train", {}).get("sha256", {}) if passport else {}
    known = {sha for sha in hashes.values() if sha}
    files = {one: file_of(one) for one in data}
    return tuple(
        one
        for one, file in files.items()
        if (sha256_of(file) in known if file.is_file() else hashes.get(one, "") is None)
    )


@dataclass
class _Work:
    """The steps of one assessment."""

    policy: LoadedModel
    plan: AssessPlan
    emit: OnEvent

    @property
    def against(self) -> str:
        return "base" if self.plan.against == "base" else Path(self.plan.against).name

    def tick(self, stage: str, total: int) -> Callable[[int], None]:
        self.emit(Progress(stage, 0, total))
        return lambda done: self.emit(Progress(stage, min(done, total), total))

    def read(self, data: Sequence[str]) -> tuple[list[PreferencePair], list[TokenPair]]:
        pairs, report = read_pairs(list(data), columns=self.plan.columns)
        for line in report.noted():
            self.emit(Note(f"held-out data: {line}"))
        tokenizer = self.policy.base.tokenizer
        tokens, dropped = tokenize_pairs(
            tokenizer,
            pairs,
            max_length=self.plan.max_length,
            chat_template_kwargs=self.policy.chat_template_kwargs,
        )
        report.dropped.extend(dropped)
        if not tokens:
            raise DataError(f"{', '.join(data)}: {report.summary()}. No pair is left to assess with.")
        if report.dropped:
            self.emit(Note(f"held-out data: {report.summary()}"))
        return pairs, tokens

    def load_other(self) -> None:
        """The reference of the adapter's training and the adapter to compare with, beside it on the one base."""
        if REFERENCE not in self.policy.model.peft_config:  # the implicit judge has attached it already
            attach_reference(self.policy)
        if self.plan.against == "base":
            return
        folder = Path(self.plan.against)
        check_folder(folder)
        warn_of(check_adapter(self.policy.base, folder))
        put_beside(self.policy.model, folder, name=AGAINST, base=self.policy.base.name)
        self.policy.model.set_adapter(POLICY)
        self.policy.model.eval()

    @contextmanager
    def other(self) -> Iterator[None]:
        """The model that is compared with, for the length of the block."""
        model = self.policy.model
        if self.plan.against == "base":
            with model.disable_adapter():
                yield
            return
        model.set_adapter(AGAINST)
        try:
            yield
        finally:
            model.set_adapter(POLICY)

    def score(self, tokens: Sequence[TokenPair]) -> PairPart:
        model, pad = self.policy.model, pad_of(self.policy.base.tokenizer)
        ours = score_pairs(model, tokens, pad_id=pad, on_pair=self.tick("pairs, adapter", len(tokens)))
        with reference(model):
            ref = score_pairs(model, tokens, pad_id=pad, on_pair=self.tick("pairs, reference", len(tokens)))
        chosen = tuple(p - r for p, r in zip(ours[0], ref[0], strict=True))
        rejected = tuple(p - r for p, r in zip(ours[1], ref[1], strict=True))
        return pair_part(tokens, chosen, rejected, beta=beta_of(self.policy.adapter))

    def answer(self, asked: Sequence[Prompt], stage: str) -> list[Answer]:
        conversations = [prompt.messages for prompt in asked]
        return generate(
            self.policy.model,
            self.policy.base.tokenizer,
            conversations,
            sampling=self.plan.sampling,
            chat_template_kwargs=self.policy.chat_template_kwargs,
            on_answer=self.tick(stage, len(asked)),
        )

    def contest(
        self, asked: Sequence[Prompt], ours: Sequence[Answer], theirs: Sequence[Answer], judge: Judge | None
    ) -> WinRate | None:
        if judge is None or not asked:
            return None
        on_prompt = self.tick("judging", len(asked))
        return judged(asked, ours, theirs, judge, against=self.against, on_prompt=on_prompt)

    def kl(self, asked: Sequence[Prompt]) -> Interval | None:
        chosen = [asked[index].messages for index in evenly_spaced(len(asked), self.plan.kl_answers)]
        if not chosen:
            return None
        sampling = Sampling(
            max_new_tokens=self.plan.sampling.max_new_tokens, temperature=1.0, seed=self.plan.sampling.seed
        )
        model, tokenizer = self.policy.model, self.policy.base.tokenizer
        tick = self.tick("answers to measure KL on", len(chosen))
        kwargs = self.policy.chat_template_kwargs
        drawn = draw(model, tokenizer, chosen, sampling, chat_template_kwargs=kwargs, on_done=tick)
        return ratio_interval(kl_to_reference(model, drawn, on_done=self.tick("KL", len(chosen)))).within(0.0, math.inf)

    def votes(self) -> WinRate | None:
        if self.plan.votes is None:
            return None
        assert self.policy.adapter is not None  # noqa: S101 - checked by `assess`
        us, passport = self.policy.adapter.resolve(), read_passport(self.policy.adapter)
        weights = {us.name: sha256_of(us / WEIGHTS)}
        if self.plan.against != "base":
            weights[self.against] = sha256_of(Path(self.plan.against) / WEIGHTS)
        base = (passport.base_fingerprint if passport else None) or self.policy.base.fingerprint
        return voted(self.plan.votes, us=us.name, against=self.against, weights=weights, base=base)

    def pieces(self) -> list[Sequence[int]]:
        """The plain text, in pieces of token ids."""
        if self.plan.text is None:
            return []
        ids = self.policy.base.tokenizer.encode(_read_text(self.plan.text), add_special_tokens=False)
        found = list(windows(ids, WINDOW))
        if not found:
            raise DataError(f"{self.plan.text} has fewer than two tokens. Give a longer text.")
        return found

    def perplexity(self, pieces: Sequence[Sequence[int]]) -> TextPart | None:
        if not pieces:
            return None
        model = self.policy.model
        ours = text_losses(model, pieces, on_done=self.tick("text, adapter", len(pieces)))
        with model.disable_adapter():
            theirs = text_losses(model, pieces, on_done=self.tick("text, base", len(pieces)))
        tokens = sum(count for _, count in ours)
        change = ratio_interval([(a - b, count) for (a, count), (b, _) in zip(ours, theirs, strict=True)])
        return TextPart(
            tokens=tokens,
            base=math.exp(sum(loss for loss, _ in theirs) / tokens),
            adapter=math.exp(sum(loss for loss, _ in ours) / tokens),
            ratio=Interval(_exp(change.value), _exp(change.low), _exp(change.high), change.n),
        )


def pair_part(
    tokens: Sequence[TokenPair], chosen: Sequence[float], rejected: Sequence[float], *, beta: float
) -> PairPart:
    """Metrics of held-out pairs from their log-ratios; the pairs of one prompt are one unit.

    Args:
        chosen, rejected: h of each pair's answers, in nats.
    """
    by_prompt: dict[tuple[int, ...], list[tuple[float, float, float]]] = {}
    for pair, c, r in zip(tokens, chosen, rejected, strict=True):
        win = 1.0 if c > r else 0.5 if c == r else 0.0
        longer = float(len(pair.chosen) - len(pair.rejected))
        by_prompt.setdefault(tuple(pair.prompt), []).append((win, beta * (c - r), longer))
    units = [tuple(fmean(column) for column in zip(*rows, strict=True)) for rows in by_prompt.values()]
    wins = [unit[0] for unit in units]
    return PairPart(
        pairs=len(tokens),
        accuracy=rate(sum(wins), len(units)),
        controlled=length_controlled(wins, [unit[2] for unit in units]),
        margin=mean([unit[1] for unit in units]),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
    )


def describe(answers: Sequence[Answer]) -> AnswerPart | None:
    """Length, endings, repetition and refusals of one model's answers, without what it thought; None without any."""
    if not answers:
        return None
    return AnswerPart(
        tokens=mean([float(answer.said_tokens) for answer in answers]),
        finished=rate(sum(answer.finished for answer in answers), len(answers)),
        repetition=mean([repetition(answer.said) for answer in answers]).within(0.0, 1.0),
        refusals=rate(sum(refuses(answer.said) for answer in answers), len(answers)),
    )


def ratio_interval(parts: Sequence[tuple[float, int]]) -> Interval:
    """Sum over tokens: Σ sums / Σ tokens, with the interval of a ratio estimate over independent answers.

    The linearised variance of a ratio (Cochran 1977, section 6.4): that of the residuals sum - ratio·tokens.
    """
    total = sum(tokens for _, tokens in parts)
    value = sum(amount for amount, _ in parts) / total if total else 0.0
    if len(parts) < 2 or not total:
        return Interval(value, -math.inf, math.inf, len(parts))
    residuals = mean([amount - value * tokens for amount, tokens in parts])
    half = (residuals.high - residuals.value) * len(parts) / total
    return Interval(value, value - half, value + half, len(parts))


def _prompts_of(pairs: Sequence[PreferencePair]) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for pair in pairs:
        first.setdefault(repr(pair.prompt), Prompt(pair.prompt, pair.origin.source, pair.origin.row))
    return list(first.values())


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The text {path} cannot be read: {error}. Give a UTF-8 file.") from error


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
