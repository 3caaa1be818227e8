"""Tokens a second of answers, one and many at once, with and without an adapter."""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.gpu_check.common import SIZES, Check, random_base, wait


def run(check: Check) -> None:
    """The base, then an adapter of rank 16 as training holds it: in float32."""
    from lora_dpo.config.recipe import LoraSection
    from lora_dpo.model.decoding import Sampling
    from lora_dpo.model.lora import attach_lora, share_weights

    base = random_base(SIZES[check.options.size], check.device)
    new = 128 if check.on_card else 16
    lot = random.Random(0)
    for label in ("base", "adapter"):
        model: Any = share_weights(base).model
        if label == "adapter":
            model = attach_lora(model, LoraSection(rank=16, alpha=32, targets="all-linear"), seed=0)
        model.eval()
        for rows in (1, 32):
            prompts = [[lot.randrange(50, 400) for _ in range(200)] for _ in range(rows)]
            greedy = Sampling(max_new_tokens=new)
            for kind, sampling in (
                ("greedy", greedy),
                ("drawn", Sampling(max_new_tokens=new, temperature=0.7, top_p=0.9)),
            ):
                tokens, spent = timed(model, prompts, sampling)
                check.notes.say(
                    f"{check.options.size} {label}, {rows} at once, {kind}: {tokens / spent:.1f} tokens/s, "
                    f"{spent / new * 1e3:.1f} ms a step"
                )
                check.notes.save(f"decode {check.options.size} {label} {rows} {kind}", tokens / spent)


def timed(model: Any, prompts: list[list[int]], sampling: Any) -> tuple[int, float]:
    """Tokens of the answers, and the seconds that they took; a few were written before, to warm up."""
    import dataclasses

    from lora_dpo.model.decoding import decode

    for _ in decode(model, prompts, frozenset(), dataclasses.replace(sampling, max_new_tokens=4)):
        pass
    wait()
    start = time.perf_counter()
    tokens = sum(1 for _ in decode(model, prompts, frozenset(), sampling))
    wait()
    return tokens, time.perf_counter() - start
