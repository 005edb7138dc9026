"""Which ways an arm takes in each game: of its episodes without tips in a range of training steps, the share that
succeeds, the first moves, and the commonest way.

python docs/results/coin/ways.py 231 240 runs/coin-hard/coin/grpo-without-kl/seed-36 …
"""

import collections
import gzip
import json
import sys
from pathlib import Path

from empo2.report.tables import table

first, last, rows = int(sys.argv[1]), int(sys.argv[2]), []
for run in map(Path, sys.argv[3:]):
    ways: dict[int, list[tuple[tuple[str, ...], bool]]] = collections.defaultdict(list)
    for step in range(first, last + 1):
        with gzip.open(run / "trajectories" / f"step_{step:06d}.jsonl.gz", "rt", encoding="utf-8") as file:
            for episode in map(json.loads, file):
                if not any(turn["tips"] for turn in episode["turns"]):
                    way = tuple(turn["action"].removeprefix("move ") for turn in episode["turns"])
                    ways[episode["task"]["variation"]].append((way, episode["success"]))
    for game, found in sorted(ways.items()):
        starts = collections.Counter(way[0] for way, _ in found)
        commonest, times = collections.Counter(way for way, _ in found).most_common(1)[0]
        rows.append(
            [
                "/".join(run.parts[-2:]),
                str(game),
                f"{sum(success for _, success in found)} of {len(found)}",
                ", ".join(f"{move} {count}" for move, count in starts.most_common()),
                f"{', '.join(commonest)} ({times})",
            ]
        )
print(table(["run", "game", "solved", "first moves", "commonest way"], rows))
