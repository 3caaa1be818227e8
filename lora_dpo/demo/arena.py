"""Blind matches: a prompt, two answers in random order, and a vote before the names are told.

Who answered is kept here and never handed out with the answers: a page or a script knows only the match's id.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.adapters.package import BASE
from lora_dpo.data import Message
from lora_dpo.demo.conversation import StreamedAnswer, write
from lora_dpo.demo.votes import ShownAnswer, VoteLog
from lora_dpo.errors import ConfigError
from lora_dpo.files import sha256_of
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import Host

MOST_OPEN = 2048
"""Matches that are remembered; an abandoned one is forgotten when so many newer ones were drawn."""


@dataclass
class Match:
    """Two answers to one prompt, before the vote."""

    id: str
    prompt: tuple[Message, ...]
    players: tuple[str, str]
    """Who is A and who is B."""
    sampling: tuple[Sampling, Sampling]
    source: str | None = None
    """Where an imported prompt came from."""
    answers: list[StreamedAnswer | None] = field(default_factory=lambda: [None, None])
    """Whole answers; None until they are written."""
    weights: list[str | None] = field(default_factory=lambda: [None, None])
    """SHA-256 of the adapters' weights when they began to answer: later there may be others under that name."""
    verdict: str | None = None

    @property
    def ready(self) -> bool:
        """True when both answers are there and no vote is."""
        return self.verdict is None and all(answer is not None for answer in self.answers)


class Arena:
    """Matches that are open, and the book that votes are written to."""

    def __init__(self, host: Host, book: VoteLog, *, adapters_dir: Path, draws: random.Random | None = None) -> None:
        self.host, self.book, self.adapters_dir = host, book, adapters_dir
        self.draws = draws or random.SystemRandom()
        self._open: OrderedDict[str, Match] = OrderedDict()
        self._lock = threading.Lock()

    def draw(
        self, prompt: Sequence[Message], players: Sequence[str], sampling: Sampling, *, source: str | None = None
    ) -> Match:
        """Choose two players and their order. One name alone gives two samples of it.

        Two models get the same seed, two samples of one different ones.

        Raises:
            ConfigError: no player, or two samples of one at temperature 0, which would be the same.
        """
        names = list(dict.fromkeys(players))
        if not names:
            raise ConfigError("Nobody answers: choose at least one model.")
        if not prompt or not prompt[-1]["content"].strip():
            raise ConfigError("There is nothing to answer: write a prompt first.")
        seed = self.draws.randrange(1 << 31)
        if len(names) == 1:
            if sampling.temperature <= 0:
                raise ConfigError(
                    f"Two answers of {names[0]} at temperature 0 are the same. Raise the temperature, or choose a "
                    "second model."
                )
            chosen, seeds = names * 2, [seed, (seed + 1) % (1 << 31)]
        else:
            chosen, seeds = self.draws.sample(names, 2), [seed, seed]
        one, other = (replace(sampling, seed=number) for number in seeds)
        match = Match(secrets.token_hex(8), tuple(prompt), (chosen[0], chosen[1]), (one, other), source)
        with self._lock:
            self._open[match.id] = match
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return match

    def answers(self, match: Match, *, client: str, stop: threading.Event | None = None) -> Iterator[tuple[str, str]]:
        """Yield the texts of A and B as they grow; A is written first. At the end the match is ready to vote on.

        A match that is stopped early stays without its answers: a cut answer would be judged for its cut.
        """
        texts = ["", ""]
        keywords = self.host.keywords_compared(match.players)
        for side in (0, 1):
            player, sampling = match.players[side], match.sampling[side]
            said = StreamedAnswer(player, "")
            match.weights[side] = self._weights_of(player)
            how: dict[str, Any] = {"client": client, "stop": stop, "chat_template_kwargs": keywords[side]}
            with closing(write(self.host, player, match.prompt, sampling, **how)) as states:
                for said in states:
                    texts[side] = said.text
                    yield texts[0], texts[1]
            if stop is not None and stop.is_set():
                return
            match.answers[side] = replace(said, text=said.text.strip())

    def vote(self, match_id: str, verdict: str) -> Match:
        """Write the vote down; it is on the disk when this returns.

        Raises:
            ConfigError: there is no such match, it was voted on already, or its answers are not there yet.
            DataError: the answers make no pair.
            OutputError: the disk refuses.
        """
        match = self.match(match_id)
        with self._lock:
            # One vote a match, also when a key is pressed twice.
            if match.verdict is not None:
                raise ConfigError("This match was voted on already. Ask for the next one.")
            a, b = match.answers
            if a is None or b is None:
                raise ConfigError("Both answers must be there before the vote.")
            match.verdict = verdict
        counted = False
        try:
            sides = (
                _candidate(a, match.sampling[0], match.weights[0]),
                _candidate(b, match.sampling[1], match.weights[1]),
            )
            self.book.add(match.prompt, *sides, verdict, vote_id=match.id, facts=self._facts(match))
            counted = True
        finally:
            if not counted:
                match.verdict = None  # whatever was in the way: it may be given again
        return match

    def match(self, match_id: str) -> Match:
        """The match of that id. Raises `ConfigError` if there is none, or it was forgotten."""
        with self._lock:
            match = self._open.get(match_id)
        if match is None:
            raise ConfigError("There is no such match, or it is too old. Ask for a new one.")
        return match

    def unvoted(self, match_id: str) -> Match | None:
        """The match of that id if its vote, or one of its answers, is not there yet."""
        with self._lock:
            match = self._open.get(match_id)
        return match if match is not None and match.verdict is None else None

    def _weights_of(self, who: str) -> str | None:
        weights = self.adapters_dir / who / WEIGHTS
        return sha256_of(weights) if who != BASE and weights.is_file() else None

    def _facts(self, match: Match) -> dict[str, Any]:
        base = self.host.base
        facts = {
            "model": base.name,
            "model_revision": base.revision,
            "model_fingerprint": base.fingerprint,
            "quantize": base.quantize,
        }
        return {**facts, **({"prompt_source": match.source} if match.source else {})}


def _candidate(said: StreamedAnswer, sampling: Sampling, weights: str | None) -> ShownAnswer:
    facts: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "max_new_tokens": sampling.max_new_tokens,
        "tokens": said.tokens,
    }
    facts |= {"cut": True} if said.cut else {}
    return ShownAnswer(said.text, said.who, facts | ({"adapter_sha256": weights} if weights else {}))
