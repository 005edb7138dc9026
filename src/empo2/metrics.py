"""What a step says about itself: one flat dict of numbers; None where there was nothing to measure."""

import collections
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from empo2.advantages import novelty_share
from empo2.collect import CollectCounters
from empo2.envs.pool import PoolCounters
from empo2.types import Mode, Trajectory, TrajectoryGroup
from empo2.update import StepUpdate

#: means over a step's updates: None in a step without one (before 2026-11-26: 0)
OF_UPDATES = (
    *("loss", "entropy", "ratio_mean", "ratio_max", "clip_fraction", "masked_token_fraction", "kl", "grad_norm"),
    *("sampler_gap_mean", "sampler_gap_max"),
)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def of_episodes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Score, success, valid actions and how episodes ended, over any episodes."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    return {
        "score_mean": _mean([trajectory.score for trajectory in trajectories]),
        "success_rate": _mean([float(trajectory.success) for trajectory in trajectories]),
        "valid_action_rate": _mean([float(turn.valid) for turn in turns]),
        "truncated_rate": _mean([float(turn.completion.truncated) for turn in turns]),
        "unparsed_rate": _mean([float(not turn.parsed) for turn in turns]),
        "turns_mean": _mean([float(len(trajectory.turns)) for trajectory in trajectories]),
        "token_limit_rate": _mean([float(t.ending.value == "token_limit") for t in trajectories]),
    }


def of_collection(groups: Sequence[TrajectoryGroup], returns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What the step's episodes did."""
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    turns = [turn for trajectory in episodes for turn in trajectory.turns]
    with_tips = [t for trajectory in episodes if trajectory.mode.shows_tips for t in trajectory.turns]
    shares = [
        novelty_share(values, [math.fsum(turn.novelty for turn in t.turns) for t in group.trajectories])
        for group, values in zip(groups, returns, strict=True)
    ]
    by_mode = {
        f"score_{mode.value}": _mean([t.score for t in episodes if t.mode is mode])
        for mode in Mode
        if any(t.mode is mode for t in episodes)
    }
    return {
        "num_episodes": len(episodes),
        **{f"mode_{mode.value}": sum(t.mode is mode for t in episodes) for mode in Mode},
        **of_episodes(episodes),
        **by_mode,
        "solved_tasks": sorted({str(t.task) for t in episodes if t.success}),
        "score_std_in_group": _mean([_std([t.score for t in group.trajectories]) for group in groups]),
        "return_mean": _mean([value for values in returns for value in values]),
        "entropy_sampled": entropy_sampled([t for t in episodes if t.mode is Mode.PLAIN]),
        "novelty_mean": _mean([turn.novelty for turn in turns]),
        "novelty_share_of_advantage": _mean(shares),
        "tips_written": sum(bool(trajectory.tip) for trajectory in episodes),
        "tips_retrieved_mean": _mean([float(len(turn.tips)) for turn in with_tips]),
        "tip_candidate_share": _mean([turn.candidates / turn.entries for turn in with_tips if turn.entries]),
        "episode_restarts": sum(trajectory.restarts for trajectory in episodes),
    }


def entropy_sampled(episodes: Sequence[Trajectory]) -> float | None:
    """Mean −log-prob of the tokens that were sampled (nats): the policy's entropy a token, estimated from what it did.

    Unlike the entropy of the update, which is that of the trained tokens, every step has it. None without episodes.
    """
    logprobs = [value for t in episodes for turn in t.turns for value in turn.completion.logprobs]
    return -_mean(logprobs) if logprobs else None


def first_successes(steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The training step in which each task was first solved, by the tasks' names, of a run's metrics."""
    found: dict[str, int] = {}
    for line in steps:
        for task in line["solved_tasks"]:
            found.setdefault(task, line["step"])
    return found


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def of_update(update: StepUpdate) -> dict[str, float | None]:
    """Token-weighted means over the step's updates; None where every group was skipped, ``kl`` where none was held."""
    stats = update.updates
    tokens = sum(s.num_tokens for s in stats)

    held = sum(s.num_held for s in stats)

    def mean(field: str) -> float:
        return sum(getattr(s, field) * s.num_tokens for s in stats) / tokens

    counts: dict[str, float | None] = {
        "zero_advantage_groups": update.num_zero_groups,
        "skipped_groups": update.num_skipped_groups,
        "updates": len(stats),
        "updates_skipped": sum(s.skipped for s in stats),
        "tokens_trained": tokens,
        "tokens_computed": sum(s.num_computed for s in stats) + update.num_computed,
    }
    if not stats:
        return counts | dict.fromkeys(OF_UPDATES)
    return counts | {
        "loss": _mean([s.loss for s in stats]),
        "entropy": mean("entropy"),
        "ratio_mean": mean("ratio_mean"),
        "ratio_max": max(s.ratio_max for s in stats),
        "clip_fraction": mean("clip_fraction"),
        "masked_token_fraction": mean("masked_fraction"),
        "kl": sum(s.kl * s.num_held for s in stats) / held if held else None,
        "grad_norm": _mean([s.grad_norm for s in stats]),
        # of the first update, before which trainer and sampler hold the same weights
        "sampler_gap_mean": stats[0].sampler_gap_mean,
        "sampler_gap_max": stats[0].sampler_gap_max,
    }


def of_faults(counters: PoolCounters, before: PoolCounters) -> dict[str, float]:
    """Environments that died or hung in the step, and episodes that were brought back by replaying them."""
    return {
        "environment_crashes": counters.crashes + counters.timeouts - before.crashes - before.timeouts,
        "environment_replays": counters.replays - before.replays,
    }


class Stopwatch:
    """Seconds of the parts of a step: each lap is added to the part that is named at its end."""

    def __init__(self) -> None:
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def of_time(counters: CollectCounters, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds and sampled tokens; ``seconds``: of "collect", "train", "remember" and "other", a whole step together.

    Tips: writing them, and embedding and storing them and the states ("remember"). Other: novelty, advantages,
    handing the weights to the sampler, writing trajectories.
    """
    return {
        "tokens_sampled": counters.action_tokens + counters.tip_tokens,
        "seconds_collect": seconds["collect"] - counters.tip_seconds,
        "seconds_tips": counters.tip_seconds + seconds["remember"],
        "seconds_train": seconds["train"],
        "seconds_other": seconds["other"],
        "seconds_environments": counters.environment_seconds,
        "seconds_total": sum(seconds.values()),
    }


def finite_or_text(metrics: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: such values become their names."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
