"""Exact DPO forward passes without padding and with each pair's common prefix computed once.

layout.py      pairs → one flat stream of tokens
attention.py   who sees whom in that stream
logprobs.py    stream → per-token log-probabilities of both sides
model.py       which models can do this, and how one of them is run so
"""

from lora_dpo.engine.layout import Layout, lay_out
from lora_dpo.engine.pair_forward import PairForward, unsupported_reason

__all__ = ["Layout", "PairForward", "lay_out", "unsupported_reason"]
