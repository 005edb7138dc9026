"""A key of metrics.jsonl, averaged over a range of training steps: mean and 95 % interval over seeds, by task and arm,
and an arm minus each other one, paired by seed.

python docs/results/means.py docs/results/small/removals entropy_sampled 5 20 empo2
"""

import gzip
import json
import sys
from pathlib import Path

from empo2.report.statistics import mean_interval
from empo2.report.tables import table, with_interval

folder, key, first, last, reference = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]


def mean(metrics: Path) -> float:
    with gzip.open(metrics, "rt", encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if first <= line["step"] <= last]
    values = [float(line[key]) for line in lines if line.get(key) is not None and line["updates"]]
    return sum(values) / len(values)


found = {
    (arm.parent.name, arm.name): {seed.parent.name: mean(seed) for seed in sorted(arm.glob("seed-*/metrics.jsonl.gz"))}
    for arm in sorted((folder / "cells").glob("*/*"))
}
rows = []
for (task, arm), means in found.items():
    other = found[task, reference]
    paired = [other[seed] - means[seed] for seed in means if seed in other and arm != reference]
    rows.append(
        [
            task,
            arm,
            str(len(means)),
            with_interval(mean_interval(list(means.values())), 3),
            with_interval(mean_interval(paired) if paired else None, 3),
        ]
    )
print(table(["task", "arm", "seeds", f"{key}, steps {first} to {last}", f"{reference} − it"], rows, left=2))
