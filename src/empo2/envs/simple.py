"""A suite out of an environment's class: what an own environment needs beside `reset`, `step` and `close`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from empo2.envs.base import SPLITS, Split
from empo2.errors import ConfigError
from empo2.types import Environment, Task


@dataclass(frozen=True, kw_only=True)
class SimpleSuite:
    """Environments that ``make()`` opens, with variations numbered through the splits.

    ``make`` is a class or a function at a module's top level, so that worker processes find it. Its environment may do
    without guarding its own end: a step after the end raises, and a second `close` does nothing.
    """

    name: str
    make: Callable[[], Environment]
    instructions_text: str  #: the system message: how to act
    tasks: tuple[str, ...] = ("default",)
    train: int = 1000  #: variations of each task
    dev: int = 100
    test: int = 100
    per_worker: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            raise ConfigError(f"tasks = {self.tasks!r} of {self.name} must be several names: write ({self.tasks!r},)")

    def task_names(self) -> tuple[str, ...]:
        return self.tasks

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        sizes = (self.train, self.dev, self.test)
        first = sum(sizes[: SPLITS.index(split)])
        return tuple(range(first, first + sizes[SPLITS.index(split)]))

    def instructions(self) -> str:
        return self.instructions_text

    def check(self) -> None:
        pass

    def open(self) -> Environment:
        return Guarded(self.make())


class Guarded:
    """An environment that refuses steps after the end, and is closed once."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._over = True
        self._closed = False

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        first = self._environment.reset(task, seed)
        self._over = False
        return first

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._over:
            raise RuntimeError("step() after the episode ended; call reset() first")
        answer = self._environment.step(action)
        self._over = bool(answer[2] or answer[3])
        return answer

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._environment.close()

    def __getattr__(self, name: str) -> Any:
        """What else the environment offers, `worked_example` above all."""
        return getattr(self._environment, name)
