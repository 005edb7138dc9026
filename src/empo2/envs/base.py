"""What an environment offers besides `Environment` (types.py): its tasks, splits, instructions and worked examples."""

import importlib
import inspect
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal, Protocol, get_args

from empo2.config import EnvConfig, nearest
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


def replayed(environment: Environment, task: Task, actions: Iterable[str]) -> WorkedExample | None:
    """A worked example: the episode in which these actions are done, up to its end; None if that is no success."""
    observation, first = environment.reset(task, 0)
    turns = []
    for action in actions:
        turns.append((observation, action))
        observation, _, terminated, truncated, info = environment.step(action)
        if terminated or truncated:
            solved = WorkedExample(task_text=str(first.get("task", "")), turns=tuple(turns))
            return solved if info.get("success") else None
    return None


class HasAbout(Protocol):
    """A suite whose tasks depend on files or seeds that its name doesn't tell."""

    def about(self) -> dict[str, Any]:
        """What tells them apart, in plain values: written into every run's run.json."""
        ...


def about(suite: Suite) -> dict[str, Any]:
    """What the suite's tasks depend on besides its name; empty if nothing."""
    told: dict[str, Any] = suite.about() if hasattr(suite, "about") else {}
    return told


#: Built-in environment → the class of its suite.
BUILT_IN = {
    "scienceworld": "empo2.envs.scienceworld:ScienceWorldSuite",
    "webshop": "empo2.envs.webshop.environment:WebShopSuite",
    "textworld-express": "empo2.envs.textworld_express:TextWorldExpressSuite",
    "lock": "empo2.envs.lock:LockSuite",
    "toy": "empo2.envs.toy:ToySuite",
    "gymnasium": "empo2.envs.gym:GymnasiumSuite",
}
ENTRY_POINTS = "empo2.environments"  #: group in which other packages name theirs
NEEDED = ("name", "per_worker", "task_names", "variations", "instructions", "check", "open")


class HasPanels(Protocol):
    """A suite whose tasks are known under common names, in groups."""

    def panels(self) -> dict[str, tuple[str, ...]]:
        """Name → tasks."""
        ...


def panels(suite: Suite) -> dict[str, tuple[str, ...]]:
    """Named groups of the suite's tasks; empty if it has none."""
    told: dict[str, tuple[str, ...]] = suite.panels() if hasattr(suite, "panels") else {}
    return told


def without_panels(env: EnvConfig) -> EnvConfig:
    """The settings with the tasks of named panels in place of their names."""
    known = panels(suite_of(env))
    named = (known.get(name, (name,)) for name in env.tasks)
    return replace(env, tasks=tuple(itertools.chain.from_iterable(named)))


def known_suites() -> dict[str, str]:
    """Environment → where its suite is (`module:attribute`): the built-in ones, then those of installed packages."""
    others = {point.name: point.value.split("[")[0].strip() for point in metadata.entry_points(group=ENTRY_POINTS)}
    return {**BUILT_IN, **{name: where for name, where in sorted(others.items()) if name not in BUILT_IN}}


def suite(name: str, **options: Any) -> Suite:
    """The suite of an environment: a known one, or `module:attribute` of one's own, which is looked for here first.

    The attribute is a suite, or a class or function that makes one of ``options``. Raises ConfigError.
    """
    where = name if ":" in name else known_suites().get(name, "")
    if not where:
        raise ConfigError(
            f"there is no environment {name!r}; known: {', '.join(known_suites())}; set env.name, to MODULE:ATTRIBUTE "
            "for one of your own"
        )
    found = _imported(where, here=name not in BUILT_IN)
    if callable(found):
        try:
            inspect.signature(found).bind(**options)
        except TypeError as error:
            raise ConfigError(f"{name} cannot be made of env.options = {options}: {error}") from None
        found = found(**options)
    elif options:
        raise ConfigError(f"{name} is a suite that is made already and takes no env.options; remove {options}")
    if lacking := [part for part in NEEDED if not hasattr(found, part)]:
        raise ConfigError(
            f"{where} is no environment suite: it has no {', '.join(lacking)}; `SimpleSuite` makes one of an "
            "environment's class"
        )
    made: Suite = found
    return made


def suite_of(env: EnvConfig) -> Suite:
    """The suite of a recipe's [env]. Raises ConfigError."""
    settings: dict[str, dict[str, Any]] = {
        "scienceworld": {
            "simplification": env.simplification,
            "observation": env.observation,
            "offer": env.offer,
            "correct_actions": env.correct_actions,
        },
        "webshop": {
            "catalogue": env.catalogue,
            "num_products": env.num_products,
            "seed": env.catalogue_seed,
            "page": env.page,
            "fixed_reward": env.fixed_reward,
            "show_attributes": env.show_attributes,
            "limit_goals": env.limit_goals,
        },
        "textworld-express": {"observation": env.observation, "tasks": env.tasks},
    }
    if env.options and env.name in settings:
        raise ConfigError(f"{env.name} has settings of its own ({', '.join(settings[env.name])}); empty env.options")
    return suite(env.name, **settings.get(env.name, env.options))


def _imported(where: str, *, here: bool) -> Any:
    """The attribute of `module:attribute`; ``here``: modules of the current folder are found first."""
    module, _, attribute = where.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ConfigError(f"{where!r} is no MODULE:ATTRIBUTE; set env.name")
    if here and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # worker processes are told of it
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it imports is not
        raise ConfigError(
            f"there is no module {module!r}, installed or in this folder ({os.getcwd()}); set env.name, or go to the "
            "folder where the run began"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"the module {module!r} has no {attribute!r}; set env.name to MODULE:ATTRIBUTE")
        found = getattr(found, part)
    return found


def check_tasks(suite: Suite, task_names: tuple[str, ...]) -> None:
    """Raise ConfigError for a task that the suite does not have."""
    known = suite.task_names()
    for name in task_names:
        if name not in known:
            raise ConfigError(f"{suite.name} has no task {name!r}; {nearest(name, known)} `empo2 envs` lists all")
