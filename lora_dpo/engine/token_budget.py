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
            "Lower trainer.max_length, or set engine.offload=true or model.stream=on (on a GPU) or "
            "engine.split_pairs=true; lora-dpo plan RECIPE names settings that fit."
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


def stream_token_bytes(*, hidden: int, itemsize: int) -> int:
    """Bytes of a stream's token beside what layers keep: what a layer is given, its results in segments and as a whole,
    the gradients of all three, and the head's gradient twice in float32."""
    return hidden * (6 * itemsize + 2 * 4)


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


def fit_streamed(*, layer_bytes: float, stream_bytes: float, free: float, longest: int, cap: int) -> tuple[int, int]:
    """Tokens that fit through a layer at once, and tokens of a whole stream, where layers visit the device.

    Every layer is checkpointed. A stream's tokens have hidden states only; those that a layer is run again on have what
    it keeps, and its temporaries. Half of what is free goes to these: more tokens through a layer at once are soon no
    faster, and each stream has every layer carried to the device again.

    Args:
        layer_bytes: bytes that a token keeps in one layer.
        stream_bytes: bytes that a token has beside it: hidden states, their gradients, and checkpoints on the device.
    """
    segment = max(longest, min(cap, int(free / 2 / (2 * layer_bytes))))
    return segment, max(segment, int((free - 2 * layer_bytes * segment) / stream_bytes))


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
    segment: int | None = None
    """Most tokens that a layer runs on at once; None: all of a part."""

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


@dataclass
class StreamedBudget(TokenBudget):
    """The same where layers visit the device: all are checkpointed, a stream should hold all pairs of a step, and runs
    through each layer in segments."""

    stream_bytes: int = 0
    """Bytes that a token has while no layer runs on it."""
    in_segments: bool = True
    """Whether a layer may run on some pairs after the other; if not, a stream is one segment."""

    def measure(self, small_pass: Callable[[], float], longest: int) -> None:
        """Decide, at the first step and when a longer pair comes than was planned for."""
        if not self.tokens:
            self.set_checkpointing(self.layers - 1)
            self.token_bytes = max(1.0, small_pass() - (self.layers - 1) * self.checkpoint_bytes)  # of one layer
        if longest > (self.segment or 0):
            free = self.free() * SHARE
            cap = min(self.cap, self.segment or self.cap)
            self.segment, self.tokens = fit_streamed(
                layer_bytes=self.token_bytes, stream_bytes=self.stream_bytes, free=free, longest=longest, cap=cap
            )
            if not self.in_segments:
                each = 2 * self.token_bytes + self.stream_bytes
                self.segment = self.tokens = max(longest, min(cap, int(free / each)))
            self.measured, self.calm = (self.tokens, self.segment), 0
        else:
            self._grow()
        self.checkpoint_layers(self.layers)

    def shrink(self, longest: int) -> str | None:
        """Ask for less: half the tokens through a layer at once, then half of those in a stream."""
        self.calm, self.patience = 0, 2 * self.patience
        if self.segment is not None and self.segment > longest:
            self.segment = max(longest, self.segment // 2)
            if not self.in_segments:
                self.tokens = self.segment
            return f"at most {self.segment} tokens run through a layer at once from now on"
        if self.tokens > longest:
            self.tokens = max(longest, self.tokens // 2)
            return f"parts of at most {self.tokens} tokens from now on"
        return None

    def _grow(self) -> None:
        tokens, segment = self.measured
        self.calm += 1
        if self.calm < self.patience:
            return
        self.calm = 0
        if self.tokens < tokens:
            self.tokens = min(tokens, 2 * self.tokens)
        elif self.segment is not None and self.segment < segment:
            self.segment = min(segment, 2 * self.segment)
