"""Returns of episodes and their advantages within a group. Pure, plain numbers."""

import math
from collections.abc import Sequence

from empo2.types import Trajectory


def episode_return(trajectory: Trajectory, reward_scale: float) -> float:
    """R = Σ_t (reward_t · scale + novelty_t); the learning signal of one episode (EMPO² section 4.3).

    Summed so that equal scores reached in different portions are equal returns to the last bit; a group of equals would
    otherwise seem to have a signal.
    """
    rewards = math.fsum(turn.reward for turn in trajectory.turns)
    return rewards * reward_scale + math.fsum(turn.novelty for turn in trajectory.turns)


def group_advantages(returns: Sequence[float], *, normalize_by_std: bool, std_floor: float) -> tuple[float, ...]:
    """A_i = (R_i − mean R) / max(std R, floor), [G] → [G] (GRPO, Shao et al. 2024).

    The standard deviation is unbiased (N − 1). Returns that are all equal give exact zeros.
    """
    if min(returns) == max(returns):
        return (0.0,) * len(returns)
    mean = math.fsum(returns) / len(returns)
    if not normalize_by_std:
        return tuple(value - mean for value in returns)
    variance = math.fsum((value - mean) ** 2 for value in returns) / (len(returns) - 1)
    divisor = max(math.sqrt(variance), std_floor)
    return tuple((value - mean) / divisor for value in returns)


def novelty_share(returns: Sequence[float], scaled_scores: Sequence[float]) -> float:
    """Share of a group's spread that novelty makes: Σ|N_i − mean N| / (Σ|N_i − mean N| + Σ|S_i − mean S|), 0…1.

    N = return − scaled score. 0 where nothing differs.
    """
    novelty = [r - s for r, s in zip(returns, scaled_scores, strict=True)]
    spread = {name: _absolute_deviation(values) for name, values in (("novelty", novelty), ("score", scaled_scores))}
    total = sum(spread.values())
    return spread["novelty"] / total if total > 0 else 0.0


def _absolute_deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum(abs(value - mean) for value in values)
