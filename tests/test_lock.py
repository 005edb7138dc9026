"""The lock: its difficulty is known exactly, and only its own secret opens it."""

import itertools

import pytest

from empo2.envs.base import suite
from empo2.envs.lock import HOUSES, SIZES, LockEnvironment, way_out
from empo2.types import Task
from pool_suites import play


def task_of(variation: int, rooms: int = 4, kind: str = "lock") -> Task:
    return Task(environment="lock", name=f"{kind}-{rooms}", variation=variation)


def test_one_episode_in_full():
    """Literal, so that no change of the secrets goes unnoticed: it would change every recorded run."""
    assert way_out(2, 1) == ("stone", ("chalk", "chalk"))
    doors = ("slate", "flint", "chalk")
    one, two = (f"You are in room {room}. Doors: slate, flint, chalk." for room in ("one", "two"))
    known = {"valid": True, "success": False, "actions": doors}
    assert play(LockEnvironment(), task_of(1, rooms=2), ["oak", "chalk", "chalk"]) == [
        (one, {"state": one, "task": "Find the way out.", "actions": doors}),
        ("No such door.", 0.0, False, False, {**known, "state": one, "valid": False}),
        (two, 0.0, False, False, {**known, "state": two}),
        (
            "You are out.",
            1.0,
            True,
            False,
            {"state": "You are out.", "valid": True, "success": True, "actions": ()},
        ),
    ]


@pytest.mark.parametrize("kind", ["lock", "maze"])
@pytest.mark.parametrize("rooms", [1, 2, 4])
def test_one_of_three_to_the_n_ways_leads_out(rooms: int, kind: str):
    environment, house = LockEnvironment(), HOUSES["wood"]
    scores = [
        sum(answer[1] for answer in play(environment, task_of(0, rooms, kind), list(way))[1:])
        for way in itertools.product(house, repeat=rooms)
    ]
    assert sorted(scores) == [0.0] * (3**rooms - 1) + [1.0]


def test_a_wrong_door_ends_the_episode():
    environment = LockEnvironment()
    wrong = next(door for door in HOUSES["wood"] if door != way_out(4, 0)[1][0])
    *_, last = play(environment, task_of(0), [wrong, wrong])
    assert last[0] == "A dead end."
    assert last[1:4] == (0.0, True, False)
    assert last[4] == {"state": "A dead end.", "valid": True, "success": False, "actions": ()}
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(wrong)


def test_in_a_maze_every_door_leads_on_and_the_states_tell_nothing():
    environment, doors = LockEnvironment(), way_out(4, 0)[1]
    wrong = next(door for door in HOUSES["wood"] if door != doors[0])
    right_way = play(environment, task_of(0, kind="maze"), list(doors))
    wrong_way = play(environment, task_of(0, kind="maze"), [wrong, *doors[1:]])
    assert right_way[:-1] == wrong_way[:-1]
    assert right_way[-1][:3] == ("You are out.", 1.0, True)
    assert wrong_way[-1][:3] == ("A dead end.", 0.0, True)
    assert len({answer[0] for answer in right_way}) == 5


def test_variations_have_secrets_of_their_own():
    for name, rooms in SIZES.items():
        by_house = {house: {way_out(rooms, v) for v in range(index, 400, 4)} for index, house in enumerate(HOUSES)}
        for secrets in by_house.values():
            assert len(secrets) >= min(3**rooms, 100) * 0.6, name


def test_splits_are_disjoint():
    splits = [suite("lock").variations("lock-4", split) for split in ("train", "dev", "test")]
    assert len(set().union(*splits)) == sum(map(len, splits)) == 3000
