"""Named algorithms: what each is made of, and what a recipe must hold to carry its name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from empo2.advantages import episode_return, group_advantages
from empo2.config import Config, nearest
from empo2.errors import ConfigError
from empo2.types import TrajectoryGroup

Advantages = tuple[tuple[float, ...], ...]  #: one number a turn: [episodes of the group][turns]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """``advantages``: a group and its recipe → advantages; ``check`` raises ConfigError where the recipe differs."""

    name: str
    advantages: Callable[[TrajectoryGroup, Config], Advantages]
    check: Callable[[Config], None]


def returns_of(group: TrajectoryGroup, config: Config) -> list[float]:
    """The return of each episode of a group, [G]."""
    scale, penalty = config.env.reward_scale, config.advantage.invalid_penalty
    return [episode_return(trajectory, scale, penalty) for trajectory in group.trajectories]


def group_relative(group: TrajectoryGroup, config: Config) -> Advantages:
    """GRPO's advantage of the whole episode, the same for each of its turns."""
    values = group_advantages(
        returns_of(group, config),
        normalize_by_std=config.advantage.normalize_by_std,
        std_floor=config.advantage.std_floor * config.env.reward_scale,
    )
    return tuple((value,) * len(t.turns) for value, t in zip(values, group.trajectories, strict=True))


def _check_empo2(config: Config) -> None:
    pass


def _check_grpo(config: Config) -> None:
    if config.modes.p != 0:
        raise ConfigError(f"grpo acts without tips, but modes.p is {config.modes.p}; set modes.p to 0")
    if config.novelty.coefficient != 0:
        raise ConfigError(
            f"grpo has no intrinsic reward, but novelty.coefficient is {config.novelty.coefficient}; set it to 0"
        )


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(name="empo2", advantages=group_relative, check=_check_empo2),
        Algorithm(name="grpo", advantages=group_relative, check=_check_grpo),
    )
}


def algorithm(config: Config) -> Algorithm:
    """The algorithm that the recipe names, checked against the recipe. Raises ConfigError."""
    name = config.train.algorithm
    if name not in ALGORITHMS:
        raise ConfigError(f"there is no algorithm {name!r}; {nearest(name, list(ALGORITHMS))} set train.algorithm")
    chosen = ALGORITHMS[name]
    chosen.check(config)
    return chosen


def has_signal(advantages: Sequence[Sequence[float]], skip_below: float = 0.0) -> bool:
    """Whether any advantage of a group exceeds ``skip_below`` in size."""
    return any(abs(value) > skip_below for turns in advantages for value in turns)
