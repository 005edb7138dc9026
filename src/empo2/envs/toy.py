"""A small house to explore: tests, the smoke recipe, and a model for writing an environment of your own.

Rooms are joined by doors in four directions; one holds the coin. Which doors exist and where the coin lies depend on
the variation only. The score is 100 for taking the coin and 0 before; names are single common words.
"""

import random
import re
from typing import Any

from empo2.envs.base import Split, replayed
from empo2.types import Task, WorkedExample

ROOMS = ("hall", "kitchen", "attic", "cellar", "garden", "study", "porch", "tower")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}
SIZES = {"coin-3": 3, "coin-5": 5, "coin-8": 8}  #: task name → number of rooms


def build_map(num_rooms: int, variation: int) -> tuple[dict[str, dict[str, str]], str, str]:
    """Doors {room: {direction: room}}, the start room and the coin's room; a tree grown from the variation."""
    rng = random.Random(f"toy/{num_rooms}/{variation}")
    rooms = rng.sample(ROOMS, num_rooms)
    doors: dict[str, dict[str, str]] = {room: {} for room in rooms}
    for index, room in enumerate(rooms[1:], start=1):
        free = [(r, d) for r in rooms[:index] for d in DIRECTIONS if d not in doors[r]]
        parent, direction = rng.choice(free)
        doors[parent][direction] = room
        doors[room][DIRECTIONS[direction]] = parent
    return doors, rooms[0], rooms[-1]


class ToyEnvironment:
    """Actions: `go north|south|east|west`, `take coin`, `look`; the first word known counts, as in old text games."""

    done = True  #: no episode is under way

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        self.doors, self.room, self.coin = build_map(SIZES[task.name], task.variation)
        self.done = False
        return self._look(), {"state": self._look(), "task": "Find the coin and take it."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            raise RuntimeError("step() after the episode ended; call reset() first")
        known = re.search("north|south|east|west|take|look", action.lower())
        verb = known.group() if known else ""
        valid, reward = True, 0.0
        if verb in self.doors[self.room]:
            self.room = self.doors[self.room][verb]
            observation = self._look()
        elif verb == "take" and self.room == self.coin:
            self.done, reward = True, 100.0
            observation = "You take the coin."
        elif verb == "look":
            observation = self._look()
        else:
            valid, observation = False, "You cannot do that."
        return observation, reward, self.done, False, {"state": self._look(), "valid": valid, "success": self.done}

    def close(self) -> None:
        pass

    def worked_example(self, task: Task) -> WorkedExample | None:
        """The shortest way to the coin."""
        self.reset(task, 0)
        way = self._way(self.room, self.coin)
        return replayed(self, task, [*(f"go {direction}" for direction in way), "take coin"])

    def _way(self, start: str, goal: str, came_from: str = "") -> list[str]:
        for direction, room in self.doors[start].items():
            if room == goal:
                return [direction]
            if room != came_from and (rest := self._way(room, goal, start)):
                return [direction, *rest]
        return []

    def _look(self) -> str:
        coin = " A coin lies here." if self.room == self.coin and not self.done else ""
        return f"You are in the {self.room}. Doors: {', '.join(self.doors[self.room])}.{coin}"


class ToySuite:
    """Three sizes, 100 variations each."""

    name = "toy"
    per_worker = 64

    def task_names(self) -> tuple[str, ...]:
        return tuple(SIZES)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        first, last = {"train": (0, 60), "dev": (60, 80), "test": (80, 100)}[split]
        return tuple(range(first, last))

    def instructions(self) -> str:
        return "You explore a house. Reply with one action: go north, go south, go east, go west, take coin, look."

    def check(self) -> None:
        pass

    def open(self) -> ToyEnvironment:
        return ToyEnvironment()
