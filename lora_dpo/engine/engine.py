"""The fast path of one trainer: shared-prefix passes, whole-batch steps, references from the cache.

Shape suffixes: B pairs, R = 2B rows (chosen, then rejected), T columns.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from lora_dpo import places
from lora_dpo.config.recipe import EngineSection
from lora_dpo.engine import PairForward
from lora_dpo.engine.checkpointing import checkpoint_lowest
from lora_dpo.engine.forked_states import recurrent_layers
from lora_dpo.engine.layout import pack
from lora_dpo.engine.objective import Objective
from lora_dpo.engine.pair_batch import Inputs, PairBatch, assemble, merge_batches, model_inputs, padded
from lora_dpo.engine.pair_forward import ROUNDED_DIFFERENCE, largest_difference
from lora_dpo.engine.pair_margins import PairMargins
from lora_dpo.engine.prequential_count import PrequentialCount
from lora_dpo.engine.proof import proof_of
from lora_dpo.engine.reference_cache import PairLogps, ReferenceCache, reference_name
from lora_dpo.engine.step_record import StepRecord, answer_sums
from lora_dpo.engine.token_budget import (
    CPU_TOKENS,
    CUDA_TOKENS,
    SHARE,
    StreamedBudget,
    TokenBudget,
    passing_bytes,
    stream_token_bytes,
    tokens_without_gradients,
    widest_of,
)
from lora_dpo.engine.trunk_cache import TrunkCache, decoder_layers, lowest_adapted_layer
from lora_dpo.engine.whole_step import WholeStep
from lora_dpo.errors import ConfigError
from lora_dpo.model.base import steady
from lora_dpo.model.device import free_bytes, give_back_memory, out_of_memory
from lora_dpo.model.lora import base_of, is_reference, reference
from lora_dpo.model.visiting import visiting_of
from lora_dpo.systems import nearest_existing

logger = logging.getLogger(__name__)


class Engine:
    """Bound to the trainer's model until `close`.

    Args:
        objective: the trainer, whose model is a LoRA PeftModel on an architecture that `pair_forward` can run.
    """

    def __init__(self, objective: Objective, settings: EngineSection) -> None:
        self.objective = objective
        self.device: torch.device = objective.args.device
        if settings.offload and self.device.type == "cpu":
            raise ConfigError(
                "engine.offload moves what layers are given from a GPU to main memory, and this run computes on the "
                "CPU. Leave it out."
            )
        base = base_of(objective.model)
        self.visiting = visiting_of(base)
        """The base's weights, if they visit the device."""
        if self.visiting is not None and objective.args.world_size > 1:
            raise ConfigError(
                f"model.stream is for one process, and there are {objective.args.world_size}. Set it to off."
            )
        self.gathered: list[Inputs] = []
        """Batches of the optimiser step that is being gathered."""
        self.proof = proof_of(base)
        """What trying a small copy of the base found."""
        self.compute = compute = _compute_dtype(objective)
        self.usual_tokens = CUDA_TOKENS if self.device.type == "cuda" else CPU_TOKENS
        weighting = ("log_sum_sq_probs",) if objective.use_weighting else ()
        self.forward = PairForward(
            base, weighting, trunk=_trunk_cache(objective, settings) if self.proof.trunk else None
        )
        self.references = ReferenceCache(_cache_folder(settings), reference_name(objective.model, compute))
        self.scoring_tokens = self.usual_tokens if settings.tokens == "auto" else settings.tokens
        """Most stream tokens of the reference at once, if they fit; halved when memory runs out."""
        self.passing_bytes = passing_bytes(
            hidden=base.config.hidden_size, widest=widest_of(base), itemsize=compute.itemsize
        )
        """Bytes that a token needs in a pass without gradients."""
        self._in_segments = False
        """Whether a layer may run on some pairs of a stream after the other."""
        layers = decoder_layers(base)[lowest_adapted_layer(base) :]  # those below run without gradients
        budget = self._budget(base, layers, settings, compute.itemsize)
        self.whole_step = WholeStep(
            objective, self.forward, budget, lambda batch: self.kept_bytes(batch), split_pairs=settings.split_pairs
        )
        self.first_sight = PrequentialCount()
        self.margins = PairMargins()
        self.reference_seconds = 0.0
        """Spent on scoring pairs with the reference, whose log-probabilities were not known."""
        self.last: StepRecord
        """The last step."""
        self._moved = False

    def _budget(self, base: Any, layers: Any, settings: EngineSection, itemsize: int) -> TokenBudget:
        hidden, below = base.config.hidden_size, len(decoder_layers(base)) - len(layers)
        visiting = self.visiting if self.visiting is not None and self.visiting.layers else None
        before = None if visiting is None else lambda number: visiting.arrive(below + number)
        given: dict[str, Any] = dict(
            layers=len(layers),
            may_checkpoint=self.objective.args.gradient_checkpointing or visiting is not None,
            checkpoint_bytes=0 if settings.offload else hidden * itemsize,
            cap=self.scoring_tokens,
            free=lambda: free_bytes(self.device),
            set_checkpointing=lambda count: checkpoint_lowest(layers, count, offload=settings.offload, before=before),
        )
        if visiting is None:
            return TokenBudget(**given)
        stream_bytes = len(layers) * given["checkpoint_bytes"] + stream_token_bytes(hidden=hidden, itemsize=itemsize)
        # Not where layers hand on more than their output, or are told where all pairs of the stream lie.
        self._in_segments = self.proof.trunk and not recurrent_layers(decoder_layers(base))
        return StreamedBudget(**given, stream_bytes=stream_bytes, in_segments=self._in_segments)

    @property
    def moved(self) -> bool:
        """Whether the policy differs from the reference yet; until then its log-ratios are 0 but for rounding."""
        self._moved = self._moved or not is_reference(self.objective.model)
        return self._moved

    def close(self) -> None:
        """Give the model back its own forward pass."""
        self.whole_step.budget.set_checkpointing(0)
        self.forward.close()
        if self.forward.trunk is not None:
            self.forward.trunk.close()

    def step(self, model: Any, *, logged: bool) -> torch.Tensor:
        """Forward and backward of the gathered batches as one; the loss, detached.

        Args:
            logged: whether TRL's logged values (entropy, mean logits, token accuracy) are computed.
        """
        batch = self._known(PairBatch.of(merge_batches(self.gathered, self.objective.pad_id)))
        self.gathered.clear()
        self.forward.logged = logged
        try:
            self.last = self.whole_step.run(model, batch)
        finally:
            self.forward.logged = True
            self.forward.rest()
        self._note_margins(self.last)
        return self.last.loss

    def _note_margins(self, step: StepRecord) -> None:
        """Note the step's margins, of all processes, and count its prompts that no process has had before."""
        margin_B = step.log_ratios(self.objective.ld_alpha) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        prompts, keys, margins = step.batch.prompts, step.batch.keys, margin_B.tolist()
        if self.objective.args.world_size > 1:
            gather = self.objective.accelerator.gather
            prompts = gather(torch.tensor(prompts, device=self.device)).tolist()
            bytes_BK = torch.tensor([list(key) for key in keys], device=self.device)
            keys = [bytes(row) for row in gather(bytes_BK).tolist()]
            margins = gather(margin_B.float().to(self.device)).tolist()
        self.first_sight.note(prompts, margins, moved=self.moved)
        self.margins.note(keys, margins, moved=self.moved)

    def difference(self, inputs: Inputs) -> str | None:
        """How far the engine is from TRL's own pass on the two shortest pairs of a batch, if it is too far.

        Both run without dropout, so that only the function is compared, and without autocast, but for a base of several
        precisions, which cannot run without it.
        """
        base, batch = base_of(self.objective.model), PairBatch.of(inputs)
        part = batch.select(sorted(sorted(range(len(batch)), key=batch.lengths.__getitem__)[:2])).inputs
        call = model_inputs(part)
        longest = max(2, int(part["attention_mask"].sum(dim=1).max()))
        call.update({name: call[name][:, :longest] for name in ("input_ids", "attention_mask", "labels")})
        kinds = {one.dtype for one in base.parameters() if one.is_floating_point() and not one.requires_grad}
        accelerator, bound = self.objective.accelerator, largest_difference(base)
        rounds = torch.autocast(self.device.type, enabled=False)
        if len(kinds) > 1:
            rounds, bound = accelerator.autocast(), ROUNDED_DIFFERENCE
        with torch.no_grad(), steady(base), rounds, self.forward.log(False):
            ours_RT = base(**call).log_probs.cpu().double()  # Apple's GPUs have no float64
            # TRL's reads the head past its module
            whole = contextlib.nullcontext() if self.visiting is None else self.visiting.whole_head()
            with self.forward.passed_on(), whole:
                theirs_RT = base(**call).log_probs.cpu().double()
        sums = torch.stack([(ours_RT - theirs_RT).abs().sum(), (call["labels"][:, 1:] != -100).sum().cpu()])
        off, tokens = accelerator.gather(sums[None].float().to(self.device)).sum(dim=0).tolist()
        found = off / max(1.0, tokens)
        if found <= bound:
            return None
        return f"on the first batch the engine's log-probabilities differ from TRL's by {found:.3g} nats a token"

    def tables(self, batch: PairBatch) -> Any:
        """TRL's output for a whole batch as the policy now is, all of its fields, without gradients or dropout."""
        objective = self.objective
        with torch.no_grad(), steady(objective.model), objective.accelerator.autocast(), self.forward.log(True):
            outputs = []
            chosen, segment = self._without_gradients(batch.lengths)
            parts = [batch.select(pairs) for pairs in chosen]
            for part in parts:
                with self.forward.on(part), self.forward.in_segments(segment):
                    outputs.append(objective.model(**model_inputs(part.inputs)))
            return assemble(outputs, parts)

    def kept_bytes(self, batch: PairBatch) -> float:
        """Bytes that a stream token keeps for the backward pass, measured on the shortest pair of a batch."""
        shortest = min(filter(None, batch.lengths))
        part = batch.select([batch.lengths.index(shortest)])
        # A resumed run measures again: what dropout draws for it must not shift what the steps draw.
        with (
            torch.random.fork_rng(),
            self.forward.count_kept() as kept,
            self.objective.accelerator.autocast(),  # the bare model has none of its own
            self.forward.log(False),
            self.forward.on(part),
        ):
            output = base_of(self.objective.model)(**model_inputs(part.inputs))
        del output
        return sum(kept.values()) / shortest

    def with_reference(self, inputs: Inputs) -> Inputs:
        """The batch with `ref_chosen_logps` and `ref_rejected_logps`, `[B]` each; unknown pairs are scored first.

        Those that are in the data count where TRL was told to read them (`precompute_ref_log_probs`).
        """
        if self.objective.precompute_ref_logps and "ref_chosen_logps" in inputs:
            return inputs
        return self._known(PairBatch.of(inputs)).inputs

    def with_fresh_reference(self, inputs: Inputs) -> Inputs:
        """The same, scored now whatever is known: in 16 bits another packing of the pairs gives other digits."""
        batch = PairBatch.of(inputs)
        scored = self._score(batch, list(range(len(batch))))
        return self._joined(batch, [scored[index] for index in range(len(scored))]).inputs

    def _known(self, batch: PairBatch) -> PairBatch:
        """`with_reference`, of a batch whose rows are found."""
        if self.objective.precompute_ref_logps and "ref_chosen_logps" in batch.inputs:
            return batch
        known = self.references.get(batch.keys)
        missing = [index for index, key in enumerate(batch.keys) if key not in known]
        if missing:
            since = time.perf_counter()
            fresh = {batch.keys[index]: logps for index, logps in self._score(batch, missing).items()}
            self.references.put(fresh)
            self.reference_seconds += time.perf_counter() - since
            known = {**known, **fresh}
        return self._joined(batch, [known[key] for key in batch.keys])

    def _joined(self, batch: PairBatch, logps: list[PairLogps]) -> PairBatch:
        sums = torch.tensor([pair.sums(self.objective.ld_alpha) for pair in logps], dtype=torch.float64)
        sums = sums.float().to(batch.inputs["input_ids"].device)
        return batch.replaced(ref_chosen_logps=sums[:, 0], ref_rejected_logps=sums[:, 1])

    def _score(self, batch: PairBatch, pairs: list[int]) -> dict[int, PairLogps]:
        """The reference's log-probabilities of some pairs of a batch, by index."""
        lengths = batch.lengths
        longest = max(lengths[index] for index in pairs)
        scored: dict[int, PairLogps] = {}
        while len(scored) < len(pairs):
            left = [index for index in pairs if index not in scored]
            try:
                self._score_in_parts(batch, left, scored)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error) or self.scoring_tokens <= longest:
                    raise
                self.scoring_tokens = max(longest, self.scoring_tokens // 2)
            else:
                break
            # Here, outside the except block, nothing holds the failed pass's tensors any more.
            logger.warning("Memory ran out: the reference scores at most %d tokens at once.", self.scoring_tokens)
            give_back_memory()
        return scored

    def _at_once(self, longest: int) -> int:
        """Tokens that a pass without gradients takes at once now. Not found by trying: on Windows a card that is full
        raises no error, but goes on in main memory, many times slower."""
        free = free_bytes(self.device) * SHARE
        return tokens_without_gradients(
            token_bytes=self.passing_bytes, free=free, longest=longest, cap=self.scoring_tokens
        )

    def _without_gradients(self, lengths: list[int]) -> tuple[list[list[int]], int | None]:
        """The parts that pairs are run in without gradients, and how many tokens of one run through a layer at once."""
        at_once = self._at_once(max(lengths))
        if not self._in_segments:
            return pack(lengths, at_once), None
        room = free_bytes(self.device) * (1 - SHARE)  # beside what a layer works in
        hidden, itemsize = base_of(self.objective.model).config.hidden_size, self.compute.itemsize
        return pack(lengths, max(at_once, int(room / stream_token_bytes(hidden=hidden, itemsize=itemsize)))), at_once

    def _score_in_parts(self, batch: PairBatch, pairs: list[int], scored: dict[int, PairLogps]) -> None:
        """Score some pairs of a batch, and note each part as it is done."""
        objective = self.objective
        model = objective.accelerator.unwrap_model(objective.model)
        # Before the loop the model's own forward has no autocast yet; in it, twice is once.
        exact = (torch.no_grad(), steady(model), reference(model), objective.accelerator.autocast())
        with contextlib.ExitStack() as stack:
            for each in (*exact, self.forward.log(False)):
                stack.enter_context(each)
            packed, segment = self._without_gradients([batch.lengths[index] for index in pairs])
            for places in packed:
                chosen = [pairs[place] for place in places]
                part = batch.select(chosen)
                with self.forward.on(part), self.forward.in_segments(segment):
                    log_probs_RT = model(**model_inputs(part.inputs)).log_probs
                sums = answer_sums(log_probs_RT, padded(part.scored, log_probs_RT.shape[1] + 1))
                scored.update(zip(chosen, sums, strict=True))


def _compute_dtype(objective: Objective) -> torch.dtype:
    """What the matrix products of a trainer's passes run in."""
    if objective.args.bf16 or objective.args.fp16:
        return torch.bfloat16 if objective.args.bf16 else torch.float16
    dtype: torch.dtype = base_of(objective.model).dtype
    return dtype


def _cache_folder(settings: EngineSection) -> Path | None:
    where = settings.reference_cache
    return None if where == "off" else places.references() if where == "auto" else Path(where)


def _trunk_cache(objective: Objective, settings: EngineSection) -> TrunkCache:
    if settings.trunk_cache == "off":
        return TrunkCache(memory_bytes=0)  # the layers below still run without gradients
    memory = free_bytes(torch.device("cpu")) // 4
    if settings.trunk_cache == "memory":
        return TrunkCache(memory_bytes=memory)
    folder = Path(objective.args.output_dir).absolute() / "trunk"
    room = shutil.disk_usage(nearest_existing(folder)).free // 2
    return TrunkCache(memory_bytes=memory, folder=folder, disk_bytes=room)
