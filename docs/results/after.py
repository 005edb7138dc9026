"""The score after a number of training steps (one that was evaluated), by task and arm, and an arm minus each other.

Means and 95 % intervals over seeds, paired by seed; of all finished seeds, or of those from one number to another.

python docs/results/after.py docs/results/coin/hard eval_train_score_mean 30 empo2 [38 43]
"""

import json
import sys
from pathlib import Path

from empo2.report.statistics import mean_interval
from empo2.report.tables import table, with_interval

folder, key, step, reference = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
first, last = map(int, sys.argv[5:7]) if len(sys.argv) > 5 else (0, sys.maxsize)


def score(cell: Path) -> float:
    lines = map(json.loads, (cell / "evaluations.jsonl").read_text(encoding="utf-8").splitlines())
    (value,) = (line[key] for line in lines if line["step"] == step)
    return float(value)


def seed(cell: Path) -> int:
    return int(cell.name.removeprefix("seed-"))


found = {
    (arm.parent.name, arm.name): {seed(cell): score(cell) for cell in arm.glob("seed-*") if first <= seed(cell) <= last}
    for arm in sorted((folder / "cells").glob("*/*"))
}
rows = []
for (task, arm), scores in found.items():
    other = found[task, reference]
    paired = [other[number] - scores[number] for number in scores if number in other and arm != reference]
    interval, difference = (mean_interval(values) if values else None for values in (list(scores.values()), paired))
    rows.append([task, arm, str(len(scores)), with_interval(interval, 2), with_interval(difference, 2)])
print(table(["task", "arm", "seeds", f"{key} after {step} steps", f"{reference} − it"], rows, left=2))
