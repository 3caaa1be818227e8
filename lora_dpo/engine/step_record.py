"""One optimiser step as it was run: what is logged, counted and asked about it afterwards reads this alone.

Shape suffixes: B pairs of the step, R = 2B rows (chosen, then rejected), T columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_dpo.engine.pair_batch import PairBatch, padded
from lora_dpo.engine.reference_cache import PairLogps


@dataclass(frozen=True)
class StepRecord:
    """A step's pairs and the policy's log-probabilities of their answers, as they were before the step's update."""

    loss: torch.Tensor
    """Of the whole batch, detached."""
    batch: PairBatch
    """With the reference's log-probabilities."""
    log_probs_RT: torch.Tensor
    """The policy's, of each token, `[R, T-1]`, detached."""
    parts: int
    """How many parts the step ran in."""

    def log_ratios(self, ld_alpha: float | None) -> torch.Tensor:
        """log π_θ(y|x) - log π_ref(y|x) of each pair's chosen and rejected answer: `[B, 2]`, in nats, on the CPU.

        Args:
            ld_alpha: what the tokens weigh by which the longer answer is longer (LD-DPO); None is 1.
        """
        inputs = self.batch.inputs
        references_R1 = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])[:, None]
        host_RT = torch.cat([self.log_probs_RT.float(), references_R1.float()], dim=1).cpu()  # one wait for a GPU
        policy = answer_sums(host_RT[:, :-1], padded(self.batch.scored, self.log_probs_RT.shape[1] + 1))
        policy_B2 = torch.tensor([logps.sums(ld_alpha) for logps in policy], dtype=torch.float64)
        return policy_B2 - torch.stack(host_RT[:, -1].chunk(2), dim=1)


def answer_sums(log_probs_RT: torch.Tensor, mask_RT: torch.Tensor) -> list[PairLogps]:
    """Each pair's log-probabilities over the tokens that both answers have, and over the longer one's rest.

    Args:
        log_probs_RT: `[R, T-1]` per-token values.
        mask_RT: `[R, T]` on the CPU, 1 on answer tokens.
    """
    mask_RT, log_probs_RT = mask_RT[:, 1:], log_probs_RT.detach().cpu()  # Apple's GPUs have no float64
    place_RT = mask_RT.cumsum(dim=1)
    shorter_B = torch.minimum(*mask_RT.sum(dim=1).chunk(2))
    head_RT = place_RT <= torch.cat([shorter_B, shorter_B])[:, None]
    log_probs_RT = log_probs_RT.double() * mask_RT
    sums_R2 = torch.stack([(log_probs_RT * head_RT).sum(dim=1), (log_probs_RT * ~head_RT).sum(dim=1)], dim=1)
    return [PairLogps(*row) for row in torch.cat(sums_R2.chunk(2), dim=1).tolist()]
