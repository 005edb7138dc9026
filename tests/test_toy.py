"""The toy house: deterministic, solvable, and strict about its own end."""

import pytest

from empo2.envs.base import check_tasks, suite
from empo2.envs.toy import DIRECTIONS, SIZES, ToyEnvironment, build_map
from empo2.errors import ConfigError
from empo2.types import Task
from pool_suites import play

SUITE = suite("toy")
TASK = Task(environment="toy", name="coin-3", variation=0)
WALK = ["look", "go north", "go east", "take coin", "go south", "dance", "go west", "look"]


def tasks(name: str) -> list[Task]:
    """All variations of all splits."""
    splits = ("train", "dev", "test")
    return [
        Task(environment="toy", name=name, variation=variation)
        for split in splits
        for variation in SUITE.variations(name, split)
    ]


def test_one_house_in_full():
    """A literal episode, so that no change of the maps goes unnoticed: it would change every recorded run."""
    doors = {
        "kitchen": {"west": "attic", "north": "tower"},
        "attic": {"east": "kitchen"},
        "tower": {"south": "kitchen"},
    }
    assert build_map(3, 0) == (doors, "kitchen", "tower")
    kitchen = "You are in the kitchen. Doors: west, north."
    attic = "You are in the attic. Doors: east."
    tower = "You are in the tower. Doors: south."
    assert play(ToyEnvironment(), TASK, ["go west", "go west", "east", "north", "please take it", "look"]) == [
        (kitchen, {"state": kitchen, "task": "Find the coin and take it."}),
        (attic, 0.0, False, False, {"state": attic, "valid": True, "success": False}),
        ("You cannot do that.", 0.0, False, False, {"state": attic, "valid": False, "success": False}),
        (kitchen, 0.0, False, False, {"state": kitchen, "valid": True, "success": False}),
        (
            f"{tower} A coin lies here.",
            0.0,
            False,
            False,
            {"state": f"{tower} A coin lies here.", "valid": True, "success": False},
        ),
        ("You take the coin.", 100.0, True, False, {"state": tower, "valid": True, "success": True}),
    ]


@pytest.mark.parametrize("name", SIZES)
def test_equal_actions_give_equal_episodes(name):
    """In a fresh environment, in one that played something else, and for another seed (the map is the variation's)."""
    used = ToyEnvironment()
    for task in tasks(name):
        first = play(ToyEnvironment(), task, WALK)
        assert play(used, task, WALK) == first
        assert play(used, task, WALK, seed=1) == first


def test_variations_differ():
    for name, size in SIZES.items():
        houses = {str(build_map(size, variation)) for variation in range(100)}
        assert len(houses) > 90, name


@pytest.mark.parametrize("name", SIZES)
def test_the_worked_example_takes_the_coin(name):
    environment = ToyEnvironment()
    for task in tasks(name):
        example = environment.worked_example(task)
        assert example.task_text == "Find the coin and take it."
        assert len(example.turns) <= SIZES[name], "no room twice on the shortest way"
        observation, _ = environment.reset(task, 0)
        rewards = []
        for shown, action in example.turns:
            assert shown == observation
            observation, reward, terminated, truncated, info = environment.step(action)
            rewards.append(reward)
            assert info["valid"]
            assert not truncated
            assert info["success"] == terminated == (reward == 100)
        assert rewards == [0.0] * (len(rewards) - 1) + [100.0]


@pytest.mark.parametrize("name", SIZES)
def test_every_room_is_joined_by_doors_that_lead_back(name):
    for variation in range(100):
        doors, start, coin = build_map(SIZES[name], variation)
        assert len(doors) == SIZES[name]
        assert start != coin
        for room, ways in doors.items():
            assert all(doors[other][DIRECTIONS[direction]] == room for direction, other in ways.items())
        reached, edge = {start}, [start]
        while edge:
            edge = [other for room in edge for other in doors[room].values() if other not in reached]
            reached.update(edge)
        assert reached == set(doors)


@pytest.mark.parametrize("action", ["", "dance", "take coin", "go nowhere", "open door", "GO", "coin", "norther"])
def test_an_action_that_does_nothing_is_not_valid(action):
    task = Task(environment="toy", name="coin-5", variation=0)
    environment = ToyEnvironment()
    _, before = environment.reset(task, 0)
    observation, reward, terminated, _, info = environment.step(action)
    assert (observation, reward, terminated) == ("You cannot do that.", 0.0, False)
    assert (info["valid"], info["success"], info["state"]) == (False, False, before["state"])


def test_a_door_that_is_not_there_is_not_valid():
    environment = ToyEnvironment()
    environment.reset(TASK, 0)
    missing = next(direction for direction in DIRECTIONS if direction not in environment.doors[environment.room])
    assert environment.step(f"go {missing}")[4]["valid"] is False


def test_no_step_outside_an_episode():
    environment = ToyEnvironment()
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("look")
    environment.worked_example(TASK)
    with pytest.raises(RuntimeError, match="after the episode ended; call reset"):
        environment.step("look")
    environment.reset(TASK, 0)
    environment.step("look")


def test_splits_are_disjoint_and_not_empty():
    for name in SUITE.task_names():
        splits = [set(SUITE.variations(name, split)) for split in ("train", "dev", "test")]
        assert all(splits)
        assert len(set.union(*splits)) == sum(map(len, splits)) == 100


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="toy has no task 'coin-4'"):
        check_tasks(SUITE, ("coin-3", "coin-4"))
    with pytest.raises(ConfigError, match="no environment 'tay'"):
        suite("tay")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'size'"):
        suite("toy", size=3)
