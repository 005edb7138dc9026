"""Rows of rooms of which only one way leads through: hard exploration in small, its difficulty exactly known.

Every room has the same three doors. In a *lock*, one of them leads to the next room and the others to a dead end, where
the episode is over: getting further is something new. In a *maze*, every door leads on, and only behind the last
room it shows whether the whole way was right: nothing new is seen on the way, and only memory helps. The end of the
right way scores 1. Doors taken at random find it in 1 of 3ⁿ episodes: with 2 rooms 11 %, with 4
rooms 1.2 %, with 6 rooms 0.14 %.
Which doors are right is another secret in each variation, so that nothing but the house's own experience helps.
"""

import random
from typing import Any

from empo2.envs.base import Split
from empo2.types import Task

ROOMS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
#: Task name → number of rooms.
SIZES = {f"{kind}-{rooms}": rooms for kind in ("lock", "maze") for rooms in range(1, len(ROOMS) + 1)}
#: Material of a house → the doors of each of its rooms. A variation's house is number variation % 4 of these.
HOUSES = {
    "wood": ("oak", "elm", "ash"),
    "stone": ("slate", "flint", "chalk"),
    "metal": ("iron", "tin", "zinc"),
    "cloth": ("silk", "wool", "felt"),
}
_FIRST: dict[Split, int] = {"train": 0, "dev": 10_000, "test": 20_000}
_COUNT = 1000


def way_out(rooms: int, variation: int) -> tuple[str, tuple[str, ...]]:
    """The house of a variation and its right doors."""
    house = list(HOUSES)[variation % len(HOUSES)]
    rng = random.Random(f"lock/{rooms}/{variation}")
    return house, tuple(rng.choice(HOUSES[house]) for _ in range(rooms))


class LockEnvironment:
    """Actions: the name of a door."""

    done = True  #: no episode is under way

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        self.house, self.way = way_out(SIZES[task.name], task.variation)
        self.is_maze = task.name.startswith("maze")
        self.room, self.right, self.done = 0, True, False
        return self._look(), {"state": self._look(), "task": "Find the way out.", "actions": HOUSES[self.house]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.done:
            raise RuntimeError("step() after the episode ended; call reset() first")
        valid = action in HOUSES[self.house]
        if not valid:
            return "No such door.", 0.0, False, False, self._info(valid=False)
        self.right = self.right and action == self.way[self.room]
        self.room += 1
        self.done = self.room == len(self.way) or not (self.right or self.is_maze)
        out = self.done and self.right
        seen = "You are out." if out else "A dead end." if self.done else self._look()
        return seen, float(out), self.done, False, self._info(valid=True, state=seen, success=out)

    def close(self) -> None:
        pass

    def _info(self, *, valid: bool, state: str = "", success: bool = False) -> dict[str, Any]:
        actions = () if self.done else HOUSES[self.house]
        return {"state": state or self._look(), "valid": valid, "success": success, "actions": actions}

    def _look(self) -> str:
        return f"You are in room {ROOMS[self.room]}. Doors: {', '.join(HOUSES[self.house])}."


class LockSuite:
    """Locks and mazes of eight sizes, 1,000 variations a split."""

    name = "lock"
    per_worker = 64

    def task_names(self) -> tuple[str, ...]:
        return tuple(SIZES)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        return tuple(range(_FIRST[split], _FIRST[split] + _COUNT))

    def instructions(self) -> str:
        return "Reply with one door."

    def check(self) -> None:
        pass

    def open(self) -> LockEnvironment:
        return LockEnvironment()
