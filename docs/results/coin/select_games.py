"""Chooses the games of the comparison by PROTOCOL.md's rules and writes games.md or games-hard.md beside this file.

`python docs/results/coin/select_games.py [hard]`; 3 to 5 minutes a measured game on one core. What the page says
already is not measured again: remove it to begin anew.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from empo2 import config
from empo2.envs.textworld_express import TextWorldExpressEnvironment
from empo2.types import Task

EPISODES, SEED = 1000, 1000


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which games are candidates, and which of them are taken."""

    page: str
    name: str
    candidates: range
    walker: tuple[float, float]  #: success of a random walker, from and to
    policy: tuple[float, float]  #: success of the warmed policy, from and to
    wanted: int  #: games taken, the first ones


RULES = {
    "games": Rule(
        page="games.md",
        name="coin-11",
        candidates=range(100),
        walker=(0.002, 0.02),
        policy=(0.002, 0.02),
        wanted=8,
    ),
    "hard": Rule(
        page="games-hard.md",
        name="coin-10",
        candidates=range(1000),
        walker=(0.002, 0.007),
        policy=(0.002, 0.006),
        wanted=4,
    ),
}


def walkers_success(environment: TextWorldExpressEnvironment, name: str, variation: int, turns: int) -> float:
    """Probability that a walker who takes each action that changes something equally often gets the coin in time."""
    rooms, coin = environment.explore(Task(environment="textworld-express", name=name, variation=variation))
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


def policys_success(name: str, variation: int) -> float:
    """Of the warmed policy, at temperature 1, on the selection seed."""
    command = [sys.executable, "-m", "empo2", "evaluate", config_path(), "--recipe", "coin", "--json"]
    command += ["--split", "train", "--env.tasks", name, "--env.variations", str(variation), "--variations", "1"]
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


def measured_before(page: Path) -> dict[int, float]:
    """What a page says of games, as shares."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return {
        int(game): float(share) / 100
        for game, share in re.findall(r"^\| (\d+) \|.*\| ([\d.]+)% \| \w+ \|$", text, re.M)
    }


def within(share: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= share <= bounds[1]


def taken(rule: Rule, measured: dict[int, float]) -> list[int]:
    """The first games that the rule wants."""
    return [v for v, share in measured.items() if within(share, rule.policy)][: rule.wanted]


def main(which: str = "games") -> None:
    rule = RULES[which]
    page = Path(__file__).parent / rule.page
    turns = int(config.read_recipe("coin")["env"]["max_turns"])
    environment = TextWorldExpressEnvironment("room")
    walker = {variation: walkers_success(environment, rule.name, variation, turns) for variation in rule.candidates}
    environment.close()
    known = measured_before(page)
    measured: dict[int, float] = {}
    for variation in (v for v in rule.candidates if within(walker[v], rule.walker)):
        if variation not in known and len(taken(rule, measured)) == rule.wanted:
            continue
        measured[variation] = known[variation] if variation in known else policys_success(rule.name, variation)
        page.write_text(text(rule, which, walker, measured, turns), encoding="utf-8")
        print(f"game {variation}: {measured[variation]:.2%}", flush=True)


def text(rule: Rule, which: str, walker: dict[int, float], measured: dict[int, float], turns: int) -> str:
    """The page, as far as it is known."""
    low, high = rule.walker
    chosen = taken(rule, measured)
    rows = [
        f"| {v} | {walker[v]:.2%} | {share:.2%} | {'yes' if v in chosen else 'no'} |" for v, share in measured.items()
    ]
    impossible = [v for v in rule.candidates if walker[v] == 0]
    harder = [v for v in rule.candidates if 0 < walker[v] < low]
    easier = [v for v in rule.candidates if walker[v] > high]
    left = [v for v in rule.candidates if within(walker[v], rule.walker) and v not in measured]
    command = "python docs/results/coin/select_games.py" + (f" {which}" if which != "games" else "")
    parts = [
        f"# Games: {', '.join(map(str, chosen))}",
        f"{rule.name}, train games {rule.candidates.start} to {rule.candidates.stop - 1}, {turns} turns; rule: "
        f"PROTOCOL.md; command: `{command}`. Success of a uniformly random walker, computed from the "
        f"map, and of the warmed policy, {EPISODES} episodes at temperature 1, seed {SEED}:",
        "| game | random walker | warmed policy | taken |\n|---|---:|---:|---|\n" + "\n".join(rows),
        f"- not measured{f', as {rule.wanted} were found' if len(chosen) == rule.wanted else ' yet'}: "
        f"{', '.join(map(str, left)) or 'none'}",
        f"- too easy for a random walker (above {high:.1%}), {len(easier)}"
        + (f": {', '.join(map(str, easier))}" if len(rule.candidates) <= 100 else ": all that are not named here"),
        f"- harder than {low:.1%}, {len(harder)}: {', '.join(map(str, harder)) or 'none'}",
        f"- impossible in {turns} turns, {len(impossible)}: {', '.join(map(str, impossible)) or 'none'}",
    ]
    return "\n\n".join(parts[:3]) + "\n\n" + "\n".join(parts[3:]) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
