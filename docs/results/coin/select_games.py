"""Chooses the games of the comparison by PROTOCOL.md's rule and writes games.md beside this file.

`python docs/results/coin/select_games.py`; about 5 minutes a measured game on one core. What
games.md says already is not measured again: remove it to begin anew.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from empo2 import config
from empo2.envs.textworld_express import TextWorldExpressEnvironment
from empo2.types import Task

CANDIDATES = range(100)
LOW, HIGH, WANTED, EPISODES, SEED = 0.002, 0.02, 8, 1000, 1000
NAME = "coin-11"
PAGE = Path(__file__).parent / "games.md"


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
    command += [
        "--train.threads",
        "1",
        "--episodes",
        str(EPISODES),
        "--eval.temperature",
        "1.0",
        "--train.seed",
        str(SEED),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["success_rate"])


def config_path() -> str:
    return str(config.read_recipe("coin")["model"]["path"])


def measured_before() -> dict[int, float]:
    """What games.md says of games, as shares."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return {
        int(game): float(share) / 100
        for game, share in re.findall(r"^\| (\d+) \|.*\| ([\d.]+)% \| \w+ \|$", text, re.M)
    }


def main() -> None:
    turns = int(config.read_recipe("coin")["env"]["max_turns"])
    environment = TextWorldExpressEnvironment("room")
    walker = {variation: walkers_success(environment, variation, turns) for variation in CANDIDATES}
    environment.close()
    known = measured_before()
    measured: dict[int, float] = {}
    for variation in (v for v in CANDIDATES if LOW <= walker[v] <= HIGH):
        if sum(LOW <= share <= HIGH for share in measured.values()) == WANTED:
            break
        measured[variation] = known[variation] if variation in known else policys_success(variation)
        write(walker, measured, turns)
        print(f"game {variation}: {measured[variation]:.2%}", flush=True)


def write(walker: dict[int, float], measured: dict[int, float], turns: int) -> None:
    """games.md, as far as it is known."""
    chosen = [v for v, share in measured.items() if LOW <= share <= HIGH]
    rows = [
        f"| {v} | {walker[v]:.2%} | {share:.2%} | {'yes' if v in chosen else 'no'} |" for v, share in measured.items()
    ]
    impossible = [v for v in CANDIDATES if walker[v] == 0]
    harder = [v for v in CANDIDATES if 0 < walker[v] < LOW]
    easier = [v for v in CANDIDATES if walker[v] > HIGH]
    left = [v for v in CANDIDATES if LOW <= walker[v] <= HIGH and v not in measured]
    text = [
        f"# Games: {', '.join(map(str, chosen))}",
        f"{NAME}, train games {CANDIDATES.start} to {CANDIDATES.stop - 1}, {turns} turns; rule: PROTOCOL.md; "
        "command: `python docs/results/coin/select_games.py`. Success of a uniformly random walker, computed from the "
        f"map, and of the warmed policy, {EPISODES} episodes at temperature 1, seed {SEED}:",
        "| game | random walker | warmed policy | taken |\n|---|---:|---:|---|\n" + "\n".join(rows),
        f"- not measured, as {WANTED} were found: {', '.join(map(str, left)) or 'none'}",
        f"- too easy for a random walker (above {HIGH:.0%}), {len(easier)}: {', '.join(map(str, easier))}",
        f"- harder than {LOW:.1%}, {len(harder)}: {', '.join(map(str, harder)) or 'none'}",
        f"- impossible in {turns} turns, {len(impossible)}: {', '.join(map(str, impossible)) or 'none'}",
    ]
    PAGE.write_text("\n\n".join(text[:3]) + "\n\n" + "\n".join(text[3:]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
