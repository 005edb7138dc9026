"""The method works in small, and only as a whole (the learning problem: learning.py)."""

from typing import Any

import pytest
import torch

import learning

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def taught() -> Any:
    """A policy of 0.1 million parameters that follows tips, taught in other mazes than the goals."""
    torch.set_num_threads(1)
    return learning.imitate(learning.word_tokenizer(), learning.recipe_of("empo2", 0), seed=0, **learning.LESSONS)


@pytest.fixture(scope="module")
def scores(taught: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Arm → tip-free score before and after training, 0…100, of 64 episodes each."""
    folder = tmp_path_factory.mktemp("arms")
    runs = {arm: learning.train_arm(folder / arm, arm, taught, seed=0) for arm in learning.ARMS}
    found = {arm: [line["eval_train_score_mean"] for line in run.evaluations()] for arm, run in runs.items()}
    return {arm: (before, after) for arm, (before, after) in found.items()}


def test_the_policy_is_small_and_hardly_ever_leaves_a_maze_by_chance(taught: Any, scores: dict[str, Any]):
    assert sum(parameter.numel() for parameter in taught.parameters()) <= 1_000_000
    assert {before for before, _ in scores.values()} == {scores["empo2"][0]}, "all arms begin with the same policy"
    assert scores["empo2"][0] <= 4


def test_the_whole_method_leaves_the_mazes_without_tips(scores: dict[str, Any]):
    assert scores["empo2"][1] >= 20


@pytest.mark.parametrize("arm", [arm for arm in learning.ARMS if arm != "empo2"])
def test_with_a_part_taken_out_it_stalls(arm: str, scores: dict[str, Any]):
    """PLAIN alone; tips that are never distilled; the tips of another maze."""
    assert scores[arm][1] <= scores["empo2"][1] / 3
