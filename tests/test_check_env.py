"""`empo2 check-env`: every built-in environment keeps the contract, and each way of breaking it is told."""

import os
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from empo2 import cli
from empo2.envs.base import suite
from empo2.envs.check import ODD, check_environment
from empo2.envs.simple import SimpleSuite
from empo2.errors import MissingPart
from empo2.types import Task, WorkedExample


class Counting:
    """Counts `up` to three, then ends in success; keeps the contract."""

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        self.count, self.over = 0, False
        return "0", {"task": "Count to 3.", "state": "0", "actions": ("up",)}

    def step(self, action: str) -> Any:
        if self.over:
            raise RuntimeError("over")
        self.count += action == "up"
        self.over = self.count == 3
        info = {"valid": action == "up", "success": self.over, "actions": () if self.over else ("up",)}
        return str(self.count), float(self.over), self.over, False, info

    def close(self) -> None:
        pass

    def worked_example(self, task: Task) -> WorkedExample:
        return WorkedExample(task_text="Count to 3.", turns=(("0", "up"), ("1", "up"), ("2", "up")))


class Remembering(Counting):
    """What is seen depends on earlier episodes."""

    episodes = 0

    def reset(self, task, seed):
        self.episodes += 1
        return f"{self.episodes}", super().reset(task, seed)[1]


class OtherElsewhere(Counting):
    """Another one in each process."""

    def step(self, action):
        return (f"{os.getpid()}", *super().step(action)[1:])


class SharedDice(Counting):
    """The dice of the whole process, seeded at reset: right as long as one environment plays alone."""

    def reset(self, task, seed):
        random.seed(task.variation)
        return super().reset(task, seed)

    def step(self, action):
        return (f"{random.random()}", *super().step(action)[1:])

    def worked_example(self, task):
        return None


class SharedList(Counting):
    """All environments of the process write into one list."""

    said: ClassVar[list[str]] = []

    def reset(self, task, seed):
        self.said.clear()
        return super().reset(task, seed)

    def step(self, action):
        self.said.append(action)
        return (f"turn {len(self.said)}", *super().step(action)[1:])

    def worked_example(self, task):
        return None


class OneLevel(Counting):
    def reset(self, task, seed):
        return ("zero", "one")[task.variation], super().reset(task, seed)[1]

    def worked_example(self, task):
        return None


class SmallSeeds(Counting):
    def reset(self, task, seed):
        if seed >= 2**31:
            raise OverflowError("the seed is too large")
        return super().reset(task, seed)


class NanAtEnd(Counting):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if reward else reward, *rest


class Leaving(Counting):
    def step(self, action):
        if not action.strip():
            sys.exit(0)
        return super().step(action)


class Hanging(Counting):
    def step(self, action):
        if not action.strip():
            time.sleep(60)
        return super().step(action)


class Reusing(Counting):
    """One info that is changed in place: workers send copies, so that nothing is wrong with it."""

    def reset(self, task, seed):
        observation, self.info = super().reset(task, seed)
        return observation, self.info

    def step(self, action):
        *values, info = super().step(action)
        self.info.update(info)
        return *values, self.info


class NumberedActions(Counting):
    def step(self, action):
        *values, info = super().step(action)
        return *values, {**info, "actions": (1, 2)}


class ActionsInOne(Counting):
    def step(self, action):
        *values, info = super().step(action)
        return *values, {**info, "actions": "up"}


class TwoLines(Counting):
    def worked_example(self, task):
        return WorkedExample(task_text="", turns=(("0", "up\nup"),))


class GoesOn(Counting):
    def step(self, action):
        self.over = False
        return super().step(action)


class Fragile(Counting):
    def step(self, action):
        if len(action) > 1000:
            raise ValueError("too long")
        return super().step(action)


class OneFlag(Counting):
    def step(self, action):
        observation, reward, over, _, info = super().step(action)
        return observation, reward, over, over, info


class EarlySuccess(Counting):
    def step(self, action):
        *values, info = super().step(action)
        return *values, {**info, "success": True}


class Flagless(Counting):
    def step(self, action):
        *values, info = super().step(action)
        return *values, {**info, "valid": "yes"}


class NoText(Counting):
    def reset(self, task, seed):
        return 7, {}


class Wordy(Counting):
    def step(self, action):
        *values, info = super().step(action)
        return *values, {**info, "state": 3}


class Offering(Counting):
    def reset(self, task, seed):
        observation, info = super().reset(task, seed)
        return observation, {**info, "actions": ("up", "down")}

    def step(self, action):
        *values, info = super().step(action)
        return *values, {**info, "actions": () if self.over else ("up", "down")}

    def worked_example(self, task):
        return None


class Unsolved(Counting):
    def worked_example(self, task):
        return WorkedExample(task_text="", turns=(("0", "up"),))


class OtherSeen(Counting):
    def worked_example(self, task):
        return WorkedExample(task_text="", turns=(("zero", "up"),))


class ClosedOnce(Counting):
    closed = False

    def close(self):
        if self.closed:
            raise OSError("closed already")
        self.closed = True


class NotAtOnce(Counting):
    """A reset in the middle of an episode goes on with it."""

    over = True

    def reset(self, task, seed):
        if self.over:
            return super().reset(task, seed)
        return str(self.count), {"task": "Count to 3.", "state": "0", "actions": ("up",)}


@dataclass(frozen=True, kw_only=True)
class Bare(SimpleSuite):
    """Opens its environment without a guard."""

    def open(self) -> Any:
        return self.make()


def of(environment: Any, **changes: Any) -> Bare:
    return replace(
        Bare(name="counting", make=environment, instructions_text="Say up.", train=2, dev=1, test=1), **changes
    )


def failures(made: Any) -> dict[str, str]:
    verdicts = check_environment(made, call_timeout_s=2.0 if made.name == "counting" else 60.0)
    return {verdict.what: verdict.told for verdict in verdicts if verdict.ok is False}


def test_an_environment_that_keeps_the_contract_passes():
    verdicts = list(check_environment(of(Counting)))
    assert [verdict.what for verdict in verdicts if not verdict.ok] == []
    assert len(verdicts) == 13


@pytest.mark.parametrize(
    ("environment", "what", "told"),
    [
        (Remembering, "same again", "counting/default/0 answers 'reset' otherwise a second time"),
        (OtherElsewhere, "same in a fresh process", "otherwise in a fresh process"),
        (GoesOn, "end", "a step after the end of counting/default/0 answered"),
        (Fragile, "odd replies", "raised ValueError: too long"),
        (OneFlag, "five values", "is both terminated (it has ended) and truncated"),
        (EarlySuccess, "five values", "but the episode goes on"),
        (Flagless, "five values", "info['valid'] must be True or False"),
        (NoText, "every split", "must return (observation, info), the observation a str"),
        (SharedDice, "apart", "beside another environment in the same process"),
        (SharedList, "apart", "beside another environment in the same process"),
        (
            OneLevel,
            "every split",
            "counting/default/2 of the dev split cannot be begun with seed 4294967295: IndexError",
        ),
        (SmallSeeds, "every split", "OverflowError: the seed is too large"),
        (NanAtEnd, "five values", "the reward finite"),
        (Leaving, "odd replies", "ended with exit code 0"),
        (Hanging, "odd replies", "no answer within env.call_timeout_s = 2"),
        (NumberedActions, "five values", "info['actions'] must be a list or tuple of texts"),
        (ActionsInOne, "five values", "info['actions'] must be a list or tuple of texts"),
        (TwoLines, "worked examples", "a policy's action is one line"),
        (Wordy, "five values", "info['state'] must be text; after 'up' it is 3"),
        (Offering, "offered actions", "'down' is in info['actions'] of counting/default/0, and then it is not valid"),
        (Unsolved, "worked examples", "does not end in success"),
        (OtherSeen, "worked examples", "tells 'zero', the episode '0'"),
        (ClosedOnce, "close twice", "raised OSError: closed already"),
        (NotAtOnce, "reset midway", "by a reset in the middle of an episode"),
    ],
)
def test_each_way_of_breaking_the_contract_is_told(environment, what, told):
    found = failures(of(environment))
    assert told in found.get(what, ""), found


def test_an_info_that_is_changed_in_place_is_all_right():
    assert failures(of(Reusing)) == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": ()}, "task_names() must name each task once"),
        ({"tasks": ("a", "a")}, "task_names() must name each task once"),
        ({"instructions_text": " "}, "instructions() is empty"),
        ({"train": 0}, "no task has a variation to train on"),
        ({"per_worker": 0}, "per_worker = 0 must be at least 1"),
    ],
)
def test_a_suite_that_says_nothing_is_told(changes, told):
    found = failures(of(Counting, **changes))
    assert list(found) == ["suite"]
    assert told in found["suite"]


def test_a_variation_in_two_splits_is_told():
    class Overlapping(Bare):
        def variations(self, task_name, split):
            return (0, 1)

    found = failures(Overlapping(name="o", make=Counting, instructions_text="Say up."))
    assert "in two splits" in found["suite"]


def test_a_suite_that_cannot_be_pickled_is_told():
    found = failures(of(lambda: Counting()))
    assert list(found) == ["worker process"]
    assert "cannot be pickled" in found["worker process"]


def test_a_missing_part_is_an_error_of_its_own():
    class Lacking(Bare):
        def check(self):
            raise MissingPart("install it")

    with pytest.raises(MissingPart, match="install it"):
        failures(Lacking(name="l", make=Counting, instructions_text="Say up."))


@pytest.mark.parametrize("name", ["toy", "lock", "webshop"])
def test_the_built_in_environments_pass(name):
    assert failures(suite(name)) == {}


def test_textworld_express_passes():
    made = suite("textworld-express")
    assert {v.what: v.told for v in check_environment(made, made.task_names()[::5]) if v.ok is False} == {}


@pytest.mark.real
def test_scienceworld_passes():
    """All 30 tasks; gold paths reach the full score."""
    verdicts = {verdict.what: verdict for verdict in check_environment(suite("scienceworld"))}
    assert [what for what, verdict in verdicts.items() if verdict.ok is False] == []
    assert verdicts["worked examples"].told.startswith("30 of 30 tasks")


def test_odd_replies_hold_what_is_told():
    assert max(map(len, ODD)) == 100_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check-env", "toys"], "there is no environment 'toys'"),
        (["check-env", "toy", "--task", "coin-4"], "toy has no task 'coin-4'"),
        (["check-env", "toy", "--turns", "0"], "--turns must be at least 1"),
        (["check-env", "no.toml"], "there is no recipe file no.toml"),
        (["check-env", "webshop", "--task", "human"], "has no variation to train on; name another task"),
        (["play", "toy", "--variation", "1000"], "coin-3 has no variation 1000"),
        (["play", "toy", "--memory", "run"], "toy is an environment, not a run"),
    ],
)
def test_what_cannot_be_checked_or_played_is_refused(arguments, told, capsys):
    assert cli.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_failure_is_an_exit_status(capsys, monkeypatch):
    monkeypatch.setattr("empo2.envs.base.suite_of", lambda env: of(Fragile))
    assert cli.main(["check-env", "counting"]) == 1
    assert "counting breaks the contract" in capsys.readouterr().out
