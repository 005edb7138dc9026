"""What a run prints: the learning curve at its end."""

from typing import Any

import pytest
from rich.console import Console

from empo2.display import curve


def lines(evaluations: list[dict[str, Any]]) -> list[str]:
    console = Console(width=100)
    with console.capture() as said:
        console.print(curve(evaluations))
    return [line for line in said.get().splitlines() if line.startswith("│")]


def test_a_bar_for_each_evaluation():
    scores = (0.0, 0.25, 0.5)
    drawn = lines([{"step": step, "eval_train_score_mean": score} for step, score in enumerate(scores)])
    assert [line.count("█") for line in drawn] == [0, 12, 24]
    assert ["0.00" in drawn[0], "0.25" in drawn[1], "0.50" in drawn[2]] == [True] * 3


def test_both_kinds_of_variations_share_a_scale_and_negative_scores_have_room():
    drawn = lines(
        [
            {"step": 0, "eval_train_score_mean": -20.0, "eval_score_mean": -10.0},
            {"step": 8, "eval_train_score_mean": 100.0, "eval_score_mean": 40.0},
        ]
    )
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in drawn]
    assert [row[:2] + row[3:4] for row in cells] == [["0", "-20.0", "-10.0"], ["8", "100.0", "40.0"]]
    assert [(row[2].count("█"), row[4].count("█")) for row in cells] == [(0, 2), (24, 12)]


@pytest.mark.parametrize("score", [0.0, 3.0])
def test_a_flat_curve(score: float):
    drawn = lines([{"step": step, "eval_score_mean": score} for step in range(3)])
    assert {line.count("█") for line in drawn} == {24 if score else 0}
