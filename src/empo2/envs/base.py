"""What an environment offers besides `Environment` (types.py): its tasks, splits, instructions and worked examples."""

from collections.abc import Iterable
from typing import Any, Literal, Protocol, get_args

from empo2.config import nearest
from empo2.errors import ConfigError
from empo2.types import Environment, Task, WorkedExample

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Suite(Protocol):
    """All tasks of one environment. Cheap to make, picklable; `open` runs in a worker process."""

    @property
    def name(self) -> str: ...

    @property
    def per_worker(self) -> int:
        """Environments that one worker process may hold; 1 where each starts a process of its own."""
        ...

    def task_names(self) -> tuple[str, ...]: ...

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]: ...

    def instructions(self) -> str:
        """The system message: how to act here."""
        ...

    def check(self) -> None:
        """Raise MissingPart if something needed to open an environment is not there."""
        ...

    def open(self) -> Environment: ...


class HasWorkedExamples(Protocol):
    """An environment that can solve its own tasks."""

    def worked_example(self, task: Task) -> WorkedExample | None: ...


def replayed(environment: Environment, task: Task, actions: Iterable[str]) -> WorkedExample:
    """A worked example: the episode in which these actions are done."""
    observation, info = environment.reset(task, 0)
    turns = []
    for action in actions:
        turns.append((observation, action))
        observation = environment.step(action)[0]
    return WorkedExample(task_text=info["task"], turns=tuple(turns))


class HasAbout(Protocol):
    """A suite whose tasks depend on files or seeds that its name doesn't tell."""

    def about(self) -> dict[str, Any]:
        """What tells them apart, in plain values: written into every run's run.json."""
        ...


def about(suite: Suite) -> dict[str, Any]:
    """What the suite's tasks depend on besides its name; empty if nothing."""
    told: dict[str, Any] = suite.about() if hasattr(suite, "about") else {}
    return told


SUITES = ("scienceworld", "webshop", "textworld-express", "lock", "toy")


def suite(name: str, **options: Any) -> Suite:
    """The suite of a built-in environment. ``options``: see its class. Raises ConfigError for an unknown name."""
    if name == "scienceworld":
        from empo2.envs.scienceworld import ScienceWorldSuite

        return ScienceWorldSuite(**options)
    if name == "webshop":
        from empo2.envs.webshop.environment import WebShopSuite

        return WebShopSuite(**options)
    if name == "textworld-express":
        from empo2.envs.textworld_express import TextWorldExpressSuite

        return TextWorldExpressSuite(**options)
    if name == "lock":
        from empo2.envs.lock import LockSuite

        return LockSuite(**options)
    if name == "toy":
        from empo2.envs.toy import ToySuite

        return ToySuite(**options)
    raise ConfigError(f"there is no environment {name!r}; known: {', '.join(SUITES)}; set env.name")


def check_tasks(suite: Suite, task_names: tuple[str, ...]) -> None:
    """Raise ConfigError for a task that the suite does not have."""
    known = suite.task_names()
    for name in task_names:
        if name not in known:
            raise ConfigError(f"{suite.name} has no task {name!r}; {nearest(name, known)} `empo2 envs` lists all")
