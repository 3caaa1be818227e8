"""What a step costs in bytes and FLOPs, from the architecture alone: no weights, no forward pass.

Shape suffixes in the formulas: S stream tokens of a pair, L its labelled tokens, E hidden width, I width of the
MLP, V vocabulary, r rank, w bytes of a number in the compute dtype; query width H·D, key width K·D.

A layer keeps for its backward pass, per token (`pair_forward`, with its rematerialised norms and MLPs):

    each norm        its input: E·w, and 1/rms: 4; the input once more in float32 where w < 4 and it is not fused
    attention        query H·D·w, key and value 2·K·D·w, output H·D·w twice, log-sum-exp 4·H
    MLP              gate and up: 2·I·w (what follows from them is made again); or both ends of an activation
    mixture          of each expert that is used gate, up and their product: 3·I·w, and its output: E·w
    recurrent layer  what a run of it on tensors without values keeps (`layer_costs.py`)
    each adapter     A's output r·w; its input too where it is not a norm's output or the MLP's product; of an expert
                     what it reads: E·w and I·w
    DoRA             of each adapter both halves, which it scales: W·x and B·A·x, 2·O·w for O outputs; on packed layers
                     hidden states, W·x, gate and up are float32 then, and each adapter keeps its input cast to w bytes

and per pair the keys and values of the prefix once more, for the rejected branch: 2·K·D·w·prefix, and, where there is
no kernel without one, that branch's mask: w·rejected·(prefix + rejected). A pass over any number of pairs keeps each
stacked weight that has an adapter once more, with B·A in it; with dropout DoRA keeps what it unpacks or casts of W.
For DoRA a pass makes the norms of the rows of W + s·B·A: B·A as B(A(1)) of the identity matrix, and four matrices of
W's size beside each other, which are free again before the next module.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.engine.layer_costs import (
    PARTS,
    AttentionSizes,
    attention_sizes,
    dora_weights,
    layer_token_bytes,
    merged_sizes,
    norm_bytes,
    stream_itemsize,
)
from lora_dpo.model.experts import active_share, expert_weights
from lora_dpo.model.held_size import HeldSize, Streamed, held_size

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_dpo.model.stored_form import StoredForm


@dataclass(frozen=True)
class PairShape:
    """Lengths of a pair as the model reads it: two whole sequences, and where they part."""

    prompt: int
    first: int
    """Tokens of prompt and chosen answer."""
    second: int
    """Tokens of prompt and rejected answer."""
    common: int
    """Tokens that both begin with."""

    @property
    def shared(self) -> int:
        """Tokens that are computed once: the common ones, but each sequence keeps at least one of its own."""
        return min(self.common, self.first - 1, self.second - 1)

    @property
    def spans(self) -> tuple[int, int, int]:
        """Stream tokens of prefix, chosen branch and rejected branch (`layout`)."""
        prefix = max(0, self.shared - 1)
        return prefix, self.first - 1 - prefix, self.second - 1 - prefix

    @property
    def stream(self) -> int:
        """S: tokens that are computed with the prefix shared and nothing padded."""
        return sum(self.spans)

    @property
    def labels(self) -> int:
        """L: answer tokens; those that both answers begin with count once."""
        answers = max(0, self.first - self.prompt) + max(0, self.second - self.prompt)  # a branch runs beside one token
        return answers - max(0, self.common - self.prompt)

    def cut(self, length: int) -> PairShape | None:
        """The pair under a shorter `max_length`; None where its prompt fills that, or nothing tells it apart."""
        first, second = min(self.first, length), min(self.second, length)
        if self.prompt >= length or (self.common >= length and first == second):
            return None
        return PairShape(self.prompt, first, second, min(self.common, length))

    def branches(self) -> tuple[PairShape, PairShape]:
        """Its two sequences run one after the other, each beside a sequence of one token."""
        return PairShape(self.prompt, self.first, 1, 0), PairShape(self.prompt, self.second, 1, 0)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer."""

    token_bytes: int
    """Bytes that a token keeps in it, without what depends on the pair."""
    weights: int
    """Elements of its frozen matrices."""
    adapter: int
    """Its trainable parameters."""
    attention: AttentionSizes
    """Of its attention, if it has one."""
    window: int | None
    """How many tokens back it sees; None: all."""
    merged: tuple[int, ...] = ()
    """Elements of each stacked weight with an adapter on it."""
    held: int = 0
    """Elements of the weights that DoRA with dropout keeps for a backward pass."""


@dataclass(frozen=True)
class CostModel:
    """Everything of a base model with an adapter that its costs depend on."""

    layers: tuple[LayerShape, ...]
    depth: int
    """Layers below the lowest adapted one: they keep nothing and have no backward pass."""
    hidden: int
    vocabulary: int
    widest: int
    """I: outputs of the widest matrix of a layer."""
    softcap: bool
    """Attention scores are bounded, or have a sink beside them, which fused kernels cannot do: they are kept."""
    itemsize: int
    outside_bytes: int
    """Bytes that a token keeps outside the layers: position tables, the last norm."""
    held: HeldSize
    weight_bytes: int
    """Of the frozen weights, on the device; of layers that visit it the two that are there at once."""
    trainable: int
    whole: int = 0
    """Of these, the parameters of modules that are trained whole."""
    stream_itemsize: int = 0
    """Bytes of a number of the hidden states between layers; 0: as in the compute dtype."""
    row_norms_bytes: int = 0
    """The most that DoRA works in at once, for the norms of one matrix's rows."""
    streamed: Streamed = "off"
    """Which weights visit the device."""

    @property
    def _wide(self) -> int:
        return self.stream_itemsize or self.itemsize

    def layer_bytes(self, layer: LayerShape, pair: PairShape) -> float:
        """Bytes that one pair keeps in one layer."""
        prefix, chosen, rejected = pair.spans
        kept = float(pair.stream * layer.token_bytes)
        if rejected:
            kept += 2 * layer.attention.key * self.itemsize * prefix
        for queries, keys in ((prefix + chosen, prefix + chosen), (rejected, prefix + rejected)):
            if self.softcap:  # tanh, softmax in float32 and in the compute dtype
                each = self.itemsize + 4 + (self.itemsize if self.itemsize < 4 else 0)
                kept += queries * keys * layer.attention.heads * each
        return kept

    def mask_bytes(self, pair: PairShape) -> float:
        """Masks of one pair's two attention calls, which layers with the same window share."""
        prefix, chosen, rejected = pair.spans
        sizes = set()
        for queries, keys in ((prefix + chosen, prefix + chosen), (rejected, prefix + rejected)):
            for layer in self.layers[self.depth :]:
                limit = layer.window if layer.window is not None and keys > layer.window else None
                if keys > queries or limit is not None:
                    sizes.add((queries, keys, limit))
        return float(sum(queries * keys * self.itemsize for queries, keys, _ in sizes))

    def kept_bytes(
        self, pair: PairShape, *, checkpointed: int = 0, offload: bool = False, at_head: bool = False
    ) -> float:
        """Bytes that one pair keeps for its backward pass.

        Args:
            checkpointed: so many of the lowest adapted layers keep their input alone; one of them at a time is run
                again, when what the layers above kept is free.
            offload: whether these inputs wait in main memory.
            at_head: at the end of the forward pass, when none is run again.
        """
        active = self.layers[self.depth :]
        again = min(len(active), checkpointed)
        inputs = min(again, 1) if offload else again
        kept = float(self.outside_bytes * pair.stream + inputs * self.hidden * self._wide * pair.stream)
        kept += 0.0 if self.softcap else self.mask_bytes(pair)
        each = [self.layer_bytes(layer, pair) for layer in active]
        return kept + max(sum(each[again:]), 0.0 if at_head else max(each[:again], default=0.0))

    def pass_bytes(self, *, checkpointed: int = 0) -> float:
        """Bytes that a pass keeps however many tokens it has: stacked weights with their adapters in them, DoRA's."""
        each = [(sum(layer.merged) + layer.held) * self.itemsize for layer in self.layers[self.depth :]]
        again = min(len(each), checkpointed)
        return float(max(sum(each[again:]), max(each[:again], default=0)))

    def rounded_bytes(self) -> float:
        """Of the adapter's copy in the compute dtype, which is there as long as a pass and its backward pass."""
        return float((self.trainable - self.whole) * self.itemsize) if self.itemsize < 4 else 0.0

    def carried_bytes(self, *, times: int) -> float:
        """Bytes that come to the device in passes over one stream, each of which has every visitor so often."""
        head = self.vocabulary * self.hidden * self.itemsize if self.streamed != "off" else 0
        return float(times * (head + (self.held.layers if self.streamed == "on" else 0)))

    def gradient_bytes(self) -> float:
        """Of the gradient of the largest such weight, from which those of A and B are made."""
        return float(max((size for layer in self.layers for size in layer.merged), default=0) * self.itemsize)

    def backward_bytes(self, tokens: int) -> float:
        """The space that the backward pass of a layer works in: about five tensors of the widest matrix's outputs."""
        return 5.0 * tokens * self.widest * self._wide + self.gradient_bytes()

    def norms_bytes(self, tokens: int, *, again: bool) -> float:
        """The space that DoRA's norms are made in, beside the tensor of the widest matrix that waits meanwhile.

        Args:
            again: in a layer that is run again, where nothing is left to be made again: about two more such tensors.
        """
        waiting = tokens * self.widest * self._wide * (3 if again else 1)
        return float(self.row_norms_bytes + waiting) if self.row_norms_bytes else 0.0

    def policy_flops(self, pair: PairShape, *, checkpointed: int = 0, below: bool = True) -> float:
        """FLOPs of a forward and backward pass: 4·N·S + 4·E·V·L, adapters and attention.

        Weight gradients of frozen matrices are never computed; the head's gradient is made in its forward pass.

        Args:
            below: whether the layers below the lowest adapted one are run.
        """
        flops = 4.0 * self.hidden * self.vocabulary * pair.labels
        for number, layer in enumerate(self.layers):
            forward = 2 * layer.weights * pair.stream + self.attention_flops(layer, pair)
            if number < self.depth:
                flops += forward * below
                continue
            flops += 2 * forward + 6 * layer.adapter * pair.stream + 0.5 * self.attention_flops(layer, pair)
            flops += forward * (number - self.depth < checkpointed)
        return flops

    def forward_flops(self, pair: PairShape, *, below: bool = True) -> float:
        """FLOPs of a pass of the reference, or of any other without gradients: 2·N·S + 2·E·V·L, and attention."""
        flops = 2.0 * self.hidden * self.vocabulary * pair.labels
        for layer in self.layers[0 if below else self.depth :]:
            flops += 2 * layer.weights * pair.stream + self.attention_flops(layer, pair)
        return flops

    def attention_flops(self, layer: LayerShape, pair: PairShape) -> float:
        """Of one layer's attention over a pair's stream, forward."""
        prefix, chosen, rejected = pair.spans
        before = prefix + chosen
        seen = before * (before + 1) / 2 + rejected * prefix + rejected * (rejected + 1) / 2
        if layer.window is not None:
            seen = min(seen, float(pair.stream * layer.window))
        return 4 * layer.attention.query * seen


def pair_shape(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> PairShape:
    """The lengths of a pair of token ids."""
    from lora_dpo.data.tokenize import common_prefix_length

    common = len(prompt) + common_prefix_length(chosen, rejected)
    return PairShape(len(prompt), len(prompt) + len(chosen), len(prompt) + len(rejected), common)


def footprint(
    model: PeftModel, *, itemsize: int, packed: bool, form: StoredForm | None = None, streamed: Streamed = "off"
) -> CostModel:
    """Read the costs off a model's structure; its tensors may be on the meta device.

    Args:
        model: a base with an adapter on it.
        itemsize: bytes of a number in the compute dtype.
        packed: whether linear layers are held in 4 bits, else in the compute dtype.
        form: how the base is stored quantised, if it is: packed layers have its bits.
        streamed: which weights visit the device.
    """
    from lora_dpo.engine.trunk_cache import decoder_layers, lowest_adapted_layer
    from lora_dpo.model.lora import base_of

    base: Any = base_of(model)
    config = base.config
    layers = decoder_layers(base)
    held = held_size(base, itemsize=itemsize, packed=packed, form=form)
    sizes = [attention_sizes(layer, config) for layer in layers]
    width = max(one.query // one.heads if one.heads else 0 for one in sizes)
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    window = getattr(config, "sliding_window", None)
    whole = [kind is not None and kind != "sliding_attention" for kind in kinds]
    # Under autocast peft casts what an unpacked layer's adapter reads to float32 and back: a copy for each.
    copies = itemsize < 4 and not packed
    wide = stream_itemsize(layers, itemsize, packed=packed)
    unpacks = itemsize < 4 or packed  # else DoRA reads the weight itself
    stacked, share = {id(weight) for weight in expert_weights(base).values()}, active_share(config)
    tables = 2 if len({kind for kind in kinds if kind}) > 1 and hasattr(config, "rope_local_base_freq") else 1
    return CostModel(
        layers=tuple(
            LayerShape(
                token_bytes=layer_token_bytes(layer, config, itemsize, copies=copies, wide=wide),
                weights=_active_weights(layer, stacked, share),
                adapter=sum(p.numel() for p in layer.parameters() if p.requires_grad),
                attention=sizes[number],
                window=None if whole[number] else window,
                merged=tuple(merged_sizes(layer)),
                held=sum(into * out for into, out, drops in dora_weights(layer) if drops and unpacks),
            )
            for number, layer in enumerate(layers)
        ),
        depth=lowest_adapted_layer(base),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        widest=_widest(layers),
        softcap=bool(getattr(config, "attn_logit_softcapping", None)) or _has_sinks(layers),
        itemsize=itemsize,
        outside_bytes=2 * tables * width * itemsize + norm_bytes(config.hidden_size, 1, wide),
        held=held,
        weight_bytes=held.on_device(streamed),
        streamed=streamed,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        whole=sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name),
        stream_itemsize=wide,
        row_norms_bytes=_row_norms_bytes(layers, itemsize),
    )


def _row_norms_bytes(layers: Sequence[Any], itemsize: int) -> int:
    """Of the adapter of DoRA's kind that needs most.

    First there are the identity matrix in float32, its copy in the compute dtype, and B·A; then that copy beside B·A,
    W, s·B·A and their sum, in float32.
    """
    found = [size for layer in layers for size in dora_weights(layer)]
    copy = itemsize if itemsize < 4 else 0
    return max(
        (
            max(into**2 * (4 + copy) + into * out * itemsize, into**2 * itemsize + 4 * into * out * 4)
            for into, out, _ in found
        ),
        default=0,
    )


def _active_weights(layer: Any, stacked: Collection[int], share: float) -> int:
    """Weights that a token is multiplied with in a layer: of stacked experts, those that it uses."""
    frozen = [weight for weight in layer.parameters() if not weight.requires_grad and weight.dim() > 1]
    used: float = sum(weight.numel() * (share if id(weight) in stacked else 1) for weight in frozen)
    return round(used)


def _widest(layers: Sequence[Any]) -> int:
    """Outputs of the widest matrix of a layer; one that is several in one is taken for its parts."""
    parts = ((path.rpartition(".")[2], part) for layer in layers for path, part in layer.named_modules())
    widths = (getattr(part, "out_features", 0) // PARTS.get(name, 1) for name, part in parts)
    return int(max(widths))


def _has_sinks(layers: Sequence[Any]) -> bool:
    return any(name.endswith("sinks") for layer in layers for name, _ in layer.named_parameters())
