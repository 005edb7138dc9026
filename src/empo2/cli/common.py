"""What commands share: a flag for every setting, fetching of models, quiet libraries."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from empo2 import config
from empo2.config import Config

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


class _Setting(argparse.Action):
    """Collects `--section.field VALUE` pairs in order."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = self.metavar_name
        namespace.settings = [*getattr(namespace, "settings", []), (name, values)]

    metavar_name: str = ""


def add_settings(command: argparse.ArgumentParser) -> None:
    """One flag a config field, grouped by section, its docstring as help."""
    command.set_defaults(settings=[])
    command.add_argument("--model", dest="model_path", metavar="PATH", help="short for --model.path")
    for section, kind in config.sections().items():
        group = command.add_argument_group(f"[{section}]")
        texts = config.field_help(kind)
        for field in dataclasses.fields(kind):
            name = f"{section}.{field.name}"
            default = config.to_dict(Config())[section][field.name]
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            text = f"{texts[field.name]} (default: {shown})".replace("%", "%%")
            action = group.add_argument(f"--{name}", action=_Setting, metavar="VALUE", help=text)
            action.metavar_name = name  # type: ignore[attr-defined]


def chosen_settings(parsed: argparse.Namespace) -> list[tuple[str, Any]]:
    chosen = list(parsed.settings)
    return [*chosen, ("model.path", parsed.model_path)] if parsed.model_path else chosen


def fetch_missing(recipe: Config, say: Callable[[str], None]) -> None:
    """Fetch the default policy and the embedder, if the recipe uses them and they are not there."""
    from empo2 import models
    from empo2.assemble import needed_models

    for name in needed_models(recipe):
        say(f"fetching {name} (once) …")
        models.fetch(name)


def quiet_libraries() -> None:
    """transformers draws progress bars of its own; they say nothing here."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
