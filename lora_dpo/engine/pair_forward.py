"""Running a transformers model over a stream of pairs, and knowing when it cannot be done."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from lora_dpo.engine.attention import NAME, PLAN, StreamPlan
from lora_dpo.engine.forked_states import fork, join
from lora_dpo.engine.fused_layers import FusedLayers
from lora_dpo.engine.layout import Layout, lay_out
from lora_dpo.engine.logprobs import HeadValues, chunked_head_values, head_values, to_rows
from lora_dpo.engine.pair_batch import Part, rows_of
from lora_dpo.engine.rematerialise import Rematerialiser
from lora_dpo.engine.segments import in_segments
from lora_dpo.engine.trunk_cache import TrunkCache, decoder_layers, from_trunk, lowest_adapted_layer, trunk_hidden
from lora_dpo.model.visiting import visiting_of

logger = logging.getLogger(__name__)

LOGGED = ("entropy", "mean_logits", "is_top1")
"""Per-token values that TRL only logs."""


def structural_reason(model: Any) -> str | None:
    """What of a base model's structure no stream of pairs can run, or None. What is left is tried (`proof.py`)."""
    config = model.config
    if not isinstance(getattr(model.base_model, "layers", None), torch.nn.ModuleList):
        return f"{type(model).__name__} keeps its decoder layers elsewhere than in one list called layers"
    if hasattr(head := model.get_output_embeddings(), "modules_to_save"):
        return "its output head is trained (modules_to_save)"
    if not isinstance(head, torch.nn.Linear):
        return f"its output head is no linear layer, but {type(head).__name__}"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    if getattr(config, "output_router_logits", False):
        return "its loss has a term of the router's, which TRL takes from whole rows"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its output head is trained"
    return None


MULTIPLIED, DIVIDED = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
"""Settings by which some models multiply or divide their logits: Cohere and Falcon H1, Granite."""


def logit_scale(model: Any) -> float:
    """What the logits are multiplied by."""
    scale = 1.0
    for name in MULTIPLIED:
        scale *= float(getattr(model.config, name, None) or 1.0)
    for name in DIVIDED:
        scale /= float(getattr(model.config, name, None) or 1.0)
    return scale


def logit_softcap(model: Any) -> float | None:
    """Bound c of the logits, c·tanh(logit / c), in Gemma 2; else None."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def stream_hidden(model: Any, layout: Layout, **kwargs: Any) -> torch.Tensor:
    """Hidden states `[S, E]` of the stream from the model's backbone.

    Attention and recurrent layers stay the stream's: activation checkpointing runs the layers again in the backward
    pass. `stream_attention` or `PairForward` set them back.
    """
    model.config._attn_implementation = NAME
    fork(decoder_layers(model), layout.spans)
    output = model.base_model(
        input_ids=layout.ids_S[None],
        position_ids=layout.position_S[None],
        use_cache=False,
        **{PLAN: StreamPlan(layout.spans)},
        **kwargs,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def label_values(model: Any, hidden_SE: torch.Tensor, layout: Layout, extras: tuple[str, ...] = ()) -> HeadValues:
    """The output head on those tokens of the stream that predict a label, and on no other."""
    head = model.get_output_embeddings()
    predicting_LE, label_L = hidden_SE[layout.predictor_L], layout.label_L
    given: Any = dict(scale=logit_scale(model), softcap=logit_softcap(model), extras=extras)
    visiting = visiting_of(model)
    if visiting is not None:
        return chunked_head_values(predicting_LE, visiting.head_rows, head.bias, label_L, **given)
    return head_values(predicting_LE, head.weight, head.bias, label_L, **given)


@contextlib.contextmanager
def stream_attention(model: Any) -> Iterator[None]:
    """Give a model its own layers back after the block; inside it, `stream_hidden` may set others."""
    plain = model.config._attn_implementation
    try:
        yield
    finally:
        model.config._attn_implementation = plain
        join(decoder_layers(model))


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


NEEDED = frozenset({"input_ids", "attention_mask", "labels", "fused_lm_head"})
UNUSED = frozenset({"use_cache", "return_dict"})


def _given(kwargs: dict[str, Any]) -> set[str]:
    return {name for name, value in kwargs.items() if value is not None}  # peft fills in None for the rest


@dataclass
class TokenTables(ModelOutput):  # type: ignore[misc]
    """What TRL reads of a pass (its `FusedCausalLMOutput`, field by field): tables `[R, T-1]`, None if not asked for.

    Zero where the label is -100, which `label_mask` tells.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class PairForward:
    """Gives one model instance TRL's `forward(..., labels, fused_lm_head=True)` over a shared-prefix stream.

    Bound to that instance only, and undone by `close`. Any other call goes to the forward that was there before.

    Args:
        outputs: fields of TRL's output beside `log_probs` that are always computed.
        rematerialise: make cheap intermediate results again in the backward pass (`rematerialise.py`).
        trunk: keeps the outputs of the layers below the lowest adapted one (`trunk_cache.py`); None computes them anew.
    """

    def __init__(
        self,
        model: Any,
        outputs: tuple[str, ...] = (),
        *,
        rematerialise: bool = True,
        trunk: TrunkCache | None = None,
    ) -> None:
        reason = structural_reason(model)
        if reason is not None:
            raise ValueError(reason)
        self.model, self.outputs = model, outputs
        self.before = model.forward
        self.plain = model.config._attn_implementation if model.config._attn_implementation != NAME else "sdpa"
        self.trunk = trunk
        self.depth = lowest_adapted_layer(model) if trunk is not None else 0
        self.logged = True
        """Whether the next passes compute what TRL only logs: entropy, mean logits, top-1."""
        self.streams = 0
        """Forward passes that ran as a stream."""
        self.tokens = 0
        """Stream tokens that ran through the top layers."""
        self.off = False
        """Whether the next passes are all passed on (`passed_on`)."""
        self.told = False
        """Whether it was said that a training call could not run as a stream."""
        self.part: Part | None = None
        """The part of a batch that the next passes are of (`on`)."""
        self.segment: int | None = None
        """Most tokens that a layer runs on at once; None: all of the stream."""
        self.rematerialiser = Rematerialiser(model) if rematerialise else None
        self.fused = FusedLayers(model)
        inner = self

        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        forward.__signature__ = _signature(self.before)  # type: ignore[attr-defined]
        self.bound = model.forward = types.MethodType(forward, model)

    def rest(self) -> None:
        """Give the model its own layers back, until the next stream."""
        self.model.config._attn_implementation = self.plain
        join(decoder_layers(self.model))
        self.fused.remove()
        if self.rematerialiser is not None:
            self.rematerialiser.release()

    def close(self) -> None:
        """Give the model its own forward and attention back."""
        self.rest()
        if self.model.forward == self.bound:  # not another trainer's
            self.model.forward = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's call with padded rows `[2n, T]`; any other call is passed on."""
        if args or self.off or not self._is_pairs(**kwargs):
            if kwargs.get("fused_lm_head") and not self.off:
                self._tell_passed_on(kwargs)
            self.rest()
            return self.before(*args, **kwargs)
        ids_RT, mask_RT, labels_RT = (kwargs[name] for name in ("input_ids", "attention_mask", "labels"))
        part = self.part
        rows, scored = (part.tokens, part.scored) if part is not None else rows_of(mask_RT, ids_RT, labels_RT != -100)
        if max(map(len, rows)) < 2:  # no token predicts another: a stream of none
            self.rest()
            return self.before(**kwargs)
        wanted = [[bool(one) for one in row] for row in scored]
        layout = to_device(lay_out(rows, wanted, width=ids_RT.shape[1]), ids_RT.device)
        self.streams += 1
        self.tokens += len(layout.ids_S)
        with contextlib.ExitStack() as afterwards:
            afterwards.callback(self.rest)
            hidden_SE = self.hidden(layout, rows)
            if torch.is_grad_enabled() and self._runs_again():
                afterwards.pop_all()  # whoever runs the backward pass calls `rest` after it
        return self.tables(hidden_SE, layout)

    @contextlib.contextmanager
    def log(self, logged: bool) -> Iterator[None]:
        """Inside the block, passes compute what TRL only logs, or not."""
        before, self.logged = self.logged, logged
        try:
            yield
        finally:
            self.logged = before

    @contextlib.contextmanager
    def on(self, part: Part) -> Iterator[None]:
        """Inside the block passes are of this part: its rows are known, and not read back from the padded ones."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    @contextlib.contextmanager
    def in_segments(self, most: int | None) -> Iterator[None]:
        """Inside the block a layer runs on at most so many tokens at once; a longer pair is not parted."""
        before, self.segment = self.segment, most
        try:
            yield
        finally:
            self.segment = before

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """Inside the block every pass goes to the forward that was there before."""
        self.off = True
        try:
            yield
        finally:
            self.off = False

    @contextlib.contextmanager
    def count_kept(self) -> Iterator[dict[int, int]]:
        """Inside the block, the bytes of each storage that forward passes keep for their backward passes."""
        if self.rematerialiser is None:
            raise RuntimeError("what is kept is counted by the rematerialiser, which is off")
        kept: dict[int, int] = {}
        self.rematerialiser.kept = kept
        try:
            yield kept
        finally:
            self.rematerialiser.kept = None

    def _runs_again(self) -> bool:
        """Whether the backward pass will run layers again (activation checkpointing)."""
        return any(
            getattr(layer, "gradient_checkpointing", False) for layer in decoder_layers(self.model)[self.depth :]
        )

    def _is_pairs(self, **kwargs: Any) -> bool:
        given = _given(kwargs)
        if not given >= NEEDED or not kwargs["fused_lm_head"] or given - NEEDED - UNUSED:
            return False
        return len(kwargs["input_ids"]) % 2 == 0

    def _tell_passed_on(self, kwargs: dict[str, Any]) -> None:
        if self.told:
            return
        self.told = True
        given = _given(kwargs)
        odd = [f"with {name}" for name in sorted(given - NEEDED - UNUSED)]
        odd += [f"without {name}" for name in sorted(NEEDED - given)]
        because = "the model is called " + ", ".join(odd) if odd else "its rows are not pairs"
        logger.warning("This pass is TRL's own (slower, the same result): %s.", because)

    def hidden(self, layout: Layout, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The last hidden states `[S, E]` of a stream, from the trunk cache up where there is one."""
        self.fused.install()
        keep = self.rematerialiser is not None and torch.is_grad_enabled()
        with self.rematerialiser.active() if keep else contextlib.nullcontext():  # type: ignore[union-attr]
            if self.trunk is None or self.depth == 0:
                return self._run(layout)
            below_SE = trunk_hidden(self.model, self._run, layout, rows, self.depth, self.trunk)
            with from_trunk(self.model, self.depth, below_SE):
                return self._run(layout)

    def _run(self, layout: Layout) -> torch.Tensor:
        if self.segment is None:
            return stream_hidden(self.model, layout)
        with in_segments(self.model, layout.spans, self.segment):
            return stream_hidden(self.model, layout)

    def tables(self, hidden_SE: torch.Tensor, layout: Layout) -> Any:
        """TRL's output of a stream's last hidden states `[S, E]`: per-token tables `[R, T-1]`."""
        device = self.model.get_output_embeddings().weight.device  # with a model over several devices, another one
        layout = to_device(layout, device)
        extras = (*self.outputs, *(LOGGED if self.logged else ()))
        values = label_values(self.model, hidden_SE.to(device), layout, extras)
        tables = {
            name: to_rows(value, layout.source_RT) for name, value in values._asdict().items() if value is not None
        }
        zero_RT = torch.zeros_like(tables["log_probs"].detach())
        for name in LOGGED:  # what is not logged now is not computed: TRL reads the fields all the same
            tables.setdefault(name, zero_RT.bool() if name == "is_top1" else zero_RT)
        labelled = layout.source_RT < len(layout.label_L)
        return TokenTables(loss=-tables["log_probs"].sum() / labelled.sum().clamp(min=1), label_mask=labelled, **tables)


def _signature(forward: Any) -> Any:
    import inspect

    # `generate` validates its keywords against the model's own signature
    return inspect.signature(getattr(forward, "__func__", forward))


DIFFERENCE, ROUNDED_DIFFERENCE = 3e-4, 0.3
"""Largest mean |difference| per answer token, in nats, of the engine's log-probabilities from TRL's own on the first
batch, in float32 and where products are rounded to 16 bits. Seen on SmolLM2-135M: 8e-6 and 0.05; an attention, position
or mask that is another one differs by nats."""


def largest_difference(model: Any) -> float:
    """How far the engine may be from TRL's own pass on a base model, in nats per answer token."""
    computes = {model.dtype, *(getattr(part, "compute_dtype", None) for part in model.modules())}
    exact = not computes & {torch.bfloat16, torch.float16} and torch.get_float32_matmul_precision() == "highest"
    return DIFFERENCE if exact else ROUNDED_DIFFERENCE
