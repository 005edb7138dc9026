"""Environments in worker processes, one per live episode ("slot").

A worker that dies, or whose call outruns the time limit, is replaced: each of its episodes is reset with the same task
and seed, its recorded actions are replayed, and the episode goes on where it was. If the replay differs from the
record, `receive_*` raises EpisodeDiverged and the episode must be begun again.

An error in an environment's own code is no crash: it is raised here, its worker traceback added as a note.
"""

import contextlib
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

from empo2.envs.base import Suite
from empo2.errors import EnvironmentCrashed, EpisodeDiverged
from empo2.types import Environment, StepResult, Task, WorkedExample

MAX_ATTEMPTS = 3  #: times a call is tried, each on a fresh worker, before giving up
CLOSE_S = 5.0  #: seconds that workers have to end by themselves before `close` kills them
ORPHAN_S = 2.0  #: the same for workers whose parent was killed

_SHAPES = {"reset": "(observation, info)", "step": "(observation, reward, terminated, truncated, info)"}
_CONTRACT_KEYS = (
    "state",
    "valid",
    "success",
    "task",
    "actions",
    "offer",
)  #: of `info`; other keys may differ in a replay (times, say)


def _serve(connection: Connection, suite: Suite) -> None:
    """A worker: answers (slot, ticket, method, arguments) with (slot, ticket, result or exception)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may have a step to finish
    threading.Thread(target=_end_with_parent, daemon=True).start()
    environments: dict[int, Environment] = {}
    with contextlib.ExitStack() as opened, contextlib.suppress(EOFError, OSError):  # raised when the parent hangs up
        while True:
            slot, ticket, method, arguments = connection.recv()
            try:
                if slot not in environments:
                    environments[slot] = suite.open()
                    opened.callback(environments[slot].close)
                answer = _call(environments[slot], method, arguments)
            except Exception as error:  # crosses the process border, raised again by `_receive`
                error.add_note(f"In the environment's process:\n{traceback.format_exc()}")
                answer = error
            connection.send((slot, ticket, _portable(answer)))


def _call(environment: Environment, method: str, arguments: tuple[Any, ...]) -> Any:
    """The method's answer in plain values. Raises TypeError for a reset or step that breaks the contract."""
    if method == "worked_example" and not hasattr(environment, method):
        return None
    answer = getattr(environment, method)(*arguments)
    if method not in _SHAPES:
        return answer
    try:
        observation, *numbers, info = answer
        if method == "step":
            reward, terminated, truncated = numbers
            numbers = [float(reward), bool(terminated), bool(truncated)]
        if isinstance(observation, str) and all(map(math.isfinite, numbers)):
            return observation, *numbers, dict(info)
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"{type(environment).__name__}.{method} must return {_SHAPES[method]}, the observation a str and the reward "
        f"finite; it returned {answer!r:.300}"
    )


def _portable(answer: Any) -> Any:
    """The answer or, where pickle cannot bring it across, an exception that tells of it in words."""
    try:
        pickle.loads(pickle.dumps(answer))
    except Exception as problem:
        words = "".join(traceback.format_exception_only(answer)) if isinstance(answer, Exception) else repr(answer)
        error = RuntimeError(f"{words:.3000}\n(in words only, as it cannot be pickled: {problem})")
        answer = error
    return answer


def _end_with_parent() -> None:
    """End this worker after a killed parent even if it is stuck in a call; an idle worker ends by itself before."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(ORPHAN_S)
    os._exit(1)


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
    diverged: str = ""  #: how a replay differed; the episode is then over


@dataclass
class PoolCounters:
    """Faults since the pool was opened."""

    crashes: int = 0  #: workers, or simulators in them, that died
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
        self._tickets: dict[int, int] = {}  # the number of each slot's latest call: answers to earlier ones are dropped
        self._next_ticket = itertools.count()

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
        return StepResult(observation=observation, reward=reward, terminated=terminated, truncated=truncated, info=info)

    def answered(self, slots: Sequence[int]) -> list[int]:
        """Those of the slots whose answer is there; waits for the first. All, if none comes in time (or a worker died):
        `receive_*` then says so."""
        while not (there := [slot for slot in slots if slot in self._worker(slot).answers]):
            workers = {self._worker(slot).connection: self._worker(slot) for slot in slots}
            heard = multiprocessing.connection.wait(list(workers), self._timeout_s)
            try:
                for connection in heard:
                    self._take(workers[cast(Connection, connection)])
            except (EOFError, OSError):
                heard = []
            if not heard:
                return list(slots)
        return there

    def worked_example(self, task: Task) -> WorkedExample | None:
        """Ask slot 0 for a solved episode; only between episodes. None if the environment has none to offer."""
        self._episodes.pop(0, None)
        self._send(0, "worked_example", (task,))
        example: WorkedExample | None = self._receive(0, "worked_example", task)
        return example

    def warm(self, task: Task) -> None:
        """Start every slot's environment, all at once, by a reset, so that no timed step pays for it."""
        for slot in range(self.num_slots):
            self.start_reset(slot, task, 0)
        for slot in range(self.num_slots):
            self.receive_reset(slot)

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        for worker in self._workers.values():
            worker.connection.close()
        deadline = time.monotonic() + CLOSE_S
        for worker in self._workers.values():
            worker.process.join(max(deadline - time.monotonic(), 0))
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
        self._tickets[slot] = next(self._next_ticket)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `_receive` finds the worker dead
            worker.connection.send((slot, self._tickets[slot], method, arguments))

    def _receive(self, slot: int, method: str, *arguments: Any) -> Any:
        """The answer to the slot's call. A worker that fails is replaced, with all episodes it held."""
        episode = self._episodes.get(slot)
        for attempt in range(MAX_ATTEMPTS):
            try:
                if attempt:
                    self._restart(slot, method, arguments)
                if episode is not None and episode.diverged:
                    raise EpisodeDiverged(episode.diverged)
                answer = self._wait(slot)
                break
            except EnvironmentCrashed as crash:
                reason = crash
        else:
            task = episode.task if episode else arguments[0]
            action = f" ({episode.actions[-1]!r})" if episode and episode.actions else ""
            raise EnvironmentCrashed(
                f"{method}{action} of {task} failed {MAX_ATTEMPTS} times, each time in a fresh process: {reason}; "
                "`empo2 doctor` says whether the environment's runtime is in order"
            ) from reason
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _wait(self, slot: int) -> Any:
        """The slot's next answer; raises EnvironmentCrashed if the worker or its simulator died or the time is up."""
        worker = self._worker(slot)
        deadline = time.monotonic() + self._timeout_s
        while slot not in worker.answers:
            try:
                if not worker.connection.poll(max(deadline - time.monotonic(), 0)):
                    self.counters.timeouts += 1
                    raise EnvironmentCrashed(f"no answer within env.call_timeout_s = {self._timeout_s:g}")
                self._take(worker)
            except (EOFError, OSError):
                self.counters.crashes += 1
                worker.process.join(1)
                raise EnvironmentCrashed(f"its process ended with exit code {worker.process.exitcode}") from None
        answer = worker.answers.pop(slot)
        if isinstance(answer, EnvironmentCrashed):
            self.counters.crashes += 1
            raise answer
        return answer

    def _take(self, worker: _Worker) -> None:
        """Put one answer of a worker where it belongs; one to an earlier call is dropped."""
        slot, ticket, answer = worker.connection.recv()
        if ticket == self._tickets[slot]:
            worker.answers[slot] = answer

    def _restart(self, slot: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Replace the slot's worker and bring back all episodes it held."""
        index = slot // self._suite.per_worker
        worker = self._workers.pop(index)
        worker.connection.close()
        _end(worker.process)
        held = range(index * self._suite.per_worker, (index + 1) * self._suite.per_worker)
        for other in sorted(held, key=lambda other: other != slot):  # the asked one's answer before another's crash
            if other in self._episodes:
                self._bring_back(other)
        if slot not in self._episodes:
            self._send(slot, method, arguments)

    def _bring_back(self, slot: int) -> None:
        """Replay a slot's record in its fresh worker and leave its pending call, if any, under way."""
        episode = self._episodes[slot]
        if episode.diverged:
            return
        calls: list[tuple[str, tuple[Any, ...]]] = [("reset", (episode.task, episode.seed))]
        calls += [("step", (action,)) for action in episode.actions]
        for (method, arguments), recorded in zip(calls, episode.answers, strict=False):
            self._send(slot, method, arguments)
            if essence(self._wait(slot)) != essence(recorded):
                self.counters.divergences += 1
                episode.diverged = f"{episode.task}: a replay in a fresh environment differs at {method}{arguments}"
                return
        self.counters.replays += bool(episode.answers)
        if len(calls) > len(episode.answers):
            self._send(slot, *calls[len(episode.answers)])


def essence(answer: Any) -> Any:
    """What a replay must repeat of an answer."""
    if isinstance(answer, Exception):
        return answer
    *values, info = answer
    return values, [info.get(key) for key in _CONTRACT_KEYS]


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()
