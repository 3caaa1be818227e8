"""How large a study is. `smoke` is for tests, `quick` shows the frontier's shape, `full` is the study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
JUDGED = 8
"""Answers to each test opening that an adapter's implicit reward puts in order."""
RESULTS = "results.json"
"""What a finished study is gathered into."""


@dataclass(frozen=True)
class Preset:
    """Sizes of everything; the sampling budget of all methods is `train_prompts * samples` answers."""

    name: str
    train_prompts: int
    samples: int
    """Answers of the base to each training prompt."""
    test_prompts: int
    """Of known families with unseen subjects, and as many of unseen families."""
    test_answers: int
    """Answers of each policy to each test prompt."""
    base_answers: int
    """Answers of the base to each test prompt: best-of-n is computed from them."""
    best_of: tuple[int, ...]
    betas: tuple[float, ...]
    dpo_steps: int
    dpo_rate: float
    """Learning rate of DPO and SFT."""
    pairs_a_prompt: int
    kl_weights: tuple[float, ...]
    ppo_rate: float
    iterations: int
    keep: tuple[int, ...]
    """Iterations of PPO after which its policy is measured."""
    seeds: tuple[int, ...]
    side_beta: float
    """DPO's β in the side experiments."""
    noise: tuple[float, ...] = ()
    side: bool = False
    """Whether the side experiments run: noise, scarce data, off-policy pairs, references, on-policy rounds."""
    longest: int = 16
    rank: int = 8
    layers: str = "top-8"

    @property
    def rollouts(self) -> int:
        """Answers of one PPO iteration, so that a run samples what the pool has."""
        return self.train_prompts * self.samples // self.iterations


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smoke", train_prompts=8, samples=2, test_prompts=4, test_answers=1, base_answers=4, best_of=(2, 4),
            betas=(0.1, 1.0), dpo_steps=2, dpo_rate=1e-2, pairs_a_prompt=1, kl_weights=(0.05,), ppo_rate=1e-2,
            iterations=2, keep=(1, 2), seeds=(0,), side_beta=0.1, noise=(0.5,), side=True, longest=6, rank=2,
            layers="all",
        ),
        Preset(
            "quick", train_prompts=36, samples=4, test_prompts=16, test_answers=1, base_answers=4, best_of=(2, 4),
            betas=(0.03, 0.1, 0.5), dpo_steps=12, dpo_rate=2.5e-3, pairs_a_prompt=2, kl_weights=(0.05,), ppo_rate=1e-3,
            iterations=6, keep=(3, 6), seeds=(0,), side_beta=0.1,
        ),
        Preset(
            "full", train_prompts=64, samples=8, test_prompts=24, test_answers=2, base_answers=16,
            best_of=(2, 4, 8, 16), betas=(0.03, 0.1, 0.3, 1.0, 3.0), dpo_steps=36, dpo_rate=1e-3, pairs_a_prompt=3,
            kl_weights=(0.01, 0.05, 0.2), ppo_rate=5e-4, iterations=16, keep=(8, 12, 16), seeds=(0, 1, 2),
            side_beta=0.1, noise=(0.1, 0.2, 0.4), side=True,
        ),
    )
}  # fmt: skip
