"""`empo2 experiment`."""

import argparse
from pathlib import Path

from empo2.cli.common import Commands, quiet_libraries
from empo2.errors import UsageError


def add(commands: Commands) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "experiment",
        help="compare algorithms over tasks and seeds",
        description="Run an experiment file's cells (arms × tasks × seeds of `empo2 train`), some at once, go on where "
        "an earlier call was stopped, and write the report: results.md, results.json, curves.",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="a .toml file (docs/experiments.md)")
    command.add_argument("--out", type=Path, metavar="DIR", help="run folders (default: runs/experiment-NAME)")
    command.add_argument("--results", type=Path, metavar="DIR", help="the report (default: OUT/results)")
    command.add_argument("--jobs", type=int, metavar="N", help="cells at once (default: as cores allow)")
    command.add_argument("--arm", action="append", metavar="NAME", help="this arm only (may be repeated)")
    command.add_argument("--report", action="store_true", help="run nothing: only write the report anew")
    command.set_defaults(command=execute)


def execute(parsed: argparse.Namespace) -> int:
    from empo2 import experiment

    quiet_libraries()
    plan = experiment.load(parsed.file)
    out = parsed.out or Path("runs") / f"experiment-{plan.name}"
    results = parsed.results or out / "results"
    if parsed.report:
        if parsed.arm or parsed.jobs is not None:
            raise UsageError("--report runs nothing, so that --arm and --jobs mean nothing; leave them out")
        experiment.report(plan, out, results)
        print(f"report: {results / 'results.md'}")
        return 0
    return experiment.run(plan, out, results, parsed.jobs, parsed.arm, lambda text: print(text, flush=True))
