"""The study's maths: pure functions on tensors and arrays, each with its source.

Shape suffixes: B sequences, T answer tokens, V vocabulary, N prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb, log

import numpy as np
import torch

# --- PPO (Schulman et al. 2017, arXiv 1707.06347) -------------------------------------------------


def gae(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16); episodes end at the mask.

    δ_t = r_t + γ·V_{t+1} - V_t, A_t = δ_t + γλ·A_{t+1}; V and A are 0 after the last token.

    Returns:
        Advantages and returns A + V, `[B, T]` each, 0 outside the mask.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = next_advantage_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        here_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = (delta_B + gamma * lam * next_advantage_B) * here_B
        advantages_BT[:, t] = advantage_B
        next_advantage_B = advantage_B
        next_value_B = values_BT[:, t] * here_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def token_rewards(
    scores_B: torch.Tensor, logps_BT: torch.Tensor, ref_BT: torch.Tensor, mask_BT: torch.Tensor, *, kl_weight: float
) -> torch.Tensor:
    """-kl_weight·(log π - log π_ref) at every token, plus the score at the last (Ziegler et al. 2019, eq. 2)."""
    rewards_BT = -kl_weight * (logps_BT - ref_BT) * mask_BT
    last_B = mask_BT.sum(dim=1).long() - 1
    rewards_BT[torch.arange(len(last_B)), last_B] += scores_B
    return rewards_BT


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the unmasked tokens."""
    mean = masked_mean(values_BT, mask_BT)
    variance = masked_mean((values_BT - mean) ** 2, mask_BT)
    return (values_BT - mean) * torch.rsqrt(variance + 1e-8) * mask_BT


def clipped_loss(
    logps_BT: torch.Tensor, old_BT: torch.Tensor, advantages_BT: torch.Tensor, mask_BT: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, float]:
    """-E[min(ρA, clip(ρ, 1-ε, 1+ε)A)], ρ = π/π_old (PPO, eq. 7), and the share of tokens that are clipped."""
    ratio_BT = torch.exp(logps_BT - old_BT)
    plain_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip) * advantages_BT
    share = masked_mean((clipped_BT < plain_BT).float(), mask_BT)
    return -masked_mean(torch.minimum(plain_BT, clipped_BT), mask_BT), float(share)


def masked_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean over the unmasked tokens."""
    return (values_BT * mask_BT).sum() / mask_BT.sum()


# --- KL(π‖π_ref) of a sampled answer --------------------------------------------------------------


def exact_kl(policy_BTV: torch.Tensor, ref_BTV: torch.Tensor) -> torch.Tensor:
    """KL of the next token at each place, over the whole vocabulary; `[B, T]` of two tables of log-probabilities.

    Its sum over a sampled answer estimates the KL of whole answers without bias, with less variance than
    log π(y) - log π_ref(y), which it is the conditional expectation of, token by token.
    """
    return (policy_BTV.exp() * (policy_BTV - ref_BTV)).sum(dim=-1)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from its base: log n - (n-1)/n; an upper bound where answers can tie (Beirami et al. 2024)."""
    return log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], n: int) -> float:
    """Mean of the best of n answers drawn without replacement from K >= n scored ones: exact, no sampling."""
    ordered = sorted(scores)
    ways = [comb(index, n - 1) for index in range(len(ordered))]  # the others of the n stand below
    return sum(score * way for score, way in zip(ordered, ways, strict=True)) / comb(len(ordered), n)


def agreement(guessed: Sequence[float], true: Sequence[float]) -> float | None:
    """Share of the pairs with different true values that are ordered alike by the guesses, of which a tie is half.

    None if all true values are the same. 0.5 is chance.
    """
    found = [
        0.5 if guessed[i] == guessed[j] else float((guessed[i] > guessed[j]) == (true[i] > true[j]))
        for i in range(len(true))
        for j in range(i)
        if true[i] != true[j]
    ]
    return sum(found) / len(found) if found else None


# --- pairs ----------------------------------------------------------------------------------------


def best_and_worst(scores: Sequence[float], *, most: int) -> list[tuple[int, int]]:
    """Pairs of indices `(better, worse)`: best with worst, second best with second worst, while they differ."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    found = [(order[i], order[-1 - i]) for i in range(min(most, len(order) // 2))]
    return [(better, worse) for better, worse in found if scores[better] > scores[worse]]


def flip(pairs: Sequence[tuple[int, int]], share: float, *, seed: int) -> list[tuple[int, int]]:
    """Exactly `round(share·N)` of the labels turned round, drawn by the seed."""
    wrong = set(np.random.default_rng(seed).permutation(len(pairs))[: round(share * len(pairs))].tolist())
    return [(b, a) if index in wrong else (a, b) for index, (a, b) in enumerate(pairs)]


def smoothed_weights(epsilon: float) -> tuple[float, float]:
    """Weights of TRL's sigmoid and robust losses whose sum is the smoothed (conservative) DPO loss.

    With L+ = -log σ(x) and L- = -log σ(-x): robust = ((1-ε)L+ - εL-)/(1-2ε) (Chowdhury et al. 2024), so
    smoothed = (1-ε)L+ + εL- = 2(1-ε)·sigmoid - (1-2ε)·robust.
    """
    return 2 * (1 - epsilon), -(1 - 2 * epsilon)


# --- frontiers and intervals ----------------------------------------------------------------------

Point = tuple[float, float]
"""KL in nats, reward."""


def hull(points: Sequence[Point]) -> list[Point]:
    """The upper concave hull from the smallest KL to the best reward.

    What a set of policies can reach: drawing one of two policies for each prompt has the mean of their rewards, and
    at most the mean of their KLs (KL is convex).
    """
    kept: list[Point] = []
    for x, y in sorted(points):
        if kept and y <= kept[-1][1]:
            continue  # more KL for no more reward
        while kept and kept[-1][0] == x:
            kept.pop()
        while len(kept) >= 2 and _slope(kept[-2], (x, y)) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append((x, y))
    return kept


def reward_at(points: Sequence[Point], kl: float) -> float:
    """Reward of the hull at a KL; its end's reward beyond its end, NaN before its start."""
    line = hull(points)
    if kl < line[0][0]:
        return float("nan")
    return float(np.interp(kl, [x for x, _ in line], [y for _, y in line]))


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def bootstrap(
    statistic: Callable[[np.ndarray], float], prompts: int, *, seed: int, resamples: int = 2000
) -> tuple[float, float, float]:
    """A statistic of all prompts and its 95% percentile interval over prompts drawn with replacement.

    Args:
        statistic: a function of `[N]` indices of prompts. Whatever it compares is compared on the same prompts.
    """
    draws_RN = np.random.default_rng(seed).integers(0, prompts, size=(resamples, prompts))
    found_R = np.array([statistic(draw_N) for draw_N in draws_RN])
    low, high = np.nanpercentile(found_R, [2.5, 97.5])
    return statistic(np.arange(prompts)), float(low), float(high)
