"""How many houses each arm met (solved at least once in training), and how many it solves without tips, after N steps.

The latter is the score times the number of houses: two houses that are solved half of the time count as one.

python docs/results/small/met.py docs/results/small/locks-kl 60
"""

import gzip
import json
import sys
from pathlib import Path

HOUSES = 4

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
print("| task | arm | houses | met | solved without tips |\n|---|---|---:|---:|---:|")
for arm in sorted((folder / "cells").glob("*/*")):
    seeds = sorted(arm.glob("seed-*"))
    met, solved = 0, 0.0
    for seed in seeds:
        with gzip.open(seed / "metrics.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [line for line in map(json.loads, file) if line["step"] <= steps]
        met += len({task for line in lines for task in line["solved_tasks"]})
        evaluations = map(json.loads, (seed / "evaluations.jsonl").read_text(encoding="utf-8").splitlines())
        (score,) = (line["eval_train_score_mean"] for line in evaluations if line["step"] == steps)
        solved += HOUSES * score
    print(f"| {arm.parent.name} | {arm.name} | {HOUSES * len(seeds)} | {met} | {solved:.0f} |")
