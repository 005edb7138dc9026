"""How often each game was solved, by ten training steps, without and with tips shown: from the trajectories of runs.

python docs/results/coin/by_game.py runs/coin-tuning/coin/empo2-2e-5/seed-6 …
"""

import collections
import gzip
import json
import sys
from pathlib import Path

BLOCK = 10  #: steps

for run in map(Path, sys.argv[1:]):
    counts: dict[int, dict[tuple[int, bool], list[int]]] = collections.defaultdict(
        lambda: collections.defaultdict(lambda: [0, 0])
    )
    for path in sorted((run / "trajectories").glob("step_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for episode in map(json.loads, file):
                shown = episode["mode"] != "plain" and any(turn["tips"] for turn in episode["turns"])
                count = counts[episode["task"]["variation"]][(episode["step"] - 1) // BLOCK, shown]
                count[0] += episode["success"]
                count[1] += 1
    blocks = sorted({block for games in counts.values() for block, _ in games})
    print(f"## {'/'.join(run.parts[-2:])}\n\nSolved, of episodes without tips · with tips, by steps:\n")
    print("| game |" + "".join(f" {block * BLOCK + 1}–{(block + 1) * BLOCK} |" for block in blocks))
    print("|---|" + "---|" * len(blocks))
    for game, of_game in sorted(counts.items()):
        cells = [[of_game.get((block, shown), [0, 0]) for shown in (False, True)] for block in blocks]
        print(f"| {game} |" + "".join(f" {a}/{n} · {b}/{m} |" for (a, n), (b, m) in cells))
    print()
