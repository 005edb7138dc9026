"""Worked examples: which solved episodes stand in a task's prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from empo2.envs.base import Suite
from empo2.envs.pool import EnvironmentPool
from empo2.errors import ConfigError
from empo2.types import Task, WorkedExample


@dataclass(frozen=True)
class WorkedExamples:
    """Solved episodes by task name; a prompt shows the first ``count`` that are not of its own variation."""

    count: int
    by_name: dict[str, tuple[tuple[Task, WorkedExample], ...]]

    def of(self, task: Task) -> tuple[WorkedExample, ...]:
        others = [example for source, example in self.by_name.get(task.name, ()) if source != task]
        return tuple(others[: self.count])


def gather(
    suite: Suite, pool: EnvironmentPool, trained: Sequence[Task], *, count: int, max_turns: int
) -> WorkedExamples:
    """Have the environment solve train variations that are not trained on, the last ones first.

    Episodes of more than ``max_turns`` turns are taken only if there are no shorter ones among those tried. Task names
    with too few other variations (ScienceWorld's identify-life-stages-2 has four) also use trained ones; none is ever
    shown its own solution. Raises ConfigError where there are too few all the same.
    """
    found = {}
    for name in dict.fromkeys(task.name for task in trained):
        tasks = [Task(environment=suite.name, name=name, variation=v) for v in suite.variations(name, "train")]
        others = [task for task in reversed(tasks) if task not in trained][: 4 * count]
        solved = _solved(pool, others, count, max_turns)
        if len(solved) < count:
            own = [task for task in tasks if task in trained]
            solved += _solved(pool, own, count + 1 - len(solved), max_turns)
        found[name] = tuple(solved)
    examples = WorkedExamples(count, found)
    for task in trained:
        if (got := len(examples.of(task))) < count:
            raise ConfigError(
                f"{task} can be shown {got} worked episodes of other train variations, prompt.examples asks for "
                f"{count}; lower prompt.examples"
            )
    return examples


def _solved(
    pool: EnvironmentPool, tasks: Sequence[Task], count: int, max_turns: int
) -> list[tuple[Task, WorkedExample]]:
    """Up to ``count`` solved tasks, those within ``max_turns`` first."""
    short: list[tuple[Task, WorkedExample]] = []
    long: list[tuple[Task, WorkedExample]] = []
    for task in tasks:
        if len(short) == count:
            break
        example = pool.worked_example(task)
        if example is not None:
            (short if len(example.turns) <= max_turns else long).append((task, example))
    return (short + long)[:count]
