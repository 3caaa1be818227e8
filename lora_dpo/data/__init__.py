"""Preference data: files and hub data sets to pairs, and pairs to token ids."""

from __future__ import annotations

from lora_dpo.data.chat_template import Message
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, ReadReport
from lora_dpo.data.read import read_pairs
from lora_dpo.data.tokenize import TokenPair, tokenize_pairs

__all__ = [
    "Dropped",
    "Message",
    "Origin",
    "PreferencePair",
    "ReadReport",
    "TokenPair",
    "read_pairs",
    "tokenize_pairs",
]
