"""How much of a step fits into memory at once: measured on a small part of it, and learnt when it was too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_dpo.model.experts import active_share, expert_weights

CPU_TOKENS, CUDA_TOKENS = 1024, 65536
"""Most stream tokens at once: more only cost memory. On a CPU parts of at most 426 tokens are as fast as one of 1,979
(docs/decisions.md); on a GPU it is a guess."""

SHARE = 0.6
"""Share of the free memory that a part may keep for its backward pass; the rest is for its working space."""


PATIENCE = 16
"""Steps without a shortage of memory before more of it is asked for, the first time."""


def memory_advice(method: str) -> str:
    """What to change in a recipe whose training ran out of memory."""
    if method == "dpo":  # how many pairs run at once is decided already: fewer a step would need no less
        return (
            "Lower trainer.max_length, or set engine.offload=true (on a GPU) or engine.split_pairs=true; lora-dpo plan "
            "RECIPE names settings that fit."
        )
    return (
        "Lower trainer.per_device_train_batch_size (and raise trainer.gradient_accumulation_steps), lower "
        "trainer.max_length, or set trainer.gradient_checkpointing=true."
    )


def fit(
    *,
    token_bytes: float,
    checkpoint_bytes: float,
    layers: int,
    may_checkpoint: int,
    free: float,
    longest: int,
    cap: int,
) -> tuple[int, int]:
    """Tokens that fit at once and how many layers must be checkpointed, as few as possible.

    A checkpointed layer keeps its input and is run again in the backward pass, one layer at a time.

    Args:
        token_bytes: bytes that a token keeps for the backward pass, all layers together.
        checkpoint_bytes: bytes of one hidden state.
        may_checkpoint: layers that may be checkpointed: `layers`, or 0.
        free: bytes that may be kept.
        longest: tokens of the longest pair, which cannot be parted.
        cap: never more tokens than this, unless a pair is longer.
    """
    layer_bytes = token_bytes / layers
    tokens = 0
    for count in range(may_checkpoint + 1):
        again = 2 * layer_bytes if count else 0.0  # run again, it keeps its cheap results too
        # while one is run again, what the layers above it kept is free
        each = count * checkpoint_bytes + max((layers - count) * layer_bytes, again)
        tokens = int(free / each)
        if tokens >= longest:
            return max(longest, min(tokens, cap)), count
    return longest, may_checkpoint


def passing_bytes(*, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes that a token needs in a pass without gradients: in an MLP, three tensors of its width (the gate, up, and
    their product) and four hidden states (the residual, the norm's input in float32, and its output); in attention, in
    place of the three, five hidden states (queries, in float32 after their rotation, keys, values, and the result).

    Counted by the tensors that live at the peak of a pass (tests/engine/test_scoring_tokens.py). Not in it are the
    head, which works on tiles when the layers are done, and scores with a soft cap.
    """
    return itemsize * (max(3 * widest, 5 * hidden) + 4 * hidden)


def widest_of(model: Any) -> int:
    """Numbers that a token becomes in the widest product of a base model's layers, in all experts that it uses."""
    layers = model.base_model.layers
    plain = [part.out_features for part in layers.modules() if hasattr(part, "out_features")]
    used = active_share(model.config)
    stacked = [round(weight.shape[0] * used) * max(weight.shape[1:]) for weight in expert_weights(model).values()]
    return int(max([*plain, *stacked], default=0))


def tokens_without_gradients(*, token_bytes: float, free: float, longest: int, cap: int) -> int:
    """Most tokens of a pass without gradients: `cap`, halved until they fit into `free` bytes, or the longest pair.

    Halved, so that pairs are not packed in another way whenever a little more or less is free: in 16 bits another
    packing gives other digits.
    """
    tokens = cap
    while tokens > longest and tokens * token_bytes > free:
        tokens //= 2
    return max(longest, tokens) if tokens < cap else cap


@dataclass
class TokenBudget:
    """The stream tokens of a part and the number of checkpointed layers: measured once, lowered when memory runs out,
    and raised again step by step to what was measured: what took the memory, such as an answer beside the training,
    may have ended. Each time that memory runs out it waits twice as long before it tries."""

    layers: int
    may_checkpoint: bool
    checkpoint_bytes: int
    cap: int
    free: Callable[[], int]
    set_checkpointing: Callable[[int], None]
    tokens: int = 0
    checkpointed: int = 0
    token_bytes: float = 0.0
    measured: tuple[int, int] = (0, 0)
    """Tokens and checkpointed layers as memory allowed them when it was looked at."""
    calm: int = 0
    """Steps since the last change."""
    patience: int = PATIENCE

    def measure(self, small_pass: Callable[[], float], longest: int) -> None:
        """Decide, at the first step and when a longer pair comes than was planned for.

        Args:
            small_pass: runs a small forward pass and returns the bytes that a token keeps.
            longest: tokens of the longest pair of the step.
        """
        if not self.tokens:
            self.set_checkpointing(0)
            self.token_bytes = small_pass()
        elif longest <= self.tokens:
            self._grow()
            self.set_checkpointing(self.checkpointed)  # transformers switches all layers on when training starts
            return
        tokens, checkpointed = fit(
            token_bytes=self.token_bytes,
            checkpoint_bytes=self.checkpoint_bytes,
            layers=self.layers,
            may_checkpoint=self.layers if self.may_checkpoint else 0,
            free=self.free() * SHARE,
            longest=longest,
            cap=min(self.cap, self.tokens or self.cap),
        )
        self.tokens = tokens
        self.checkpoint_layers(max(checkpointed, self.checkpointed))
        self.measured, self.calm = (self.tokens, self.checkpointed), 0

    def shrink(self, longest: int) -> str | None:
        """Ask for less: half the tokens, then checkpointing; says what was changed, None if nothing is left."""
        self.calm, self.patience = 0, 2 * self.patience
        if self.tokens > longest:
            self.tokens = max(longest, self.tokens // 2)
            return f"parts of at most {self.tokens} tokens from now on"
        if self.may_checkpoint and self.checkpointed < self.layers:
            self.checkpoint_layers(min(self.layers, max(1, self.checkpointed * 2)))
            return f"activations of {self.checkpointed} of {self.layers} layers are computed again from now on"
        return None

    def _grow(self) -> None:
        """After enough steps that fitted, take back the last thing that `shrink` did."""
        tokens, checkpointed = self.measured
        self.calm += 1
        if self.calm < self.patience:
            return
        self.calm = 0
        if self.checkpointed > checkpointed:
            self.checkpointed = max(checkpointed, self.checkpointed // 2)
        elif self.tokens < tokens:
            self.tokens = min(tokens, 2 * self.tokens)

    def checkpoint_layers(self, count: int) -> None:
        """Checkpoint so many layers from now on."""
        self.checkpointed = count
        self.set_checkpointing(count)
