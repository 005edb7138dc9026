"""How an arm explores games that it has not met: moves straight back, and rooms seen in an episode, by ten steps.

Only episodes of games that no earlier step of the run solved, without and with tips shown: of two moves in a row, the
share that ends where it began; rooms in an episode; episodes.

python docs/results/coin/back_and_forth.py runs/coin-tuning-80/coin/empo2-4e-5/seed-5 …
"""

import collections
import gzip
import json
import re
import sys
from pathlib import Path

BLOCK = 10  #: steps


def room(state: str) -> str:
    found = re.match(r"You are in the ([\w ]+)\.", state)
    return found[1] if found else ""


print("| run | steps | tips | straight back | rooms | episodes |\n|---|---|---|---|---|---|")
for run in map(Path, sys.argv[1:]):
    solved: set[int] = set()
    back: dict[tuple[int, bool], list[bool]] = collections.defaultdict(list)
    rooms: dict[tuple[int, bool], list[int]] = collections.defaultdict(list)
    for path in sorted((run / "trajectories").glob("step_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            episodes = [json.loads(line) for line in file]
        for episode in episodes:
            if episode["task"]["variation"] in solved:
                continue
            key = (episode["step"] - 1) // BLOCK, any(turn["tips"] for turn in episode["turns"])
            seen = [room(state) for state in (*(turn["state"] for turn in episode["turns"]), episode["final_state"])]
            back[key] += [first == third for first, third in zip(seen, seen[2:], strict=False)]
            rooms[key].append(len(set(seen)))
        solved |= {episode["task"]["variation"] for episode in episodes if episode["success"]}
    for (block, shown), moves in sorted(back.items()):
        of = rooms[block, shown]
        row = (
            "/".join(run.parts[-2:]),
            f"{block * BLOCK + 1}–{(block + 1) * BLOCK}",
            "shown" if shown else "none",
            f"{sum(moves) / len(moves):.2f}",
            f"{sum(of) / len(of):.1f}",
            str(len(of)),
        )
        print(f"| {' | '.join(row)} |")
