"""The method works in small, and only as a whole: mazes of which chance solves 1 in 729 (recipe `lock`)."""

from pathlib import Path
from typing import Any

import pytest

from empo2 import config
from empo2.config import Config
from empo2.warmup import warm_up
from runs import run_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MAZES: dict[str, Any] = {
    "train.threads": 1,
    "train.steps": 120,
    "env.tasks": ["maze-6"],
    "eval.every": 0,
    "warmup.tasks": ["maze-3", "maze-6"],
    "warmup.updates": 400,
}
#: Arm → what it changes. The first is the method; the others must fail.
ARMS: dict[str, dict[str, Any]] = {
    "empo2": {},
    "without tips": {"modes.p": 0.0},
    "without DISTILL": {"modes.q": 0.0},
    "tips of another maze": {"memory.source": "other"},
}


def recipe(model: Path, **changes: Any) -> Config:
    overrides = MAZES | {"model.path": str(model)} | changes
    return config.from_dict(config.with_overrides(config.read_recipe("lock"), list(overrides.items())))


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A policy of 0.1 million parameters that walks at random and follows tips, and what its warm-up says of it."""
    folder = tmp_path_factory.mktemp("warm") / "model"
    return folder, warm_up(recipe(folder), lambda done: None)


@pytest.fixture(scope="module")
def scores(warmed: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Arm → tip-free score before and after training, 0…1, of 64 episodes each."""
    folder = tmp_path_factory.mktemp("arms")
    runs = {arm: run_training(folder / arm, recipe(warmed[0], **changes)) for arm, changes in ARMS.items()}
    found = {arm: [line["eval_train_score_mean"] for line in run.evaluations()] for arm, run in runs.items()}
    return {arm: (before, after) for arm, (before, after) in found.items()}


def test_the_warmed_policy_hardly_ever_leaves_a_maze_but_can_read_tips(warmed: tuple[Path, Any], scores: Any):
    assert warmed[1]["score"] <= 0.04
    assert warmed[1]["others_without_tips_score"] <= 0.04
    assert warmed[1]["others_with_tips_score"] >= 0.25
    assert {before for before, _ in scores.values()} == {scores["empo2"][0]}, "all arms begin with the same policy"


def test_the_whole_method_leaves_the_mazes_without_tips(scores: dict[str, Any]):
    assert scores["empo2"][1] >= 0.15


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "empo2"])
def test_with_a_part_taken_out_it_stalls(arm: str, scores: dict[str, Any]):
    assert scores[arm][1] <= scores["empo2"][1] / 3
