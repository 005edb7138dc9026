"""What follows a step whose mean gradient norm exceeds the clip limit of 1: a row a cell, from metrics.jsonl.gz.

python docs/results/coin/shocks.py docs/results/coin/longer/cells/coin/*/seed-*
"""

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

print("| cell | such steps | of them KL at least 0.3 | valid actions, change to the next step | after other steps |")
print("|---|---|---|---|---|")
for cell in map(Path, sys.argv[1:]):
    with gzip.open(cell / "metrics.jsonl.gz", "rt", encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    shocks = [step for step in steps if (step["grad_norm"] or 0) > 1]
    after: dict[bool, list[float]] = {True: [], False: []}
    for one, two in pairwise(steps):
        after[(one["grad_norm"] or 0) > 1].append(two["valid_action_rate"] - one["valid_action_rate"])
    means = [f"{sum(found) / len(found):+.3f}" if found else "—" for found in (after[True], after[False])]
    high = sum((step["kl"] or 0) >= 0.3 for step in shocks)
    print(f"| {'/'.join(cell.parts[-2:])} | {len(shocks)} of {len(steps)} | {high} | {means[0]} | {means[1]} |")
