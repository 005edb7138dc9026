"""Playing by hand, and watching a trained run."""

from pathlib import Path

import pytest

from empo2 import cli
from empo2.envs.base import suite
from empo2.play import by_hand
from empo2.types import Task
from runs import run_training, smoke

TASK = Task(environment="toy", name="coin-3", variation=0)


def played(*replies: str, environment: str = "toy", task: Task = TASK) -> str:
    """What is said in the terminal; the input ends after the replies."""
    said, waiting = [], iter(replies)

    def ask(prompt: str) -> str:
        said.append(prompt)
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    by_hand(suite(environment), task, said.append, ask)
    return "\n".join(said)


def test_an_episode_by_hand():
    told = played("dance", "north", "take")
    assert told.startswith(suite("toy").instructions())
    assert "toy/coin-3/0\nFind the coin and take it.\n\nYou are in the kitchen." in told
    assert "(not a valid action) You cannot do that." in told
    assert "[2 turns, score 0]> " in told
    assert "You take the coin.\n+100" in told
    assert "The episode is over after 3 turns: score 100, solved." in told


def test_after_the_end_only_a_restart_goes_on():
    told = played("north", "take", "south", ":restart", "look")
    assert "The episode is over; :restart begins another one." in told
    assert told.count("[0 turns, score 0]") == 2
    assert "[1 turns, score 0]" in told.rpartition("[0 turns")[2]


def test_solution_and_actions():
    told = played(":solution", ":actions", ":help", ":quit", "never read")
    assert "go north\ntake coin\nThe episode begins anew." in told
    assert "does not say what can be done" in told
    assert told.count(":solution a worked episode") == 2
    lock = Task(environment="lock", name="lock-2", variation=0)
    told = played(":actions", ":solution", environment="lock", task=lock)
    assert "oak, elm, ash" in told
    assert "knows no solution" in told


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    run_training(folder, smoke(("train.steps", 2), ("modes.p", 1.0), ("memory.threshold", -1.0)))
    return folder


@pytest.mark.parametrize("memory", ["none", "run"])
def test_a_run_is_watched_with_its_tips_and_without(run, memory, capsys):
    assert cli.main(["play", str(run), "--memory", memory, "--episodes", "2"]) == 0
    told = capsys.readouterr().out
    assert told.count("  1> ") == 2
    assert ("  tip: " in told) == (memory == "run")
    assert "score " in told


def test_another_variation_is_watched(run, capsys):
    assert cli.main(["play", str(run), "--variation", "85"]) == 0
    assert capsys.readouterr().out.startswith("toy/coin-3/85 ")
