"""Chooses the games of the comparison by PROTOCOL.md's rule and writes games.md beside this file.

`python docs/results/coin/select_games.py`, after `empo2 warmup coin`; about 20 minutes on one core.
"""

import json
import subprocess
import sys
from pathlib import Path

from empo2 import config
from empo2.envs.textworld_express import TextWorldExpressEnvironment
from empo2.types import Task

CANDIDATES = range(100)
LOW, HIGH, WANTED, EPISODES, SEED = 0.002, 0.02, 4, 1000, 1000
NAME = "coin-11"


def walkers_success(environment: TextWorldExpressEnvironment, variation: int, turns: int) -> float:
    """Probability that a walker who takes each action that changes something equally often gets the coin in time."""
    rooms, coin = environment.explore(Task(environment="textworld-express", name=NAME, variation=variation))
    where, success = {next(iter(rooms)): 1.0}, 0.0
    for _ in range(turns):
        after: dict[str, float] = {}
        for room, mass in where.items():
            share = mass / (len(rooms[room]) + (room == coin))
            success += share * (room == coin)
            for behind, _ in rooms[room].values():
                after[behind] = after.get(behind, 0.0) + share
        where = after
    return success


def policys_success(variation: int) -> float:
    """Of the warmed policy, at temperature 1, on the selection seed."""
    command = [sys.executable, "-m", "empo2", "evaluate", config_path(), "--recipe", "coin", "--json"]
    command += ["--split", "train", "--env.variations", str(variation), "--variations", "1"]
    command += ["--episodes", str(EPISODES), "--eval.temperature", "1.0", "--train.seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["success_rate"])


def config_path() -> str:
    return str(config.read_recipe("coin")["model"]["path"])


def main() -> None:
    turns = int(config.read_recipe("coin")["env"]["max_turns"])
    environment = TextWorldExpressEnvironment("room")
    walker = {variation: walkers_success(environment, variation, turns) for variation in CANDIDATES}
    environment.close()
    chosen: list[int] = []
    rows = []
    for variation in (v for v in CANDIDATES if LOW <= walker[v] <= HIGH):
        if len(chosen) == WANTED:
            break
        measured = policys_success(variation)
        taken = LOW <= measured <= HIGH
        chosen += [variation] if taken else []
        rows.append(f"| {variation} | {walker[variation]:.2%} | {measured:.2%} | {'yes' if taken else 'no'} |")
        print(rows[-1], flush=True)
    impossible = [v for v in CANDIDATES if walker[v] == 0]
    harder = [v for v in CANDIDATES if 0 < walker[v] < LOW]
    easier = [v for v in CANDIDATES if walker[v] > HIGH]
    left = [v for v in CANDIDATES if LOW <= walker[v] <= HIGH][len(rows) :]
    text = [
        f"# Games: {', '.join(map(str, chosen))}",
        f"{NAME}, train games {CANDIDATES.start} to {CANDIDATES.stop - 1}, {turns} turns; rule: PROTOCOL.md; "
        "command: `python docs/results/coin/select_games.py`. Success of a uniformly random walker, computed from the "
        f"map, and of the warmed policy, {EPISODES} episodes at temperature 1, seed {SEED}:",
        "| game | random walker | warmed policy | taken |\n|---|---:|---:|---|\n" + "\n".join(rows),
        f"- not measured, as four were found: {', '.join(map(str, left)) or 'none'}",
        f"- too easy for a random walker (above {HIGH:.0%}), {len(easier)}: {', '.join(map(str, easier))}",
        f"- harder than {LOW:.1%}, {len(harder)}: {', '.join(map(str, harder)) or 'none'}",
        f"- impossible in {turns} turns, {len(impossible)}: {', '.join(map(str, impossible)) or 'none'}",
    ]
    (Path(__file__).parent / "games.md").write_text("\n\n".join(text[:3]) + "\n\n" + "\n".join(text[3:]) + "\n")


if __name__ == "__main__":
    main()
