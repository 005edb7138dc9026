"""Returns of episodes and their advantages within a group. Pure, plain numbers."""

import math
from collections.abc import Sequence

from empo2.types import Trajectory


def episode_return(trajectory: Trajectory, reward_scale: float, invalid_penalty: float = 0.0) -> float:
    """R = Σ_t (reward_t · scale + novelty_t) − penalty · invalid turns; the learning signal of one episode (EMPO²
    section 4.3; the penalty is ours).

    Summed so that equal scores reached in different portions are equal returns to the last bit; a group of equals would
    otherwise seem to have a signal.
    """
    rewards = math.fsum(turn.reward for turn in trajectory.turns)
    penalty = invalid_penalty * sum(not turn.valid for turn in trajectory.turns)
    return rewards * reward_scale + math.fsum(turn.novelty for turn in trajectory.turns) - penalty


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


def novelty_share(returns: Sequence[float], novelties: Sequence[float]) -> float:
    """Share of a group's spread that novelty makes: Σ|N_i − mean N| / (Σ|N_i − mean N| + Σ|S_i − mean S|), 0…1.

    N = novelty of an episode, S = the rest of its return. 0 where nothing differs.
    """
    rest = [r - n for r, n in zip(returns, novelties, strict=True)]
    novelty, other = _absolute_deviation(novelties), _absolute_deviation(rest)
    return novelty / (novelty + other) if novelty + other > 0 else 0.0


def _absolute_deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum(abs(value - mean) for value in values)
