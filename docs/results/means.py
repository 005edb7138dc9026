"""A key of metrics.jsonl, averaged over a range of training steps: mean and 95 % interval over seeds, by task and arm.

python docs/results/means.py docs/results/small/removals entropy_sampled 5 20
"""

import gzip
import json
import sys
from pathlib import Path

from empo2.report.statistics import mean_interval
from empo2.report.tables import table, with_interval

folder, key, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rows = []
for arm in sorted((folder / "cells").glob("*/*")):
    means = []
    for seed in sorted(arm.glob("seed-*")):
        with gzip.open(seed / "metrics.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [line for line in map(json.loads, file) if first <= line["step"] <= last]
        values = [float(line[key]) for line in lines if line.get(key) is not None and line["updates"]]
        if values:
            means.append(sum(values) / len(values))
    rows.append([arm.parent.name, arm.name, str(len(means)), with_interval(mean_interval(means), 3)])
print(table(["task", "arm", "seeds", f"{key}, steps {first} to {last}"], rows, left=2))
