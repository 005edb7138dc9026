"""Evaluation: episodes without memory (unless asked), writing neither tips nor novelty, with streams of their own."""

from collections.abc import Sequence
from typing import Any

from empo2 import metrics
from empo2.assemble import Parts, first_of_each_name, split_tasks
from empo2.collect import CollectRules
from empo2.config import Config
from empo2.envs.base import Split
from empo2.errors import UsageError
from empo2.memory import scope_of
from empo2.types import EpisodeKey, EpisodePlan, Mode, Task, Trajectory


def run_episodes(
    parts: Parts, tasks: Sequence[Task], *, episodes: int, temperature: float, with_memory: bool = False
) -> list[Trajectory]:
    """``episodes`` of each task. The same tasks give the same random draws every time, before and after training."""
    mode = Mode.WITH_TIPS if with_memory else Mode.PLAIN
    plans = [
        EpisodePlan(task=task, mode=mode, key=EpisodeKey(0, group, episode))
        for group, task in enumerate(tasks)
        for episode in range(episodes)
    ]
    rules = CollectRules(
        purpose="eval",
        seed=parts.config.train.seed,
        temperature=temperature,
        max_turns=parts.config.env.max_turns,
    )
    return parts.collector.collect(plans, rules)


def evaluate(parts: Parts, config: Config) -> dict[str, Any]:
    """What training reports: unseen variations of `eval.split`, and some of the trained ones, without memory."""
    result: dict[str, Any] = {}
    unseen = split_tasks(config, parts.suite, config.eval.split, config.eval.num_variations, but=parts.train_tasks)
    trained = first_of_each_name(parts.train_tasks, config.eval.train_variations)
    for name, tasks in (("", unseen), ("train_", trained)):
        if tasks:
            episodes = run_episodes(parts, tasks, episodes=config.eval.episodes, temperature=config.eval.temperature)
            summary = metrics.of_episodes(episodes)
            result |= {f"eval_{name}{key}": value for key, value in summary.items()}
            result[f"eval_{name}episodes"] = len(episodes)
    return result


def evaluate_split(
    parts: Parts, config: Config, *, split: Split, num_variations: int, episodes: int, with_memory: bool
) -> dict[str, Any]:
    """What `empo2 evaluate` reports: one row a task variation, and their mean. ``num_variations`` of each task name.

    Of the train split that is what was trained on. Raises UsageError where nothing would be evaluated.
    """
    if split == "train":
        tasks: Sequence[Task] = first_of_each_name(parts.train_tasks, num_variations)
    else:
        tasks = split_tasks(config, parts.suite, split, num_variations)
    if not tasks:
        raise UsageError(f"the {split} split gives nothing to evaluate; set --variations to at least 1")
    found = run_episodes(parts, tasks, episodes=episodes, temperature=config.eval.temperature, with_memory=with_memory)
    rows = []
    for task in tasks:
        own = [trajectory for trajectory in found if trajectory.task == task]
        row: dict[str, Any] = {"task": str(task), "episodes": len(own), **metrics.of_episodes(own)}
        if with_memory:
            row["scope"] = scope_of(task, config.memory.scope)
            row["memory_entries"] = parts.memory.size(row["scope"])
        rows.append(row)
    return {
        "split": split,
        "memory": "run" if with_memory else "none",
        "memory_entries": sum({row["scope"]: row["memory_entries"] for row in rows}.values()) if with_memory else 0,
        "variations": len(tasks),
        "episodes": len(found),
        **metrics.of_episodes(found),
        "tasks": rows,
    }
