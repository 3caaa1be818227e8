"""Running a transformers model over a stream of pairs, and knowing when it cannot be done."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import torch

from lora_dpo.shared_prefix.attention import NAME, SPANS
from lora_dpo.shared_prefix.layout import Layout, lay_out
from lora_dpo.shared_prefix.logprobs import to_rows

ARCHITECTURES = ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Dense decoders whose layers see the stream through the attention function alone; each is tested."""


def unsupported_reason(model: Any) -> str | None:
    """Why a base model cannot run a stream of pairs, or None if it can."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        return f"the architecture {config.model_type} is not among {', '.join(ARCHITECTURES)}"
    if getattr(config, "output_router_logits", None):
        return "its experts have a balancing loss over the whole batch"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    return None


def logit_scale(model: Any) -> float:
    """What the logits are multiplied by: 1, but in Granite."""
    return 1.0 / float(getattr(model.config, "logits_scaling", 1.0))


def window_of(model: Any) -> int | None:
    """Tokens that a layer may look back, if any layer is limited; longer rows cannot share a prefix."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    limited = any("full" not in kind for kind in kinds) if kinds else True
    window: int | None = getattr(config, "sliding_window", None)
    return window if limited and getattr(config, "use_sliding_window", True) else None


def stream_hidden(model: Any, layout: Layout, **kwargs: Any) -> torch.Tensor:
    """Hidden states `[S, E]` of the stream from the model's backbone.

    The attention name stays set: activation checkpointing runs the layers again in the backward pass.
    `stream_attention` or `PairForward` set it back.
    """
    model.config._attn_implementation = NAME
    output = model.base_model(
        input_ids=layout.ids_S[None],
        position_ids=layout.position_S[None],
        use_cache=False,
        **{SPANS: layout.spans},
        **kwargs,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@contextlib.contextmanager
def stream_attention(model: Any) -> Iterator[None]:
    """Give a model its own attention back after the block; inside it, `stream_hidden` may set another."""
    plain = model.config._attn_implementation
    try:
        yield
    finally:
        model.config._attn_implementation = plain


def to_device(layout: Layout, device: torch.device) -> Layout:
    """The layout with its tensors on `device`."""
    return dataclasses.replace(
        layout,
        ids_S=layout.ids_S.to(device),
        position_S=layout.position_S.to(device),
        predictor_L=layout.predictor_L.to(device),
        label_L=layout.label_L.to(device),
        source_RT=layout.source_RT.to(device),
    )


class PairForward:
    """Gives one model instance TRL's `forward(..., labels, fused_lm_head=True)` over a shared-prefix stream.

    Bound to that instance only, and undone by `close`. Batches that cannot be expressed (a row longer
    than a sliding window, unknown inputs) go to the forward that was there before.
    """

    def __init__(self, model: Any, outputs: tuple[str, ...]) -> None:
        reason = unsupported_reason(model)
        if reason is not None:
            raise ValueError(reason)
        self.model, self.outputs = model, outputs
        self.before = model.forward
        self.plain = model.config._attn_implementation if model.config._attn_implementation != NAME else "sdpa"
        self.window = window_of(model)
        self.streams = 0
        """Forward passes that ran as a stream."""
        inner = self

        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        forward.__signature__ = _signature(self.before)  # type: ignore[attr-defined]
        self.bound = model.forward = types.MethodType(forward, model)

    def rest(self) -> None:
        """Give the model its own attention back, until the next stream."""
        self.model.config._attn_implementation = self.plain

    def close(self) -> None:
        """Give the model its own forward and attention back."""
        self.rest()
        if self.model.forward == self.bound:  # not another trainer's
            self.model.forward = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's call with padded rows `[2n, T]`; any other call is passed on."""
        if args or not self._is_pairs(**kwargs):
            self.rest()
            return self.before(*args, **kwargs)
        ids_RT, mask_RT, labels_RT = (kwargs[name] for name in ("input_ids", "attention_mask", "labels"))
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids_RT, mask_RT, strict=True)]
        wanted = [(row[keep.bool()] != -100).tolist() for row, keep in zip(labels_RT, mask_RT, strict=True)]
        layout = to_device(lay_out(rows, wanted, width=ids_RT.shape[1]), ids_RT.device)
        self.streams += 1
        hidden_SE = stream_hidden(self.model, layout)
        if not torch.is_grad_enabled():
            self.rest()  # no backward pass will run the layers again
        return self._outputs(hidden_SE, layout)

    def _is_pairs(self, **kwargs: Any) -> bool:
        given = {name for name, value in kwargs.items() if value is not None}  # peft fills in None for the rest
        needed = {"input_ids", "attention_mask", "labels", "fused_lm_head"}
        if not needed <= given or not kwargs["fused_lm_head"] or given - needed - {"use_cache", "return_dict"}:
            return False
        rows, longest = kwargs["input_ids"].shape
        return rows % 2 == 0 and (self.window is None or longest <= self.window)

    def _outputs(self, hidden_SE: torch.Tensor, layout: Layout) -> Any:
        # TRL's own chunked head, on the rows that predict a label: the same numbers, for fewer rows.
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, FusedCausalLMOutput, _ChunkedLogProbFunction

        head = self.model.get_output_embeddings()
        hidden_SE, layout = hidden_SE.to(head.weight.device), to_device(layout, head.weight.device)
        values = _ChunkedLogProbFunction.apply(
            hidden_SE[layout.predictor_L],
            head.weight,
            head.bias,
            layout.label_L,
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            logit_scale(self.model),
            self.outputs,
        )
        names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        tables = {
            name: to_rows(value, layout.source_RT)
            for name, value in zip(names, values, strict=True)
            if value is not None
        }
        labelled = layout.source_RT < len(layout.label_L)
        return FusedCausalLMOutput(
            loss=-tables["log_probs"].sum() / labelled.sum().clamp(min=1), label_mask=labelled, **tables
        )


def _signature(forward: Any) -> Any:
    import inspect

    # `generate` validates its keywords against the model's own signature
    return inspect.signature(getattr(forward, "__func__", forward))
