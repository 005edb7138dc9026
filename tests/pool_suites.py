"""Playing environments, their processes, and environments that fail in known ways (test_pool.py).

A module of its own so that spawned workers can import it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empo2.errors import EnvironmentCrashed
from empo2.types import Task


def play(environment: Any, task: Task, actions: Sequence[str], seed: int = 0) -> list:
    """Everything that an environment answers, until the episode ends."""
    answers: list = [environment.reset(task, seed)]
    for action in actions:
        answers.append(environment.step(action))
        if answers[-1][2]:
            break
    return answers


class Unpicklable(Exception):
    """Pickles, but cannot be made again from what was pickled."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class FaultyEnvironment:
    """Repeats what it was told so far. `die`, `hang` and `crash` do so always, `die once` the first time only.

    ``info`` holds the process id, which differs in every replay and is no part of the contract. Under the task name
    `pid` it stands in the observation, so that no replay equals the record.
    """

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        self.task, self.said = task, [f"{task.variation}/{seed}"]
        return self._observation(), self._info()

    def step(self, action: str) -> Any:
        fault, _, once = action.partition(" ")
        if not once or self._first(action):
            self._fail(fault)
        self.said.append(action)
        if fault == "four":
            return self._observation(), 0.0, False, self._info()
        reward = float("nan") if fault == "nan" else len(self.said)
        return self._observation(), reward, fault == "end", False, self._info()

    def close(self) -> None:
        (self.marks / f"closed-{os.getpid()}").touch()

    def _observation(self) -> str:
        return " ".join([*self.said, *([str(os.getpid())] if self.task.name == "pid" else [])])

    def _info(self) -> dict[str, Any]:
        return {"state": self.said[-1], "pid": os.getpid()}

    def _first(self, action: str) -> bool:
        mark = self.marks / f"{action}-{self.task.variation}"
        first = not mark.exists()
        mark.touch()
        return first

    def _fail(self, fault: str) -> None:
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(600)
        if fault == "crash":
            raise EnvironmentCrashed("the simulator said goodbye")
        if fault == "err":
            raise LookupError("a bug in the environment's own code")
        if fault == "odd":
            raise Unpicklable(code=7)


class SolvingEnvironment(FaultyEnvironment):
    """The same with worked examples; the variation says what happens."""

    def worked_example(self, task: Task) -> Any:
        if task.variation == 1:
            raise AttributeError("a bug in worked_example")
        self.reset(task, 0)
        if task.variation == 2 and self._first("example"):
            self._fail("die")
        return f"example of {task}"


@dataclass(frozen=True)
class FaultySuite:
    marks: Path  #: folder for what must be remembered beyond a process
    per_worker: int = 1
    solves: bool = False
    name: str = "faulty"

    def task_names(self) -> tuple[str, ...]:
        return ("plain", "pid")

    def variations(self, task_name: str, split: str) -> tuple[int, ...]:
        return (0, 1, 2)

    def instructions(self) -> str:
        return ""

    def check(self) -> None:
        pass

    def open(self) -> FaultyEnvironment:
        return (SolvingEnvironment if self.solves else FaultyEnvironment)(self.marks)


def processes() -> dict[int, tuple[int, str]]:
    """Process id → (parent's id, command) of all live processes; zombies are dead."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=3) for line in listing.stdout.splitlines()]
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")}


def children(pid: int, command: str = "") -> set[int]:
    """The live children of a process whose command line holds ``command``."""
    return {child for child, (parent, line) in processes().items() if parent == pid and command in line}


def wait_until_gone(pids: Collection[int], seconds: float) -> set[int]:
    """The processes that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes().keys() & set(pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return set(left)
