"""PPO with LoRA on one base, plain: sample, score, estimate advantages, take clipped steps. No reward model: the true
reward is given.

The policy is the base with the adapter on; the KL reference is the same base with the adapter off; the critic is one
linear layer on the policy's last hidden states, which it does not change.

Ziegler et al. 2019 (arXiv 1909.08593) for the KL penalty at every token, Schulman et al. 2017 for the clipped loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .lab import Answer, Lab, Rows, hidden_of, logps_of, rows_of, score, taken
from .maths import clipped_loss, gae, masked_mean, token_rewards, whiten


@dataclass(frozen=True)
class PPOSettings:
    """What PPO needs to be told."""

    kl_weight: float
    iterations: int
    rollouts: int
    """Answers sampled in an iteration."""
    minibatches: int = 2
    epochs: int = 2
    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-2
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Rollouts:
    """An iteration's answers with everything that is held fixed while steps are taken on them."""

    prompts: list[list[int]]
    answers: list[Answer]
    old: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    kl: float


class PPO:
    """The state of a run: adapter, critic, both optimisers. Saved and restored after any iteration."""

    def __init__(self, lab: Lab, model: Any, prompts: Sequence[Sequence[int]], settings: PPOSettings) -> None:
        self.lab, self.model, self.settings = lab, model, settings
        self.prompts = [list(prompt) for prompt in prompts]
        self.critic = torch.nn.Linear(lab.base.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.critic.weight)
        torch.nn.init.zeros_(self.critic.bias)
        self.adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.adapter.values()), "lr": settings.learning_rate},
                {"params": list(self.critic.parameters()), "lr": settings.critic_learning_rate},
            ],
            weight_decay=0.0,
        )
        self.log: list[dict[str, float]] = []

    def iterate(self) -> dict[str, float]:
        """One iteration: sample with the policy as it is, then a few epochs of clipped steps on these answers."""
        number, settings = len(self.log), self.settings
        rollouts = self.roll_out(number)
        order = random.Random(f"{settings.seed}/{number}")
        clipped, losses = [], []
        self.model.train()
        for _ in range(settings.epochs):
            indices = order.sample(range(len(rollouts.answers)), len(rollouts.answers))
            for part in (indices[i :: settings.minibatches] for i in range(settings.minibatches)):
                loss, share = self.step(rollouts, sorted(part))
                losses.append(loss)
                clipped.append(share)
        row = {
            "iteration": number + 1,
            "reward": sum(answer.reward for answer in rollouts.answers) / len(rollouts.answers),
            "kl": rollouts.kl,
            "loss": sum(losses) / len(losses),
            "clipped": sum(clipped) / len(clipped),
        }
        self.log.append(row)
        return row

    def roll_out(self, number: int) -> Rollouts:
        """Answer the next prompts as the policy now is, and what each token earned."""
        settings = self.settings
        self.model.eval()
        prompts = [self.prompts[(number * settings.rollouts + i) % len(self.prompts)] for i in range(settings.rollouts)]
        answers = self.lab.sample(self.model, prompts, seed=settings.seed * 100_003 + number * 101)
        rows = rows_of(prompts, [answer.tokens for answer in answers])
        scored = score(self.model, rows)
        with torch.no_grad():
            values = self._values(scored.hidden, rows)
        given = torch.tensor([answer.reward for answer in answers])
        per_token = token_rewards(given, scored.logps, scored.ref, rows.mask, kl_weight=settings.kl_weight)
        advantages, returns = gae(per_token, values, rows.mask, gamma=settings.gamma, lam=settings.lam)
        kl = float(scored.kl.sum(dim=1).mean())
        return Rollouts(prompts, answers, scored.logps, whiten(advantages, rows.mask), returns, kl)

    def step(self, rollouts: Rollouts, part: list[int]) -> tuple[float, float]:
        """One clipped update on some of the answers; the loss, and the share of ratios that were clipped."""
        rows = rows_of([rollouts.prompts[i] for i in part], [rollouts.answers[i].tokens for i in part])
        width = rows.mask.shape[1]
        old, advantages, returns = (
            table[part, :width] for table in (rollouts.old, rollouts.advantages, rollouts.returns)
        )
        hidden = hidden_of(self.model, rows)
        logps = taken(logps_of(self.model, hidden), rows)
        loss, share = clipped_loss(logps, old, advantages, rows.mask, clip=self.settings.clip)
        error = masked_mean((self._values(hidden, rows) - returns) ** 2, rows.mask)
        self.optimizer.zero_grad()
        (loss + error).backward()  # the critic reads detached states: its loss reaches no adapter weight
        torch.nn.utils.clip_grad_norm_(self.adapter.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach()), share

    def _values(self, hidden_BTH: torch.Tensor, rows: Rows) -> torch.Tensor:
        values: torch.Tensor = self.critic(hidden_BTH.detach().float().cpu()).squeeze(2)
        return values * rows.mask

    def save(self, path: Path) -> None:
        """Write the whole state, or nothing."""
        state = {
            "adapter": {name: p.detach() for name, p in self.adapter.items()},
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(state["adapter"][name])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]


def train_ppo(
    lab: Lab,
    prompts: Sequence[Sequence[int]],
    settings: PPOSettings,
    folder: Path,
    *,
    keep: Sequence[int],
    out_of_time: Callable[[], bool],
) -> list[dict[str, float]] | None:
    """Run PPO to its end, saved after every iteration in `folder`; adapters after the iterations in `keep` stay there.

    Returns:
        The log, one row an iteration; None if time ran out before the end. The same call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    with lab.fresh(settings.seed) as model:
        run = PPO(lab, model, prompts, settings)
        if state.is_file():
            run.restore(state)
        while len(run.log) < settings.iterations:
            if out_of_time():
                return None
            run.iterate()
            if len(run.log) in keep:
                model.save_pretrained(str(folder / f"iteration{len(run.log)}"))
            run.save(state)
        return run.log
