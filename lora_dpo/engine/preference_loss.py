"""DPO's own loss, to read, and for the check at step 0 (`training/reference_guard.py`); what trains is TRL's.

Shape suffixes: B pairs.
"""

from __future__ import annotations

import torch


def preference_loss(
    chosen_logratio_B: torch.Tensor, rejected_logratio_B: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-log σ(β·(h(chosen) - h(rejected))) with h(y) = log π_θ(y|x) - log π_ref(y|x) (Rafailov et al. 2023, eq. 7).

    At step 0 policy and reference are one: h = 0, and the loss is ln 2.

    Args:
        chosen_logratio_B: h(chosen), `[B]`, in nats, summed over the answer's tokens.
        rejected_logratio_B: h(rejected), `[B]`.
        beta: β, how dearly the policy pays for leaving the reference.

    Returns:
        The loss of each pair `[B]`, and the implicit rewards β·h of both answers (eq. 5 but for a constant of the
        prompt), without gradients.
    """
    margin_B = beta * (chosen_logratio_B - rejected_logratio_B)
    loss_B = -torch.nn.functional.logsigmoid(margin_B)
    return loss_B, (beta * chosen_logratio_B).detach(), (beta * rejected_logratio_B).detach()
