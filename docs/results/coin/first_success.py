"""What becomes of a first success: for each arm, how many games were met (solved once in training, by any episode), how
many of those were not solved again in the next five steps (by any episode, and by one without tips) and in the next
ten (without tips), and how many were mastered, and when: the first step at which half of the tip-free episodes of the
last three steps solved it. From the trajectories of runs of equal length.

python docs/results/coin/first_success.py 60 runs/coin-hard/coin/*/seed-36 …
"""

import collections
import gzip
import json
import statistics
import sys
from pathlib import Path

from empo2.report.tables import table

AGAIN = ((5, False), (5, True), (10, True))  #: steps, whether only episodes without tips count
WINDOW = 3  #: steps

Solved = dict[int, list[tuple[bool, bool]]]  # step → (tip-free, success) of each episode of a game


def games(run: Path, last: int) -> dict[int, Solved]:
    """By game."""
    found: dict[int, Solved] = collections.defaultdict(lambda: collections.defaultdict(list))
    for step in range(1, last + 1):
        with gzip.open(run / "trajectories" / f"step_{step:06d}.jsonl.gz", "rt", encoding="utf-8") as file:
            for episode in map(json.loads, file):
                shown = episode["mode"] != "plain" and any(turn["tips"] for turn in episode["turns"])
                found[episode["task"]["variation"]][step].append((not shown, episode["success"]))
    return found


def first_success(solved: Solved) -> int | None:
    return next((step for step in sorted(solved) if any(success for _, success in solved[step])), None)


def lost(firsts: list[tuple[int, Solved]], steps: int, tip_free: bool, last: int) -> str:
    """Games not solved again in the ``steps`` after their first success, of those with as many left to the end."""
    judged = [(first, solved) for first, solved in firsts if first + steps <= last]
    count = sum(
        not any(
            success
            for step in range(first + 1, first + steps + 1)
            for free, success in solved.get(step, ())
            if free or not tip_free
        )
        for first, solved in judged
    )
    return f"{count} of {len(judged)}"


def mastered(solved: Solved) -> int | None:
    for step in sorted(solved):
        window = [success for s in range(step - WINDOW + 1, step + 1) for free, success in solved.get(s, []) if free]
        if window and sum(window) >= len(window) / 2:
            return step
    return None


def main(last: int, runs: list[Path]) -> None:
    arms: dict[str, list[Solved]] = collections.defaultdict(list)
    for run in runs:
        arms[run.parent.name].extend(games(run, last).values())
    rows = []
    for arm, of_game in arms.items():
        firsts = [(first, solved) for solved in of_game if (first := first_success(solved)) is not None]
        waits = [at - first for first, solved in firsts if (at := mastered(solved)) is not None]
        quartiles = statistics.quantiles(waits, n=4) if len(waits) > 1 else []
        rows.append(
            [
                arm,
                str(len(of_game)),
                str(len(firsts)),
                f"{statistics.median(first for first, _ in firsts):.0f}" if firsts else "—",
                *(lost(firsts, steps, tip_free, last) for steps, tip_free in AGAIN),
                str(len(waits)),
                " ".join(f"{quartile:.0f}" for quartile in quartiles) or "—",
            ]
        )
    again = [f"not solved again in {steps} steps{', without tips' if tip_free else ''}" for steps, tip_free in AGAIN]
    head = ["arm", "games", "met", "at step (median)", *again, "mastered"]
    print(table([*head, "steps from the first success (quartiles)"], rows, left=1))


main(int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
