"""What the episodes of a training score with tips and without, from one step on.

python docs/results/scienceworld/by_mode.py 7 docs/results/scienceworld/scienceworld/cells/default/empo2*/seed-*
"""

import gzip
import json
import sys
from pathlib import Path

TIPPED = ("with_tips", "distill")


def mean(lines: list[dict], modes: tuple[str, ...]) -> str:
    """Over all episodes of these modes; a step notes their number and, where there are any, their mean score."""
    pairs = [(line[f"mode_{mode}"], line[f"score_{mode}"]) for line in lines for mode in modes if line[f"mode_{mode}"]]
    number = sum(count for count, _ in pairs)
    return f"{sum(count * score for count, score in pairs) / number:.1f} ({int(number)} episodes)"


first = int(sys.argv[1])
for cell in map(Path, sys.argv[2:]):
    text = gzip.decompress((cell / "metrics.jsonl.gz").read_bytes()).decode("utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if line["step"] >= first]
    print(f"{cell.parent.name}/{cell.name}: with tips {mean(lines, TIPPED)}, without {mean(lines, ('plain',))}")
