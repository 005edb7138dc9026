"""A key of metrics.jsonl averaged over a range of training steps, or one of evaluations.jsonl (`eval_…`) over those of
the range: mean and 95 % interval over seeds, by task and arm, and an arm minus each other one, paired by seed; of all
finished seeds, or of those from one number to another.

python docs/results/means.py docs/results/small/removals entropy_sampled 5 20 empo2
python docs/results/means.py docs/results/coin/hard eval_train_score_mean 30 30 empo2 38 43
"""

import gzip
import json
import sys
from pathlib import Path

from empo2.metrics import OF_UPDATES
from empo2.report.statistics import mean_interval
from empo2.report.tables import table, with_interval

folder, key, first, last, reference = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
lowest, highest = map(int, sys.argv[6:8]) if len(sys.argv) > 6 else (0, sys.maxsize)


def mean(cell: Path) -> float | None:
    """None: trained or evaluated at none of these steps, or failed."""
    if not (cell / "metrics.jsonl.gz").exists():
        return None
    if key.startswith("eval_"):
        text = (cell / "evaluations.jsonl").read_text(encoding="utf-8")
    else:
        text = gzip.decompress((cell / "metrics.jsonl.gz").read_bytes()).decode("utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if first <= line["step"] <= last]
    if key in OF_UPDATES:  # older runs noted zeros where nothing was trained
        lines = [line for line in lines if line["updates"]]
    values = [float(line[key]) for line in lines if line.get(key) is not None]
    return sum(values) / len(values) if values else None


def seed(cell: Path) -> int:
    return int(cell.name.removeprefix("seed-"))


found = {
    (arm.parent.name, arm.name): {
        seed(cell): value
        for cell in arm.glob("seed-*")
        if lowest <= seed(cell) <= highest and (value := mean(cell)) is not None
    }
    for arm in sorted((folder / "cells").glob("*/*"))
}
if all(reference != arm for _, arm in found):
    sys.exit(f"there is no arm {reference}; there are {', '.join(sorted({arm for _, arm in found}))}")
rows = []
for (task, arm), means in found.items():
    other = found[task, reference]
    paired = [other[number] - means[number] for number in means if number in other and arm != reference]
    rows.append(
        [
            task,
            arm,
            str(len(means)),
            with_interval(mean_interval(list(means.values())) if means else None, 3),
            with_interval(mean_interval(paired) if paired else None, 3),
        ]
    )
print(table(["task", "arm", "seeds", f"{key}, steps {first} to {last}", f"{reference} − it"], rows, left=2))
