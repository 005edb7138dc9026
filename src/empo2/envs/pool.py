"""Environments in worker processes, one per live episode ("slot").

A worker that dies, or whose call outruns the time limit, is replaced: each of its episodes is reset with the same task
and seed, its recorded actions are replayed, and the episode goes on where it was. If the replay differs from the
record, `receive` raises EpisodeDiverged and the episode must be begun again.
"""

import multiprocessing
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from empo2.envs.base import Suite
from empo2.errors import EnvironmentCrashed, EpisodeDiverged
from empo2.types import Environment, StepResult, Task, WorkedExample

MAX_ATTEMPTS = 3  #: times a call is tried, each on a fresh worker, before giving up


def _serve(connection: Connection, suite: Suite) -> None:
    """A worker: answers (slot, method, arguments) with (slot, result) or (slot, exception)."""
    environments: dict[int, Environment] = {}
    try:
        while True:
            slot, method, arguments = connection.recv()
            try:
                if slot not in environments:
                    environments[slot] = suite.open()
                answer: Any = getattr(environments[slot], method)(*arguments)
            except EnvironmentCrashed:
                raise
            except Exception as error:  # crosses the process border, raised again by `_receive`
                error.add_note(traceback.format_exc())
                answer = error
            connection.send((slot, answer))
    except (EOFError, KeyboardInterrupt, EnvironmentCrashed):
        pass
    finally:
        for environment in environments.values():
            environment.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    answers: dict[int, Any] = field(default_factory=dict)


@dataclass
class _Episode:
    """What is needed to bring a slot's episode back."""

    task: Task
    seed: int
    actions: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)


@dataclass
class PoolCounters:
    """Faults since the pool was opened."""

    crashes: int = 0  #: workers that died
    timeouts: int = 0  #: calls that outran the limit
    replays: int = 0  #: episodes brought back by replaying their actions
    divergences: int = 0  #: replays that differed from the record


class EnvironmentPool:
    """``num_slots`` live environments of one suite. `start_reset`/`start_step` return at once, `receive_*` wait."""

    def __init__(self, suite: Suite, num_slots: int, *, call_timeout_s: float = 60.0) -> None:
        suite.check()
        self.num_slots = num_slots
        self.counters = PoolCounters()
        self._suite = suite
        self._timeout_s = call_timeout_s
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}
        self._episodes: dict[int, _Episode] = {}

    def start_reset(self, slot: int, task: Task, seed: int) -> None:
        self._episodes[slot] = _Episode(task, seed)
        self._send(slot, "reset", (task, seed))

    def receive_reset(self, slot: int) -> tuple[str, dict[str, Any]]:
        answer: tuple[str, dict[str, Any]] = self._receive(slot, "reset")
        self._episodes[slot].answers.append(answer)
        return answer

    def start_step(self, slot: int, action: str) -> None:
        self._episodes[slot].actions.append(action)
        self._send(slot, "step", (action,))

    def receive_step(self, slot: int) -> StepResult:
        """The result of the slot's pending action. Raises EpisodeDiverged after a replay that differed."""
        answer = self._receive(slot, "step")
        self._episodes[slot].answers.append(answer)
        observation, reward, terminated, truncated, info = answer
        return StepResult(
            observation=observation, reward=float(reward), terminated=terminated, truncated=truncated, info=info
        )

    def worked_example(self, task: Task) -> WorkedExample | None:
        """Ask slot 0 for a solved episode; only between episodes. None if the environment has none to offer."""
        self._episodes.pop(0, None)
        self._send(0, "worked_example", (task,))
        try:
            example: WorkedExample | None = self._receive(0, "worked_example", task)
        except AttributeError:
            return None
        return example

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        for worker in self._workers.values():
            worker.connection.close()
        for worker in self._workers.values():
            worker.process.join(5)
            _end(worker.process)
        self._workers.clear()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _worker(self, slot: int) -> _Worker:
        index = slot // self._suite.per_worker
        if index not in self._workers:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, self._suite), daemon=True)
            process.start()
            theirs.close()
            self._workers[index] = _Worker(process, ours)
        return self._workers[index]

    def _send(self, slot: int, method: str, arguments: tuple[Any, ...]) -> None:
        worker = self._worker(slot)
        worker.answers.pop(slot, None)
        try:
            worker.connection.send((slot, method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            pass  # `_receive` finds the worker dead and brings it back

    def _receive(self, slot: int, method: str, *arguments: Any) -> Any:
        for attempt in range(MAX_ATTEMPTS):
            try:
                if attempt:
                    self._restart(slot, method, arguments)
                answer = self._wait(slot)
                break
            except EnvironmentCrashed:
                continue
        else:
            raise EnvironmentCrashed(
                f"{self._suite.name} failed {MAX_ATTEMPTS} times in a row at {method} of {self._episodes.get(slot)}; "
                "`empo2 doctor` says whether its runtime is in order, env.call_timeout_s sets the time limit"
            )
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _wait(self, slot: int) -> Any:
        """The slot's next answer; raises EnvironmentCrashed if the worker died or the time is up."""
        worker = self._worker(slot)
        deadline = time.monotonic() + self._timeout_s
        while slot not in worker.answers:
            try:
                if not worker.connection.poll(max(deadline - time.monotonic(), 0)):
                    self.counters.timeouts += 1
                    raise EnvironmentCrashed("time limit")
                answered, answer = worker.connection.recv()
            except (EOFError, OSError):
                self.counters.crashes += 1
                raise EnvironmentCrashed("worker died") from None
            worker.answers[answered] = answer
        return worker.answers.pop(slot)

    def _restart(self, slot: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Replace the slot's worker and bring back all episodes it held."""
        index = slot // self._suite.per_worker
        worker = self._workers.pop(index, None)
        if worker is not None:
            worker.connection.close()
            _end(worker.process)
        for held in range(index * self._suite.per_worker, (index + 1) * self._suite.per_worker):
            if held in self._episodes:
                self._bring_back(held)
        if slot not in self._episodes:
            self._send(slot, method, arguments)

    def _bring_back(self, slot: int) -> None:
        """Replay a slot's record in its fresh worker and leave its pending call, if any, under way."""
        episode = self._episodes[slot]
        calls: list[tuple[str, tuple[Any, ...]]] = [("reset", (episode.task, episode.seed))]
        calls += [("step", (action,)) for action in episode.actions]
        for (method, arguments), recorded in zip(calls, episode.answers, strict=False):
            self._send(slot, method, arguments)
            if self._wait(slot) != recorded:
                self.counters.divergences += 1
                message = f"{episode.task}: a replay in a fresh environment differs at {arguments}"
                self._worker(slot).answers[slot] = EpisodeDiverged(message)
                return
        self.counters.replays += bool(episode.answers)
        if len(calls) > len(episode.answers):
            self._send(slot, *calls[len(episode.answers)])


def _end(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join()
