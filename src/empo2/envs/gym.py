"""Any `gymnasium` environment as text: observations are written out, replies are read as actions of its space.

`env.name = "gymnasium"` with `env.options = {id = "FrozenLake-v1", actions = ["left", "down", "right", "up"]}`.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from empo2.envs.base import Split
from empo2.envs.simple import Guarded
from empo2.errors import ConfigError, MissingPart
from empo2.types import Task

#: First seed of each split, of which each has 1,000.
SPLITS: dict[Split, int] = {"train": 0, "dev": 10_000, "test": 20_000}
GAMES = 1000


class GymnasiumEnvironment:
    """One environment. A variation is the seed of its `reset`, so that a task's episodes begin alike."""

    def __init__(self, suite: "GymnasiumSuite") -> None:
        import gymnasium

        try:
            self._inside = gymnasium.make(suite.id, **suite.kwargs)
        except (gymnasium.error.Error, TypeError) as error:
            raise ConfigError(f"gymnasium cannot make {suite.id!r} of {suite.kwargs}: {error}") from None
        self._suite = suite
        self._names = action_names(self._inside.action_space, suite.actions)
        self._enough = math.inf if suite.success_score is None else suite.success_score

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin the task's episode; ``seed`` changes nothing, as gymnasium has one seed for world and dice."""
        observation, _ = self._inside.reset(seed=task.variation)
        self._score = 0.0
        seen, self._state = self._text(observation), written(observation)
        self._seen = seen
        return seen, {"state": self._state, "task": self._suite.task, **self._offered(over=False)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        chosen = read_action(self._inside.action_space, action, self._names)
        if chosen is None:
            unknown = {"state": self._state, "valid": False, "success": False, **self._offered(over=False)}
            return f"No such action.\n{self._seen}", 0.0, False, False, unknown
        observation, gained, terminated, truncated, info = self._inside.step(chosen)
        reward = float(gained)
        self._score += reward
        seen, self._state = self._text(observation), written(observation)
        self._seen = seen
        terminated, truncated = bool(terminated), bool(truncated) and not terminated
        success = terminated and bool(info.get("success", info.get("is_success", self._score >= self._enough)))
        told = {"state": self._state, "valid": True, "success": success, **self._offered(over=terminated or truncated)}
        return seen, reward, terminated, truncated, told

    def close(self) -> None:
        self._inside.close()

    def _offered(self, *, over: bool) -> dict[str, Any]:
        return {"actions": () if over else self._names} if self._names else {}

    def _text(self, observation: Any) -> str:
        if self._suite.observation == "render":
            observation = self._inside.render()
            if not isinstance(observation, str):
                raise ConfigError(
                    f"render() of {self._suite.id} gives no text but {type(observation).__name__}; set kwargs = "
                    "{ render_mode = 'ansi' } in env.options, or observation = 'observation'"
                )
        return written(observation)


def written(observation: Any) -> str:
    """An observation as text, whole; what a terminal would show in colour stands in brackets."""
    if isinstance(observation, str):
        marked = re.sub(r"\x1b\[[0-9;]*m(.*?)\x1b\[0m", r"[\1]", observation, flags=re.DOTALL)
        return marked.strip()
    with numpy.printoptions(threshold=sys.maxsize):
        return str(_plain(observation))


def _plain(value: Any) -> Any:
    """Tuples, lists and mappings with Python's own numbers in them, which print without their types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value) if type(value) in (tuple, list) else str(value)
    return value.item() if isinstance(value, numpy.generic) else value


def action_names(space: Any, given: Sequence[str]) -> tuple[str, ...]:
    """Names of a Discrete space's actions: those given, or their numbers; none for actions that are read otherwise.

    Raises ConfigError where names do not fit the space, or its actions cannot be read from a line of text.
    """
    from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Text

    if isinstance(space, Discrete):
        names = tuple(given) or tuple(str(space.start + index) for index in range(space.n))
        if len({name.lower() for name in names}) != space.n:
            raise ConfigError(f"actions = {list(given)} in env.options must name each of the {space.n} actions once")
        return names
    if given:
        raise ConfigError(f"the actions of {space} have no names; leave actions out of env.options")
    if not isinstance(space, Text | Box | MultiDiscrete | MultiBinary):
        raise ConfigError(
            f"the actions of {space} cannot be read from text; wrap the environment so that its action space is Text, "
            "Discrete, MultiDiscrete, MultiBinary or Box"
        )
    return ()


def read_action(space: Any, text: str, names: Sequence[str]) -> Any | None:
    """What a reply means: a named action, the text itself, or numbers, blanks or commas between; None if nothing."""
    from gymnasium.spaces import Discrete, Text

    if isinstance(space, Text):
        return text if space.contains(text) else None
    if isinstance(space, Discrete):
        known = {name.lower(): space.start + index for index, name in enumerate(names)}
        return known.get(text.strip().lower())
    try:
        numbers = numpy.array([float(word) for word in text.replace(",", " ").split()]).reshape(space.shape)
    except ValueError:
        return None
    with numpy.errstate(invalid="ignore"):  # what is too large for the type is not equal below
        chosen = numbers.astype(space.dtype)
    exact = chosen.dtype.kind == "f" or numpy.array_equal(chosen, numbers)
    return chosen if exact and space.contains(chosen) else None


@dataclass(frozen=True, kw_only=True)
class GymnasiumSuite:
    """One task, named like the environment's id; 1,000 seeds a split."""

    id: str  #: as in `gymnasium.make`; `module:id` imports the module first
    kwargs: Mapping[str, Any] = field(default_factory=dict)  #: for `gymnasium.make`
    actions: Sequence[str] = ()  #: names of a Discrete space's actions, in order; else their numbers
    task: str = ""  #: the task's text, in the first turn
    instructions_text: str = "Reply with one action and nothing else."
    observation: str = "observation"  #: or "render": the text of `render()`, with kwargs = {render_mode = "ansi"}
    success_score: float | None = None  #: from which an episode that terminates is solved, where `info` doesn't say
    name: str = "gymnasium"
    per_worker: int = 64

    def task_names(self) -> tuple[str, ...]:
        return (self.id,)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        return tuple(range(SPLITS[split], SPLITS[split] + GAMES))

    def instructions(self) -> str:
        listed = f" Actions: {', '.join(self.actions)}." if self.actions else ""
        return self.instructions_text + listed

    def check(self) -> None:
        """Raise ConfigError, too, for an environment that cannot be made."""
        if importlib.util.find_spec("gymnasium") is None:
            raise MissingPart("gymnasium is not installed; run: pip install 'empo2[gymnasium]'")
        if self.observation not in ("observation", "render"):
            raise ConfigError(f"observation = {self.observation!r} in env.options is neither observation nor render")
        self.open().close()

    def open(self) -> Guarded:
        return Guarded(GymnasiumEnvironment(self))
