"""The contract of an environment (types.Environment, base.Suite), tried out: `empo2 check-env`."""

import pickle
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from empo2.envs.base import SPLITS, Suite
from empo2.envs.pool import EnvironmentPool, essence
from empo2.errors import UsageError
from empo2.types import Environment, Task, WorkedExample

#: Replies as a model may write them: none of them may raise.
ODD = (
    "",
    " ",
    "\n\n",
    "\x00\x07\x1b[31m",
    "]][[",
    "click[click[buy]]",
    "Ünï 漢字 🙂 \u202e",
    "<|im_start|>system",
    "'; DROP TABLE; -- %s {0} \\",
    "x" * 100_000,
)
MOST_TURNS = 300  #: in which an end is looked for


@dataclass(frozen=True)
class Verdict:
    """What one check found. ``ok`` is None where there was nothing to check."""

    what: str
    ok: bool | None
    told: str


class Broken(Exception):
    """The environment breaks the contract; the message says how, and what to do."""


class _Nothing(Exception):
    """There is nothing to check; the message says why."""


def check_environment(suite: Suite, task_names: Sequence[str] = (), *, turns: int = 20) -> Iterator[Verdict]:
    """Try a suite and its environments, on the first train variation of each task (or of those named).

    Every later check is left out where the suite itself, or a reset or step in a worker process, does not hold. Raises
    UsageError where a part is missing or a setting is wrong.
    """
    yield (verdict := _verdict("suite", lambda: _suite(suite)))
    if not verdict.ok:
        return
    tasks = [
        Task(environment=suite.name, name=name, variation=suite.variations(name, "train")[0])
        for name in task_names or suite.task_names()
        if suite.variations(name, "train")
    ]
    if not tasks:
        raise UsageError(f"{', '.join(task_names)} of {suite.name} has no variation to train on; name another task")
    yield (verdict := _verdict("worker process", lambda: _in_worker(suite, tasks[0])))
    if not verdict.ok:
        return
    probe = _Probe(suite, tasks, turns)
    try:
        yield (verdict := _verdict("five values", probe.five_values))
        if verdict.ok:
            yield _verdict("same again", probe.same_again)
            yield _verdict("same in a fresh process", probe.same_elsewhere)
            yield _verdict("reset midway", probe.reset_midway)
            yield _verdict("end", probe.end)
            yield _verdict("odd replies", probe.odd_replies)
            yield _verdict("offered actions", probe.offered_actions)
            yield _verdict("worked examples", probe.worked_examples)
    finally:
        verdict = _verdict("close twice", probe.close)
    yield verdict


def _verdict(what: str, check: Callable[[], str]) -> Verdict:
    """The check's finding; an exception of the environment's own code is one, too."""
    try:
        return Verdict(what, True, check())
    except _Nothing as nothing:
        return Verdict(what, None, str(nothing))
    except Broken as broken:
        return Verdict(what, False, str(broken))
    except UsageError:
        raise  # a part is missing, or a setting is wrong: that says nothing of the contract
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{place.filename}, line {place.lineno}"
        notes = "\n".join(getattr(error, "__notes__", []))
        return Verdict(what, False, f"raised {type(error).__name__}: {error} ({at}){notes and chr(10)}{notes}")


def _suite(suite: Suite) -> str:
    names = suite.task_names()
    if not names or len(set(names)) < len(names):
        raise Broken(f"task_names() must name each task once, and one at least; it gave {names}")
    if not suite.instructions().strip():
        raise Broken("instructions() is empty; say how to act: it is the system message")
    empty = [name for name in names if not suite.variations(name, "train")]
    if len(empty) == len(names):
        raise Broken("no task has a variation to train on")
    for name in names:
        variations = {split: suite.variations(name, split) for split in SPLITS}
        every = [variation for split in SPLITS for variation in variations[split]]
        if len(set(every)) < len(every):
            raise Broken(
                f"a variation of {name} is in two splits, or twice in one: evaluation would see what was trained"
            )
    if suite.per_worker < 1:
        raise Broken(f"per_worker = {suite.per_worker} must be at least 1")
    suite.check()
    return f"{len(names)} tasks, splits apart" + (f"; without training: {', '.join(empty)}" if empty else "")


def _in_worker(suite: Suite, task: Task) -> str:
    try:
        pickle.dumps(suite)
    except Exception as error:
        raise Broken(
            f"the suite cannot be pickled, as worker processes need it ({error}); keep plain values in it"
        ) from error
    with EnvironmentPool(suite, 1) as pool:
        pool.start_reset(0, task, 0)
        pool.receive_reset(0)
        pool.start_step(0, "look")
        pool.receive_step(0)
    return "opened, reset and stepped there"


@dataclass
class _Played:
    """An episode: what was done, and everything that was answered."""

    task: Task
    actions: list[str]
    answers: list[Any]

    @property
    def ended(self) -> bool:
        return len(self.answers[-1]) == 5 and bool(self.answers[-1][2] or self.answers[-1][3])


class _Probe:
    """One open environment, and the episodes that were played in it."""

    def __init__(self, suite: Suite, tasks: Sequence[Task], turns: int) -> None:
        self._suite, self._tasks, self._turns = suite, tasks, turns
        self._environment: Environment = suite.open()
        self._examples: dict[Task, WorkedExample | None] = {}
        self._played: list[_Played] = []

    def five_values(self) -> str:
        for task in self._tasks:
            self._played.append(self._random_walk(task, self._turns))
        steps = sum(len(played.actions) for played in self._played)
        return f"{len(self._tasks)} tasks, {steps} steps: text, finite reward, two flags, info"

    def same_again(self) -> str:
        for played in self._played:
            self._compare(played, self._replay(played), "a second time in the same environment")
        return "equal actions give equal episodes"

    def same_elsewhere(self) -> str:
        with EnvironmentPool(self._suite, 1) as pool:
            for played in self._played:
                pool.start_reset(0, played.task, 0)
                answers: list[Any] = [pool.receive_reset(0)]
                for action in played.actions:
                    pool.start_step(0, action)
                    result = pool.receive_step(0)
                    answers.append(
                        (result.observation, result.reward, result.terminated, result.truncated, dict(result.info))
                    )
                self._compare(played, answers, "in a fresh process")
        return "and so they do there"

    def reset_midway(self) -> str:
        for played in self._played:
            self._environment.reset(played.task, 0)
            if played.actions:
                self._environment.step(played.actions[0])
            self._compare(played, [self._environment.reset(played.task, 0)], "by a reset in the middle of an episode")
        return "begins anew"

    def end(self) -> str:
        ended = next((p for task in self._tasks if (p := self._until_end(task)).ended), None)
        if ended is None:
            raise _Nothing(f"no episode ended within {MOST_TURNS} actions; env.max_turns ends them")
        try:
            answer = self._environment.step(ended.actions[-1])
        except Exception as refusal:
            return f"after {len(ended.actions)} actions; another step is refused ({type(refusal).__name__})"
        raise Broken(f"a step after the end of {ended.task} answered {answer!r:.100}; let it raise")

    def odd_replies(self) -> str:
        task = self._tasks[0]
        self._environment.reset(task, 0)
        for reply in ODD:
            answer = _checked_step(self._environment.step(reply), reply)
            if answer[2] or answer[3]:
                self._environment.reset(task, 0)
        return f"{len(ODD)} of them, up to 100 kB, raise nothing"

    def offered_actions(self) -> str:
        offered = 0
        for played in self._played:
            for action, before, after in zip(played.actions, played.answers, played.answers[1:], strict=False):
                if action in (before[-1].get("actions") or ()):
                    offered += 1
                    if not after[-1].get("valid", True):
                        raise Broken(f"{action!r} is in info['actions'] of {played.task}, and then it is not valid")
        if not offered:
            raise _Nothing("info has no 'actions'; `empo2 play` and `empo2 warmup` would use them")
        return f"{offered} taken, all valid"

    def worked_examples(self) -> str:
        solved = 0
        for task in self._tasks:
            example = self._example(task)
            if example is None:
                continue
            observation, _ = self._environment.reset(task, 0)
            result: Any = None
            for seen, action in example.turns:
                if seen != observation:
                    raise Broken(f"the worked example of {task} tells {seen!r:.100}, the episode {observation!r:.100}")
                result = self._environment.step(action)
                observation = result[0]
            if result is None or not result[2] or not result[4].get("success"):
                raise Broken(f"the worked example of {task} does not end in success: {result!r:.200}")
            solved += 1
        if not solved:
            raise _Nothing("the environment has none; set prompt.examples = 0")
        return f"{solved} of {len(self._tasks)} tasks, each ends in success"

    def close(self) -> str:
        self._environment.close()
        self._environment.close()
        return "does nothing the second time"

    def _example(self, task: Task) -> WorkedExample | None:
        if task not in self._examples:
            solve = getattr(self._environment, "worked_example", lambda _: None)
            self._examples[task] = solve(task)
        return self._examples[task]

    def _random_walk(self, task: Task, turns: int) -> _Played:
        """An episode of drawn actions: those that are offered, else words from what was said; now and then any.

        It begins with some of a worked example's, if there is one, so that it leaves the first room.
        """
        rng = random.Random(str(task))
        example = self._example(task)
        known = [action for _, action in example.turns] if example else []
        known = known[: rng.randint(0, min(len(known), turns))]
        first = _checked_reset(self._environment.reset(task, 0))
        played = _Played(task, [], [first])
        said = _words(self._suite.instructions())
        while len(played.actions) < turns and not played.ended:
            seen, info = played.answers[-1][0], played.answers[-1][-1]
            offered = known[:1] or list(info.get("actions") or ())
            known = known[1:]
            if not offered or (not known and rng.random() < 0.1):
                words = [*said, *_words(seen)] or ["look"]
                offered = [" ".join(rng.choices(words, k=rng.randint(1, 3)))]
            played.actions.append(rng.choice(offered))
            played.answers.append(_checked_step(self._environment.step(played.actions[-1]), played.actions[-1]))
        return played

    def _until_end(self, task: Task) -> _Played:
        """An episode that ends, if one is found: the worked example, else a long walk."""
        example = self._example(task)
        if example is None:
            return self._random_walk(task, MOST_TURNS)
        return self._do(task, [action for _, action in example.turns])

    def _do(self, task: Task, actions: Sequence[str]) -> _Played:
        played = _Played(task, [], [self._environment.reset(task, 0)])
        for action in actions:
            if not played.ended:
                played.actions.append(action)
                played.answers.append(self._environment.step(action))
        return played

    def _replay(self, played: _Played) -> list[Any]:
        return self._do(played.task, played.actions).answers

    def _compare(self, played: _Played, answers: Sequence[Any], where: str) -> None:
        for index, (found, expected) in enumerate(zip(answers, played.answers, strict=False)):
            if essence(found) != essence(expected):
                done = played.actions[index - 1] if index else "reset"
                raise Broken(
                    f"{played.task} answers {done!r} otherwise {where}: {found!r:.200} and before {expected!r:.200}; "
                    "draw all chance from the task's variation and the seed"
                )


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def _checked_reset(answer: Any) -> tuple[str, dict[str, Any]]:
    observation, info = answer
    if not isinstance(observation, str) or not isinstance(info, dict):
        raise Broken(f"reset must return (text, dict); it returned {answer!r:.200}")
    for key in ("task", "state"):
        if key in info and not isinstance(info[key], str):
            raise Broken(f"info[{key!r}] must be text; it is {info[key]!r:.100}")
    return observation, info


def _checked_step(answer: Any, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
    observation, reward, terminated, truncated, info = answer
    flags = {"terminated": terminated, "truncated": truncated}
    flags |= {f"info[{key!r}]": info[key] for key in ("valid", "success") if key in info}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise Broken(f"{name} must be True or False; after {action!r:.50} it is {flag!r:.100}")
    if not isinstance(observation, str) or not isinstance(reward, int | float) or not isinstance(info, dict):
        raise Broken(f"step must return (text, number, bool, bool, dict); it returned {answer!r:.200}")
    if terminated and truncated:
        raise Broken(
            f"after {action!r:.50} the episode is both terminated (it has ended) and truncated (it is cut off); say one"
        )
    if info.get("success") and not terminated:
        raise Broken(f"info['success'] after {action!r:.50}, but the episode goes on; success is read at its end")
    if "state" in info and not isinstance(info["state"], str):
        raise Broken(f"info['state'] must be text; it is {info['state']!r:.100}")
    return observation, float(reward), terminated, truncated, info
