"""How many episodes of each step have 50 points or more, and how many steps had equal scores only (one group a step).

python docs/results/scienceworld/good.py runs/scienceworld/default/*/seed-*/
"""

import gzip
import json
import sys
from pathlib import Path

GOOD = 50

for run in map(Path, sys.argv[1:]):
    steps = [
        [json.loads(line)["score"] for line in gzip.decompress(path.read_bytes()).splitlines()]
        for path in sorted((run / "trajectories").glob("step_*.jsonl.gz"))
    ]
    good = [sum(score >= GOOD for score in scores) for scores in steps]
    equal = sum(len(set(scores)) == 1 for scores in steps)
    print(f"{run.parent.name}/{run.name}: {' '.join(map(str, good))}; equal scores in {equal} of {len(steps)} steps")
