"""`empo2 warmup`."""

import argparse

from empo2 import config
from empo2.cli.common import Commands, add_settings, chosen_settings, quiet_libraries


def add(commands: Commands) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "warmup",
        help="teach a model too small to act how to act and how to read tips",
        description="Imitate random walks in other games than the recipe's ([warmup] in it says how), write the model "
        "to the recipe's model.path, and measure it.",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a .toml file or a shipped recipe")
    add_settings(command)
    command.set_defaults(command=execute)


def execute(parsed: argparse.Namespace) -> int:
    from empo2.display import updates_told
    from empo2.warmup import warm_up

    quiet_libraries()
    recipe = config.from_dict(config.with_overrides(config.read_recipe(parsed.recipe), chosen_settings(parsed)))
    with updates_told(recipe.warmup.updates) as told:
        note = warm_up(recipe, told)
    print(f"warmed model: {recipe.model.path}")
    print(f"score on the recipe's tasks: {note['score']:.4f} ({note['episodes']} episodes without tips)")
    for kind, what in (("tips", "a walk to the goal"), ("failures", "failed walks")):
        if f"others_with_{kind}_score" in note:
            without, shown = (note[f"others_{with_tips}_{kind}_score"] for with_tips in ("without", "with"))
            episodes = note[f"others_with_{kind}_episodes"]
            print(
                f"other games: {without:.3f} without tips, {shown:.3f} with those of {what} ({episodes} episodes each)"
            )
    return 0
