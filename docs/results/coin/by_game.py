"""How often each game was solved, by ten training steps, without and with tips shown: from the trajectories of runs.

Below: the groups without a success that moved the weights all the same, by novelty alone; and how often the coin was
taken, of the turns without tips that showed it. At the end, for all runs of an arm: how many games were met (solved at
least once), and how many would have been by their start success (games.md, games-hard.md) in the same groups: those up
to a game's first success; in all, and by ten steps.

python docs/results/coin/by_game.py runs/coin-tuning/coin/empo2-2e-5/seed-6 …
"""

import collections
import gzip
import json
import re
import sys
import tomllib
from pathlib import Path

BLOCK = 10  #: steps
START: dict[tuple[str, int], float] = {}  # (task, game) → success of the warmed policy
for page in ("games.md", "games-hard.md"):
    written = Path(__file__).with_name(page).read_text(encoding="utf-8")
    (task,) = re.findall(r"^(coin-\d+), ", written, re.M)
    for game, percent in re.findall(r"^\| (\d+) \|.*\| ([\d.]+)% \| yes", written, re.M):
        START[task, int(game)] = float(percent) / 100
met: dict[str, dict[int, list[float]]] = collections.defaultdict(  # arm → ten steps → games met, expected
    lambda: collections.defaultdict(lambda: [0, 0.0])
)
games_of: dict[str, int] = collections.Counter()  # arm → games

for run in map(Path, sys.argv[1:]):
    skip_below = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["advantage"]["skip_below"]
    counts: dict[tuple[str, int], dict[tuple[int, bool], list[int]]] = collections.defaultdict(
        lambda: collections.defaultdict(lambda: [0, 0])
    )
    by_novelty: dict[int, list[int]] = collections.defaultdict(lambda: [0, 0])
    taken: dict[int, list[int]] = collections.defaultdict(lambda: [0, 0])
    solved: set[tuple[str, int]] = set()
    for path in sorted((run / "trajectories").glob("step_*.jsonl.gz")):
        groups = collections.defaultdict(list)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for episode in map(json.loads, file):
                groups[episode["step"], episode["group"]].append(episode)
        for (step, _), episodes in groups.items():
            block = (step - 1) // BLOCK
            for episode in episodes:
                shown = episode["mode"] != "plain" and any(turn["tips"] for turn in episode["turns"])
                count = counts[episode["task"]["name"], episode["task"]["variation"]][block, shown]
                count[0] += episode["success"]
                count[1] += 1
                seen = [turn for turn in episode["turns"] if "coin" in turn["observation"] and not turn["tips"]]
                taken[block][0] += sum(turn["action"] == "take coin" for turn in seen)
                taken[block][1] += len(seen)
            largest = max(abs(turn["advantage"]) for episode in episodes for turn in episode["turns"])
            unsolved = not any(episode["success"] for episode in episodes)
            game = episodes[0]["task"]["name"], episodes[0]["task"]["variation"]
            if game not in solved and game in START:
                met[run.parts[-2]][block][0] += not unsolved
                met[run.parts[-2]][block][1] += 1 - (1 - START[game]) ** len(episodes)
            if not unsolved:
                solved.add(game)
            by_novelty[block][0] += unsolved and largest > skip_below
            by_novelty[block][1] += unsolved
    games_of[run.parts[-2]] += len(counts.keys() & START.keys())
    blocks = sorted(by_novelty)
    last = max(step for step, _ in groups)  # of the last file
    print(f"## {'/'.join(run.parts[-2:])}\n\nSolved, of episodes without tips · with tips, by steps:\n")
    print("| game |" + "".join(f" {block * BLOCK + 1}–{min((block + 1) * BLOCK, last)} |" for block in blocks))
    print("|---|" + "---|" * len(blocks))
    for (_, number), of_game in sorted(counts.items()):
        cells = [[of_game.get((block, shown), [0, 0]) for shown in (False, True)] for block in blocks]
        print(f"| {number} |" + "".join(f" {a}/{n} · {b}/{m} |" for (a, n), (b, m) in cells))
    for name, of_block in (("groups without a success, trained by novelty alone", by_novelty), ("coin taken", taken)):
        print(f"| {name} |" + "".join(f" {of_block[block][0]} of {of_block[block][1]} |" for block in blocks))
    print()
longest = max((max(of_block) for of_block in met.values()), default=-1)
steps = "".join(f" {block * BLOCK + 1}–{(block + 1) * BLOCK} |" for block in range(longest + 1))
print(f"## Games met (by start success)\n\n| arm | games | met |{steps}\n|---|---|---|" + "---|" * (longest + 1))
for arm, of_block in met.items():
    total = [sum(of_block[block][i] for block in range(longest + 1)) for i in (0, 1)]
    cells = "".join(f" {of_block[b][0]:.0f} ({of_block[b][1]:.1f}) |" for b in range(longest + 1))
    print(f"| {arm} | {games_of[arm]} | {total[0]:.0f} ({total[1]:.1f}) |{cells}")
