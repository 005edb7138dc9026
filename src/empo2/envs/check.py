"""The contract of an environment (types.Environment, base.Suite), tried out: `empo2 check-env`."""

import pickle
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from empo2.envs.base import SPLITS, Suite
from empo2.envs.pool import EnvironmentPool, essence
from empo2.errors import UsageError
from empo2.types import Task, WorkedExample

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
LARGEST_SEED = 2**32 - 1


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


def check_environment(
    suite: Suite, task_names: Sequence[str] = (), *, turns: int = 20, call_timeout_s: float = 60.0
) -> Iterator[Verdict]:
    """Try a suite and its environments, in worker processes as training has them, on each task (or those named).

    Every later check is left out where the suite itself, or a reset or step, does not hold. Raises UsageError where a
    part is missing or a setting is wrong.
    """
    yield (verdict := _verdict("suite", lambda: _suite(suite)))
    if not verdict.ok:
        return
    names = [name for name in task_names or suite.task_names() if suite.variations(name, "train")]
    if not names:
        raise UsageError(f"{', '.join(task_names)} of {suite.name} has no variation to train on; name another task")
    yield (verdict := _verdict("worker process", lambda: _pickles(suite)))
    if not verdict.ok:
        return
    with EnvironmentPool(suite, 2, call_timeout_s=call_timeout_s) as pool:
        probe = _Probe(suite, pool, names, turns)
        for name, check in (("every split", probe.every_split), ("five values", probe.five_values)):
            yield (verdict := _verdict(name, check))
            if not verdict.ok:
                return
        yield _verdict("same again", probe.same_again)
        yield _verdict("apart", probe.apart)
        yield _verdict("reset midway", probe.reset_midway)
        yield _verdict("end", probe.end)
        yield _verdict("odd replies", probe.odd_replies)
        yield _verdict("offered actions", probe.offered_actions)
        yield _verdict("worked examples", probe.worked_examples)
    with EnvironmentPool(suite, 1, call_timeout_s=call_timeout_s) as other:
        yield _verdict("same in a fresh process", lambda: probe.same_elsewhere(other))
    yield _verdict("close twice", lambda: _close_twice(suite, probe.tasks[0]))


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


@contextmanager
def _during(told: str) -> Iterator[None]:
    """Within, an exception of the environment's own code is told with what was tried."""
    try:
        yield
    except (Broken, UsageError):
        raise
    except Exception as error:
        raise Broken(f"{told} {type(error).__name__}: {error}") from error


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
        every = [variation for split in SPLITS for variation in suite.variations(name, split)]
        if len(set(every)) < len(every):
            raise Broken(f"a variation of {name} is in two splits, or twice in one: evaluation would see training")
    if suite.per_worker < 1:
        raise Broken(f"per_worker = {suite.per_worker} must be at least 1")
    suite.check()
    return f"{len(names)} tasks, splits apart" + (f"; without training: {', '.join(empty)}" if empty else "")


def _pickles(suite: Suite) -> str:
    try:
        pickle.loads(pickle.dumps(suite))
    except Exception as error:
        raise Broken(
            f"the suite cannot be pickled, as worker processes need it ({error}); keep plain values in it"
        ) from error
    return "the suite can be sent there"


def _close_twice(suite: Suite, task: Task) -> str:
    environment = suite.open()
    environment.reset(task, 0)
    environment.close()
    environment.close()
    return "does nothing the second time"


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
    """Two environments of a pool, in one worker if the suite allows it, and the episodes that were played there."""

    def __init__(self, suite: Suite, pool: EnvironmentPool, names: Sequence[str], turns: int) -> None:
        self._suite, self._pool, self._names, self._turns = suite, pool, names, turns
        self.tasks = [self._task(name, suite.variations(name, "train")[0]) for name in names]
        self._examples: dict[Task, WorkedExample | None] = {}
        self._played: list[_Played] = []

    def every_split(self) -> str:
        """The first and the last variation of each split can be begun, with the largest seed."""
        tried = 0
        for name in self._names:
            for split in SPLITS:
                variations = self._suite.variations(name, split)
                for variation in dict.fromkeys((*variations[:1], *variations[-1:])):
                    task = self._task(name, variation)
                    with _during(f"{task} of the {split} split cannot be begun with seed {LARGEST_SEED}:"):
                        self._reset(self._pool, 0, task, LARGEST_SEED)
                    tried += 1
        return f"{tried} variations, the first and last of each, begin with the largest seed"

    def five_values(self) -> str:
        for task in self.tasks:
            self._played.append(self._random_walk(task, self._turns))
        steps = sum(len(played.actions) for played in self._played)
        return f"{len(self.tasks)} tasks, {steps} steps: text, finite reward, two flags, info"

    def same_again(self) -> str:
        for played in self._played:
            self._compare(played, self._do(self._pool, played.task, played.actions).answers, "a second time")
        return "equal actions give equal episodes"

    def same_elsewhere(self, pool: EnvironmentPool) -> str:
        for played in self._played:
            self._compare(played, self._do(pool, played.task, played.actions).answers, "in a fresh process")
        return "and so they do there"

    def apart(self) -> str:
        """Two environments, stepped in turn, do what each does alone: they share nothing."""
        if self._suite.per_worker == 1:
            raise _Nothing("each environment has a process of its own (per_worker = 1)")
        for first, second in zip(self._played, [*self._played[1:], self._played[0]], strict=True):
            both = [(0, first), (1, second)]
            answers: dict[int, list[Any]] = {
                slot: [self._reset(self._pool, slot, played.task, 0)] for slot, played in both
            }
            for turn in range(max(len(first.actions), len(second.actions))):
                for slot, played in both:
                    if turn < len(played.actions):
                        answers[slot].append(self._step(self._pool, slot, played.actions[turn]))
            for slot, played in both:
                self._compare(played, answers[slot], "beside another environment in the same process")
        return f"up to {self._suite.per_worker} share a process, and nothing else"

    def reset_midway(self) -> str:
        for played in self._played:
            self._reset(self._pool, 0, played.task, 0)
            if played.actions:
                self._step(self._pool, 0, played.actions[0])
            again = self._reset(self._pool, 0, played.task, 0)
            self._compare(played, [again], "by a reset in the middle of an episode")
        return "begins anew"

    def end(self) -> str:
        ended = next((p for task in self.tasks if (p := self._until_end(task)).ended), None)
        if ended is None:
            raise _Nothing(f"no episode ended within {MOST_TURNS} actions; env.max_turns ends them")
        try:
            answer = self._step(self._pool, 0, ended.actions[-1])
        except Exception as refusal:
            return f"after {len(ended.actions)} actions; another step is refused ({type(refusal).__name__})"
        raise Broken(f"a step after the end of {ended.task} answered {answer!r:.100}; let it raise")

    def odd_replies(self) -> str:
        task = self.tasks[0]
        self._reset(self._pool, 0, task, 0)
        for reply in ODD:
            with _during(f"the reply {reply!r:.50} raised"):
                answer = self._step(self._pool, 0, reply)
            if answer[2] or answer[3]:
                self._reset(self._pool, 0, task, 0)
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
            valid = any(answer[-1].get("valid", True) for played in self._played for answer in played.answers[1:])
            doubt = "" if valid else "; no action that was tried was valid"
            raise _Nothing(f"info has no 'actions'; `empo2 play` and `empo2 warmup` would use them{doubt}")
        return f"{offered} taken, all valid"

    def worked_examples(self) -> str:
        solved = 0
        for task in self.tasks:
            example = self._example(task)
            if example is None:
                continue
            actions = [action for _, action in example.turns]
            for action in actions:
                if not action or " ".join(action.split()) != action:
                    raise Broken(
                        f"the worked example of {task} does {action!r}; a policy's action is one line, single blanks"
                    )
            played = self._do(self._pool, task, actions)
            for (seen, _), answer in zip(example.turns, played.answers, strict=False):
                if seen != answer[0]:
                    raise Broken(f"the worked example of {task} tells {seen!r:.100}, the episode {answer[0]!r:.100}")
            last = played.answers[-1]
            if len(played.actions) < len(actions) or not played.ended or not last[-1].get("success"):
                raise Broken(f"the worked example of {task} does not end in success: {last!r:.200}")
            solved += 1
        if not solved:
            raise _Nothing("the environment has none; set prompt.examples = 0")
        return f"{solved} of {len(self.tasks)} tasks, each ends in success"

    def _task(self, name: str, variation: int) -> Task:
        return Task(environment=self._suite.name, name=name, variation=variation)

    def _example(self, task: Task) -> WorkedExample | None:
        if task not in self._examples:
            self._examples[task] = self._pool.worked_example(task)
        return self._examples[task]

    def _random_walk(self, task: Task, turns: int) -> _Played:
        """An episode of drawn actions: those that are offered, else words from what was said; now and then any.

        It begins with some of a worked example's, if there is one, so that it leaves the first room.
        """
        rng = random.Random(str(task))
        example = self._example(task)
        known = [action for _, action in example.turns] if example else []
        known = known[: rng.randint(0, min(len(known), turns))]
        played = _Played(task, [], [self._reset(self._pool, 0, task, 0)])
        said = _words(self._suite.instructions())
        while len(played.actions) < turns and not played.ended:
            seen, info = played.answers[-1][0], played.answers[-1][-1]
            offered = known[:1] or list(info.get("actions") or ())
            known = known[1:]
            if not offered or (not known and rng.random() < 0.1):
                words = [*said, *_words(seen)] or ["look"]
                offered = [" ".join(rng.choices(words, k=rng.randint(1, 3)))]
            played.actions.append(rng.choice(offered))
            played.answers.append(self._step(self._pool, 0, played.actions[-1]))
        return played

    def _until_end(self, task: Task) -> _Played:
        """An episode that ends, if one is found: the worked example, else a long walk."""
        example = self._example(task)
        if example is None:
            return self._random_walk(task, MOST_TURNS)
        return self._do(self._pool, task, [action for _, action in example.turns])

    def _do(self, pool: EnvironmentPool, task: Task, actions: Sequence[str]) -> _Played:
        played = _Played(task, [], [self._reset(pool, 0, task, 0)])
        for action in actions:
            if not played.ended:
                played.actions.append(action)
                played.answers.append(self._step(pool, 0, action))
        return played

    def _reset(self, pool: EnvironmentPool, slot: int, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        pool.start_reset(slot, task, seed)
        observation, info = pool.receive_reset(slot)
        _check_info(info, f"a reset of {task}")
        return observation, info

    def _step(self, pool: EnvironmentPool, slot: int, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        pool.start_step(slot, action)
        result = pool.receive_step(slot)
        info, where = dict(result.info), f"{action!r:.50}"
        _check_info(info, where)
        if result.terminated and result.truncated:
            raise Broken(
                f"after {where} the episode is both terminated (it has ended) and truncated (it is cut off); say one"
            )
        if info.get("success") and not (result.terminated or result.truncated):
            raise Broken(f"info['success'] after {where}, but the episode goes on; success is read at its end")
        return result.observation, result.reward, result.terminated, result.truncated, info

    def _compare(self, played: _Played, answers: Sequence[Any], where: str) -> None:
        for index, (found, expected) in enumerate(zip(answers, played.answers, strict=False)):
            if essence(found) != essence(expected):
                done = played.actions[index - 1] if index else "reset"
                raise Broken(
                    f"{played.task} answers {done!r} otherwise {where}: {found!r:.200} and before {expected!r:.200}; "
                    "draw all chance from the task's variation and the seed, and keep nothing outside the environment"
                )


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def _check_info(info: dict[str, Any], where: str) -> None:
    """Raise Broken for a key of the contract with a value of another type."""
    for key in ("task", "state", "offer"):
        if key in info and not isinstance(info[key], str):
            raise Broken(f"info[{key!r}] must be text; after {where} it is {info[key]!r:.100}")
    for key in ("valid", "success"):
        if key in info and (isinstance(info[key], str) or info[key] not in (True, False)):
            raise Broken(f"info[{key!r}] must be True or False; after {where} it is {info[key]!r:.100}")
    actions = info.get("actions")
    if actions is not None and not (
        isinstance(actions, list | tuple) and all(isinstance(action, str) for action in actions)
    ):
        raise Broken(f"info['actions'] must be a list or tuple of texts; after {where} it is {actions!r:.100}")
