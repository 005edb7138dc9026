"""THE LOOP of EMPO²: read this first.

Each step: draw modes → collect groups → add novelty → advantages → update the weights → publish them → remember tips
and states → record. The tips were written during collection, by the policy that acted. Memory, novelty counts and the
weights that act change between two collections only: what a step found becomes visible with the next one.

Left out on purpose: which ids are trained (sequences.py), the objective (losses.py), what is retrieved (memory.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from empo2 import metrics, prompts, streams
from empo2.algorithms import Advantages, algorithm, returns_of
from empo2.assemble import Parts
from empo2.collect import CollectRules
from empo2.config import Config
from empo2.errors import CheckpointError
from empo2.evaluate import evaluate
from empo2.memory import NewTip, scope_of
from empo2.modes import draw_modes
from empo2.novelty import Visited
from empo2.run import Checkpoint, RunFolder
from empo2.types import EpisodeKey, EpisodePlan, Task, TrajectoryGroup
from empo2.update import StepUpdate, update_policy


class Observer(Protocol):
    """Is told how the run goes (display.py)."""

    def evaluated(self, step: int, result: dict[str, Any]) -> None: ...

    def stepped(self, step: int, result: dict[str, Any]) -> None: ...


def train(parts: Parts, run: RunFolder, observer: Observer, stop: Callable[[], bool] = lambda: False) -> Checkpoint:
    """Train to the recipe's last step, from the run's last checkpoint if it has one; returns the last checkpoint.

    ``stop`` is asked after each step; where it says True, the step is saved and training ends.
    """
    config = parts.config
    step, version = resume(parts, run)
    if step < config.train.steps:
        parts.pool.warm(parts.train_tasks[0])
    if step == 0:
        record_evaluation(parts, run, observer, 0)
    ending = step == config.train.steps
    while not ending:
        step += 1
        version += 1
        faults = replace(parts.pool.counters)
        taken = take_step(parts, step, version)
        run.write_trajectories(step, taken.groups, taken.returns, taken.advantages, parts.tokenizer.decode)
        taken.watch.lap("other")
        result = {
            "step": step,
            "policy_version": version,
            **metrics.of_collection(taken.groups, taken.returns),
            "distinct_states": parts.novelty.distinct_states(),
            "memory_entries": parts.memory.size(),
            **metrics.of_update(taken.update),
            **metrics.of_faults(parts.pool.counters, faults),
            **metrics.of_time(parts.collector.counters, taken.watch.seconds),
        }
        if step == config.train.steps or (config.eval.every and step % config.eval.every == 0):
            result |= record_evaluation(parts, run, observer, step)
        run.append_metrics(metrics.finite_or_text(result))
        observer.stepped(step, result)
        ending = step == config.train.steps or stop()
        if ending or step % config.train.checkpoint_every == 0:
            save(parts, run, step, version)
    return run.checkpoints()[-1]


@dataclass(frozen=True, kw_only=True)
class TakenStep:
    """What a training step went through; returns and advantages by group. ``watch``: where its time went."""

    groups: list[TrajectoryGroup]
    returns: list[list[float]]
    advantages: list[Advantages]
    update: StepUpdate
    watch: metrics.Stopwatch


def take_step(parts: Parts, step: int, version: int) -> TakenStep:
    """One training step, from drawing modes to remembering; the sampler's weights are then those of ``version``."""
    config, learner = parts.config, parts.learner
    assert learner is not None
    advantages_of = algorithm(config).advantages
    watch = metrics.Stopwatch()
    groups = collect_groups(parts, step)
    watch.lap("collect")
    groups = add_novelty(parts, groups)
    returns = [returns_of(group, config) for group in groups]
    advantages = [advantages_of(group, config) for group in groups]
    watch.lap("other")
    update = update_policy(learner, groups, advantages, config, step)
    watch.lap("train")
    parts.collector.sampler.load_weights(learner.weights(), version)
    watch.lap("other")
    remember(parts, groups, step)
    watch.lap("remember")
    return TakenStep(groups=groups, returns=returns, advantages=advantages, update=update, watch=watch)


def choose_tasks(tasks: Sequence[Task], config: Config, step: int) -> list[Task]:
    """The tasks of a step's groups: every task once, in a seeded order, before any comes again."""
    chosen = []
    for group in range(config.collect.groups_per_step):
        epoch, place = divmod((step - 1) * config.collect.groups_per_step + group, len(tasks))
        chosen.append(streams.shuffled(tasks, config.train.seed, "tasks", epoch)[place])
    return chosen


def collect_groups(parts: Parts, step: int) -> list[TrajectoryGroup]:
    """Collect a step's groups; each episode ends with a tip by the policy that acted, if the memory would show it."""
    config = parts.config
    size, seed = config.collect.group_size, config.train.seed
    tasks = choose_tasks(parts.train_tasks, config, step)
    modes = draw_modes(
        config.modes.granularity,
        p=config.modes.p,
        q=config.modes.q,
        seed=seed,
        step=step,
        num_groups=len(tasks),
        group_size=size,
    )
    plans = [
        EpisodePlan(task=task, mode=modes[group][episode], key=EpisodeKey(step, group, episode))
        for group, task in enumerate(tasks)
        for episode in range(size)
    ]
    rules = CollectRules(
        purpose="train",
        seed=seed,
        temperature=config.collect.temperature,
        max_turns=config.env.max_turns,
        tip_tokens=config.memory.tip_tokens if config.modes.p > 0 else 0,
        tip_temperature=config.memory.tip_temperature,
        tip_min_score=-math.inf if config.memory.show_min_score is None else config.memory.show_min_score,
    )
    episodes = parts.collector.collect(plans, rules)
    return [
        TrajectoryGroup(task=task, trajectories=tuple(episodes[group * size : (group + 1) * size]))
        for group, task in enumerate(tasks)
    ]


def add_novelty(parts: Parts, groups: Sequence[TrajectoryGroup]) -> list[TrajectoryGroup]:
    """The groups with every turn's intrinsic reward, from the counts as they were when the step began."""
    if not parts.config.novelty.coefficient:
        return list(groups)

    def rewarded(group: TrajectoryGroup) -> TrajectoryGroup:
        trajectories = []
        for trajectory, visited in zip(group.trajectories, visited_states(parts, group), strict=True):
            rewards = parts.novelty.rewards(visited)
            turns = [replace(t, novelty=r) for t, r in zip(trajectory.turns, rewards, strict=True)]
            trajectories.append(replace(trajectory, turns=tuple(turns)))
        return replace(group, trajectories=tuple(trajectories))

    return [rewarded(group) for group in groups]


def visited_states(parts: Parts, group: TrajectoryGroup) -> list[Visited]:
    """The states that each episode of a group acted in."""
    scope = scope_of(group.task, parts.config.novelty.scope)
    states = [[turn.state for turn in trajectory.turns] for trajectory in group.trajectories]
    return [Visited(scope=scope, texts=texts, keys=parts.embedder.embed(texts)) for texts in states]


def remember(parts: Parts, groups: Sequence[TrajectoryGroup], step: int) -> None:
    """Store the step's tips and count its states, ordered by (group, episode, turn).

    States are counted where they earn nothing as well (novelty.coefficient = 0), so that exploration can be compared.
    """
    parts.memory.commit(step, [tip for group in groups for tip in new_tips(parts, group)])
    parts.novelty.commit(step, [visited for group in groups for visited in visited_states(parts, group)])


def new_tips(parts: Parts, group: TrajectoryGroup) -> list[NewTip]:
    """Memory entries of a group: per turn under that turn's state, or one under the final state."""
    config = parts.config.memory
    scope = scope_of(group.task, config.scope)
    entries = []
    for trajectory in group.trajectories:
        if not trajectory.tip:
            continue
        places = [(turn, turn.state) for turn in trajectory.turns]
        if config.entries == "final":
            places = [(trajectory.turns[-1], trajectory.final_state)]
        keys = parts.embedder.embed([state for _, state in places])
        for index, ((turn, state), key) in enumerate(zip(places, keys, strict=True)):
            suffix = prompts.tip_suffix(trajectory, turn, config.suffix, final=config.entries == "final")
            entries.append(
                NewTip(
                    scope=scope,
                    key=key,
                    state=state,
                    text=prompts.stored_tip(trajectory.tip, suffix, trajectory.score),
                    score=trajectory.score,
                    source=trajectory.key,
                    turn=index,
                )
            )
    return entries


def record_evaluation(parts: Parts, run: RunFolder, observer: Observer, step: int) -> dict[str, Any]:
    result = evaluate(parts, parts.config)
    run.append_evaluation({"step": step, **result})
    observer.evaluated(step, result)
    return result


def save(parts: Parts, run: RunFolder, step: int, version: int) -> None:
    """Write a checkpoint, then drop rows of memory that no kept checkpoint needs."""
    learner = parts.learner
    assert learner is not None

    def write(folder: Any) -> None:
        learner.model.save_pretrained(folder / "model")
        parts.tokenizer.save_pretrained(folder / "model")
        save_file(learner.optimizer_tensors(), folder / "optimizer.safetensors")

    run.save_checkpoint(
        step,
        version,
        write,
        digests={"memory": parts.memory.digest(), "novelty": parts.novelty.digest()},
        keep=parts.config.train.keep_checkpoints,
        extra={"skipped_in_a_row": learner.skipped_in_a_row, "threads": torch.get_num_threads()},
    )
    parts.memory.prune(run.checkpoints()[0].step)


def resume(parts: Parts, run: RunFolder) -> tuple[int, int]:
    """Bring every owner of state, and the run's files, to the last checkpoint; its step and policy version.

    Without a checkpoint that is the beginning. Raises CheckpointError if a file or a row is not as it was saved.
    """
    found = run.checkpoints()
    done = max((line["step"] for line in run.metrics()), default=0)
    if not found and done and (run.checkpoints_deleted() or done > parts.config.train.checkpoint_every):
        raise CheckpointError(
            f"{run.path} ran {done} steps but holds no checkpoint any more, so it cannot go on; start a new run"
        )
    step, version = (found[-1].step, found[-1].policy_version) if found else (0, 0)
    parts.memory.rewind(step)
    parts.novelty.rewind(step)
    run.cut_back(step if found else -1)  # without a checkpoint the evaluation before training goes as well
    if found:
        checkpoint, learner = found[-1], parts.learner
        assert learner is not None
        checkpoint.verify()
        state = checkpoint.state()
        for name, owner in (("memory", parts.memory), ("novelty", parts.novelty)):
            if owner.digest() != state["sha256"][name]:
                raise CheckpointError(f"{run.store} does not hold the {name} of {checkpoint.folder}; it was changed")
        learner.load(load_file(checkpoint.model / "model.safetensors"), load_file(checkpoint.optimizer))
        learner.skipped_in_a_row = state["skipped_in_a_row"]
        parts.collector.sampler.load_weights(learner.weights(), version)
    return step, version
