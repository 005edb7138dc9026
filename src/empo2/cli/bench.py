"""`empo2 bench`: how fast this machine is, and where the time of a recipe's step goes."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from empo2 import config
from empo2.cli.common import Commands, add_settings, chosen_settings, fetch_missing, quiet_libraries
from empo2.errors import UsageError

PARTS = ("collect", "tips", "train", "other")


def add(commands: Commands) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "bench",
        help="how fast this machine is, and what a step costs here",
        description="Measure matrix products and memory of this machine, then training steps of a recipe.",
    )
    command.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a .toml file or a shipped recipe (default: default)"
    )
    command.add_argument(
        "--steps", type=int, default=2, metavar="N", help="steps measured, after one to warm up (default: 2); 0: none"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    add_settings(command)
    command.set_defaults(command=execute)


def execute(parsed: argparse.Namespace) -> int:
    if parsed.steps < 0:
        raise UsageError(f"--steps must be at least 0, got {parsed.steps}")
    if parsed.json and not parsed.json.resolve().parent.is_dir():
        raise UsageError(f"there is no folder {parsed.json.resolve().parent} for --json; make it first")
    name = parsed.recipe or "default"
    recipe = config.from_dict(config.with_overrides(config.read_recipe(name), chosen_settings(parsed)))
    from empo2.assemble import preflight
    from empo2.bench import measure_machine, measure_steps

    quiet_libraries()
    preflight(recipe)
    fetch_missing(recipe, print)
    machine = measure_machine(recipe)
    print("\n".join(machine_lines(machine)), flush=True)
    steps = []
    if parsed.steps:
        print(f"\n{parsed.steps + 1} steps of recipe {name} …", flush=True)
        steps = measure_steps(recipe, parsed.steps)
        print("\n".join(step_lines(steps)))
    if parsed.json:
        found = {"recipe": name, "settings": config.to_dict(recipe), "machine": machine, "steps": steps}
        parsed.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def machine_lines(machine: dict[str, Any]) -> Iterator[str]:
    yield f"{'device':<16}{machine['device']}"
    cores = f"{machine['cores']} cores, {machine['threads']} threads"
    yield f"{'processor':<16}{machine['processor'] or 'unknown'}, {cores}"
    for name, rate in machine["matrix_peak_flops"].items():
        mark = " (fastest)" if name == machine["fastest_precision"] else ""
        yield f"{'matrix peak':<16}{name} {rate / 1e12:.3g} TFLOP/s{mark}"
    yield f"{'memory':<16}{machine['read_bytes_per_second'] / 1e9:.3g} GB/s"


def step_lines(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of medians."""

    def middle(key: str) -> float:
        return median(step[key] for step in steps)

    total = middle("seconds_total")
    told = {
        "collect": f"{middle('num_episodes'):.0f} episodes; {middle('tokens_sampled'):,.0f} tokens sampled, tips among "
        f"them; waited {middle('seconds_environments'):.1f} s for environments",
        "tips": f"{middle('tips_written'):.0f} written and stored",
        "train": f"{middle('tokens_computed'):,.0f} tokens computed, {middle('tokens_trained'):,.0f} trained",
        "other": "novelty, advantages, handing over the weights",
    }
    for part in PARTS:
        seconds = middle(f"seconds_{part}")
        yield f"{part:<16}{seconds:8.2f} s {seconds / total:5.0%}   {told[part]}"
    yield f"{'a step':<16}{total:8.2f} s         {middle('num_episodes') / total * 3600:,.0f} episodes an hour"
    computed, reused = middle("sampler_tokens_computed"), middle("sampler_tokens_reused")
    share = reused / (computed + reused)
    yield f"{'cache hits':<16}{share:8.0%}           of {computed + reused:,.0f} tokens that the sampler looked at"
