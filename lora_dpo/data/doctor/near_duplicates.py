"""Near duplicates in one pass: MinHash of neighbouring words, compared by bands (Broder 1997; Leskovec et al., ch. 3).

Memory is about 500 bytes a pair, and time grows with the number of pairs, never with its square.
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from numpy.typing import NDArray

from lora_dpo.data.doctor.checks import Texts

HASHES, BANDS = 32, 8
"""Answers with a share s of their word pairs in common share a band with probability 1 - (1 - s⁴)⁸: 0.985 at 0.8."""
ALIKE = 0.7
"""Least share of word pairs, as the sketch estimates it, for answers to be near duplicates; of words for prompts."""
PER_BUCKET = 4
"""Earlier pairs that are looked at in a band: keeps a file of thousands of 'Yes' and 'No' quick."""

_WORD = re.compile(r"\w+")
_RANDOM = np.random.default_rng(0)
_A = _RANDOM.integers(1, 1 << 32, size=(HASHES, 1), dtype=np.uint32) | np.uint32(1)
_B = _RANDOM.integers(0, 1 << 32, size=(HASHES, 1), dtype=np.uint32)


class NearDuplicates:
    """Pairs seen so far; `add` says which earlier one a new pair is almost the same as."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._buckets: dict[int, tuple[int, ...]] = {}
        self._signatures = np.empty((1024, HASHES), dtype=np.uint32)
        self._prompts: list[frozenset[int]] = []

    def add(self, texts: Texts) -> int | None:
        """The number of an earlier pair (from 0, in the order of adding) with almost the same words, or None."""
        asked = _words(texts.prompt)
        answers = [*_words(texts.chosen), 0, *_words(texts.rejected)]
        index = len(self._prompts)
        first = self._known.setdefault(hash((tuple(asked), tuple(answers))), index)
        signature = signature_of(answers)
        if index == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[index] = signature
        prompt = frozenset(sorted(set(asked))[:HASHES])
        self._prompts.append(prompt)
        return first if first != index else self._alike(index, prompt)

    def _alike(self, index: int, prompt: frozenset[int]) -> int | None:
        signature = self._signatures[index]
        found = None
        for band, rows in enumerate(signature.reshape(BANDS, -1)):
            key = hash((band, rows.tobytes()))
            bucket = self._buckets.get(key, ())
            if found is None:
                found = next((other for other in bucket if self._is_alike(index, other, prompt)), None)
            if len(bucket) < PER_BUCKET:
                self._buckets[key] = (*bucket, index)
        return found

    def _is_alike(self, index: int, other: int, prompt: frozenset[int]) -> bool:
        shared = float(np.mean(self._signatures[index] == self._signatures[other]))
        if shared < ALIKE:
            return False
        # The smallest hashes of the union are a fair sample of both prompts' words.
        asked = self._prompts[other]
        sample = sorted(prompt | asked)[:HASHES]
        return not sample or sum(word in prompt and word in asked for word in sample) >= ALIKE * len(sample)


def signature_of(words: list[int]) -> NDArray[np.uint32]:
    """The smallest value that each hash function takes on the pairs of neighbouring words."""
    hashes = np.array(words if len(words) > 1 else [*words, 0, 0][:2], dtype=np.uint32)
    pairs = hashes[:-1] * np.uint32(0x9E3779B1) ^ hashes[1:]
    mixed = pairs * _A + _B
    smallest: NDArray[np.uint32] = (mixed ^ (mixed >> np.uint32(15))).min(axis=1)
    return smallest


def _words(text: str) -> list[int]:
    """Hashes of the words, without case and punctuation."""
    return [zlib.crc32(word.encode("utf-8")) for word in _WORD.findall(text.lower())]
