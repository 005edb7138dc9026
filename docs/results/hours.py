"""Hours of training steps of a study's cells, added up: one core each, evaluations and loading not counted.

python docs/results/hours.py docs/results/small/*/
"""

import gzip
import json
import sys
from pathlib import Path

for folder in map(Path, sys.argv[1:]):
    seconds = 0.0
    for metrics in folder.glob("cells/*/*/*/metrics.jsonl.gz"):
        with gzip.open(metrics, "rt", encoding="utf-8") as file:
            seconds += sum(float(json.loads(line)["seconds_total"]) for line in file)
    print(f"{folder.name}: {seconds / 3600:.1f}")
