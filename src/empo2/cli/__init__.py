"""The command line, a module a command.

Parsing and help need neither torch nor a model; each command imports what it runs.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from empo2 import __version__, config
from empo2.cli import bench, environments, evaluate, experiment, machine, train, warmup
from empo2.errors import Empo2Error, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 failed, 2 asked for something impossible, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        parsed = parser().parse_args(arguments)
        status: int = parsed.command(parsed)
        return status
    except Empo2Error as error:
        print(f"empo2: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\nempo2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk, a folder without permission
        print(f"empo2: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    top = _Parser(prog="empo2", description="Train LLM agents that explore (EMPO²).", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"empo2 {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for module in (train, warmup, evaluate, experiment, environments, machine, bench):
        module.add(commands)
    return top


class _Parser(argparse.ArgumentParser):
    """No abbreviated flags (`--train.step` is a typing error), and a hint for an unknown one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        _, unrecognised, rest = message.partition("unrecognized arguments: ")
        if unrecognised and rest.startswith("--"):
            flag = rest.split()[0].partition("=")[0].removeprefix("--")
            known = [f"{s}.{f.name}" for s, kind in config.sections().items() for f in dataclasses.fields(kind)]
            message = f"there is no setting --{flag}; {config.nearest(flag, known)}"
        super().error(message)
