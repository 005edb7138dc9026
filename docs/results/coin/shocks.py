"""What follows a step whose mean gradient norm exceeds the clip limit of 1: a row a cell, from metrics.jsonl.gz.

python docs/results/coin/shocks.py docs/results/coin/longer/cells/coin/*/seed-*
"""

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

COLUMNS = (
    "cell",
    "such steps",
    "of them KL at least 0.3",
    "largest norm",
    "largest KL",
    "lowest valid actions",
    "valid actions, change to the next step",
    "after other steps",
)
print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
for cell in map(Path, sys.argv[1:]):
    with gzip.open(cell / "metrics.jsonl.gz", "rt", encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    for step in steps:
        for key in ("grad_norm", "kl"):
            step[key] = float(step[key] or 0)  # "inf" and "nan" are text
    shocks = [step for step in steps if step["grad_norm"] > 1]
    after: dict[bool, list[float]] = {True: [], False: []}
    for one, two in pairwise(steps):
        after[one["grad_norm"] > 1].append(two["valid_action_rate"] - one["valid_action_rate"])
    means = [f"{sum(found) / len(found):+.3f}" if found else "—" for found in (after[True], after[False])]
    high = sum(step["kl"] >= 0.3 for step in shocks)
    norm, kl = (max(step[key] for step in steps) for key in ("grad_norm", "kl"))
    valid = min(step["valid_action_rate"] for step in steps)
    row = (
        "/".join(cell.parts[-2:]),
        f"{len(shocks)} of {len(steps)}",
        str(high),
        f"{norm:.1f}",
        f"{kl:.2f}",
        f"{valid:.2f}",
        *means,
    )
    print(f"| {' | '.join(row)} |")
