"""The experiment file → cells with whole recipes; whatever cannot be compared is refused before anything runs.

A recipe is put together from the experiment's recipe, then [settings], then the task's, then the arm's settings.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empo2 import config as configs
from empo2.algorithms import algorithm
from empo2.config import Config, nearest
from empo2.errors import ConfigError

#: key → kind and default (None: it must be there); what each means: `Experiment`
TOP_KEYS: dict[str, tuple[type, Any]] = {
    "name": (str, None),
    "recipe": (str, None),  # a file beside the experiment file, or a shipped recipe's name
    "compare": (list, None),
    "also_compare": (list, []),  # further pairs of arms, each with a verdict and a table of its own below the first
    "seeds": (list, None),
    "arms": (dict, None),  # a table an arm: settings, and seeds of its own if it has fewer
    "measure": (str, "eval_train_score_mean"),
    "threads": (int, 1),
    "evaluate_tips": (bool, False),  # after training: without tips; arms that act with tips, also with own and other
    "tips_temperature": (float, -1.0),  # of those evaluations; -1: the recipe's
    "tips_episodes": (int, 16),
    "keep_checkpoints": (bool, False),
    "ratio_from": (float, 0.1),
    "settings": (dict, {}),  # over the recipe, for all cells
    "tasks": (dict, {}),  # a table a task: settings that make it; without any there is the recipe's own
}
_KIND_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}

#: what all arms of a task must have in common, beside whole sections
EQUAL_SECTIONS = ("model", "env", "eval", "prompt")
EQUAL_KEYS = ("collect.groups_per_step", "collect.group_size", "collect.max_action_tokens")
#: settings and whole sections that cannot change a training's numbers
WITHOUT_EFFECT = ("train.checkpoint_every", "train.keep_checkpoints", "learner.recompute", "warmup")
LARGEST = 10**6  #: of any number at the top of the file
SET_BY_EXPERIMENT = {"train.seed": "seeds", "train.threads": "threads"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training: an arm on a task with a seed."""

    task: str
    arm: str
    seed: int
    recipe: Config
    evaluates: tuple[str, ...]  #: afterwards, with tips: `none`; arms that act with tips also `own` and `other`
    asked: Mapping[str, float]  #: of those evaluations: episodes a variation, temperature

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, seed {self.seed}"

    @property
    def place(self) -> Path:
        """Of its folder, below the out folder and below the results' `cells`."""
        return Path(slug(self.task)) / slug(self.arm) / f"seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A checked experiment file."""

    path: Path
    name: str
    measure: str  #: key of evaluations.jsonl
    compare: tuple[str, str]  #: arms; differences are the first minus the second
    also_compare: tuple[tuple[str, str], ...]  #: further pairs
    threads: int  #: of the tensor library, a cell
    tips_episodes: int  #: episodes a variation of each evaluation after training
    tips_temperature: float  #: of those evaluations; negative: the recipe's
    keep_checkpoints: bool  #: else they are deleted once a cell is done
    ratio_from: float  #: smallest score of the second arm, in the measure's units, for which a ratio is given
    tasks: tuple[str, ...]
    seeds: Mapping[str, tuple[int, ...]]  #: arm → seeds
    cells: tuple[Cell, ...]  #: in the order they run: seeds outermost, so that partial results compare all arms


def slug(name: str) -> str:
    """A name as a folder: "GRPO + novelty" → "grpo-novelty"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def load(path: Path) -> Experiment:
    """Read and check an experiment file. Raises ConfigError; no model is loaded and nothing is written."""
    if not path.is_file():
        raise ConfigError(f"there is no experiment file {path}; name a .toml file")
    values = _top_values(configs.read_toml(path))
    _check_top(values)
    recipe_values = configs.read_recipe(values["recipe"], path.parent)
    arms, seeds = _arms(values)
    tasks = {name: _settings(f"tasks.{name}", entries) for name, entries in values["tasks"].items()}
    tasks = tasks or {Path(values["recipe"]).stem: []}
    for kind, names in (("arms", list(arms)), ("tasks", list(tasks))):
        _check_slugs(kind, names)
    compare, also = _pairs(values, seeds)
    common = _settings("settings", values["settings"])
    recipes = {
        (task, arm): _merged(f"task {task!r}, arm {arm!r}", recipe_values, [*common, *of_task, *of_arm])
        for task, of_task in tasks.items()
        for arm, of_arm in arms.items()
    }
    for task in tasks:
        check_comparable({arm: recipes[task, arm] for arm in arms}, compare)
    _check_tasks({task: [recipes[task, arm] for arm in arms] for task in tasks})
    _check_measure(values["measure"], list(recipes.values()))
    if values["evaluate_tips"] and not any(recipe.modes.p > 0 for recipe in recipes.values()):
        raise ConfigError("evaluate_tips = true, but no arm acts with tips (modes.p is 0 in all); set it to false")
    return Experiment(
        path=path,
        compare=compare,
        also_compare=also,
        tasks=tuple(tasks),
        seeds=seeds,
        cells=tuple(_cells(recipes, seeds, values)),
        **{
            key: values[key]
            for key in (
                "name",
                "measure",
                "threads",
                "tips_episodes",
                "tips_temperature",
                "keep_checkpoints",
                "ratio_from",
            )
        },
    )


def _top_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of the file with its value or default, of the right kind."""
    for key in given:
        if key not in TOP_KEYS:
            raise ConfigError(f"unknown key {key} in the experiment file; {nearest(key, list(TOP_KEYS))}")
    values = {}
    for key, (kind, default) in TOP_KEYS.items():
        if key not in given and default is None:
            raise ConfigError(f"the experiment file has no {key} ({_KIND_NAMES[kind]}); add it")
        value = given.get(key, default)
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not fits or isinstance(value, bool) != (kind is bool):
            raise ConfigError(f"{key} = {value!r} must be {_KIND_NAMES[kind]}; set {key}")
        if kind is str and not value.strip():
            raise ConfigError(f"{key} is empty; set {key}")
        values[key] = value
    return values


def _check_top(values: Mapping[str, Any]) -> None:
    """Refuse numbers out of range, and names that cannot be folders."""
    for key, smallest in (("threads", 1), ("tips_episodes", 1), ("ratio_from", 0)):
        if not smallest <= values[key] <= LARGEST:
            raise ConfigError(f"{key} must be between {smallest} and {LARGEST}, got {values[key]}; set {key}")
    temperature = values["tips_temperature"]
    if not (temperature == -1 or 0 <= temperature <= LARGEST):
        raise ConfigError(
            f"tips_temperature must be at least 0, or -1 for the recipe's, got {temperature}; set tips_temperature"
        )
    for kind, names in (("name", [values["name"]]), ("arms", values["arms"]), ("tasks", values["tasks"])):
        for name in names:
            if not name.isprintable():
                raise ConfigError(f"{kind}: {name!r} holds line breaks or control characters; rename it")
    if Path(values["name"]).name != values["name"] or values["name"] == "..":
        raise ConfigError(f"name = {values['name']!r} must be a name without folders; set name")


def _arms(values: Mapping[str, Any]) -> tuple[dict[str, list[tuple[str, Any]]], dict[str, tuple[int, ...]]]:
    """Arm → settings, and arm → seeds."""
    if not values["arms"]:
        raise ConfigError("the experiment file has no arms; add at least two tables such as [arms.empo2]")
    seeds = {}
    arms = {}
    for arm, entries in values["arms"].items():
        if not isinstance(entries, Mapping):
            raise ConfigError(f"arms.{arm} = {entries!r} must be a table; write it as [arms.{arm}] with settings below")
        own = {key: value for key, value in entries.items() if key != "seeds"}
        seeds[arm] = _seeds(
            f"arms.{arm}.seeds" if "seeds" in entries else "seeds", entries.get("seeds", values["seeds"])
        )
        arms[arm] = _settings(f"arms.{arm}", own)
    return arms, seeds


def _seeds(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name} = {values!r} must be a list of at least one seed; set {name}, such as [11, 12, 13]")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name} holds {value!r}, but a seed is a whole number from 0; set {name}")
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{name} names seed {value} twice, and equal seeds give equal runs; name each once")
    return tuple(values)


def _settings(place: str, entries: Any) -> list[tuple[str, Any]]:
    """`"section.key" = value` pairs; a quoted key and a dotted one mean the same."""
    if not isinstance(entries, Mapping):
        raise ConfigError(f"{place} = {entries!r} must be a table; write it as [{place}] with settings below it")
    found = []
    for name, value in entries.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        found += [(f"{name}.{key}" if key else name, setting) for key, setting in inner]
    for name, _ in found:
        if sum(name == other for other, _ in found) > 1:
            raise ConfigError(f"[{place}] sets {name} twice; set it once")
        if name in SET_BY_EXPERIMENT:
            raise ConfigError(f"[{place}] sets {name}, which {SET_BY_EXPERIMENT[name]!r} sets; remove it there")
        if name.count(".") != 1:
            raise ConfigError(f'[{place}] {name!r} is not a setting; settings are written "section.key" = value')
    return found


def _check_slugs(kind: str, names: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for name in names:
        folder = slug(name)
        if not folder:
            raise ConfigError(f"{kind}: {name!r} gives no folder name; use letters or digits")
        if folder in known:
            raise ConfigError(f"{kind}: {known[folder]!r} and {name!r} would share the folder {folder}; rename one")
        known[folder] = name


def _pair(key: str, named: Any, seeds: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Two arms that share a seed."""
    if not isinstance(named, list) or len(named) != 2:
        raise ConfigError(f"{key} = {named!r} must name two arms, the first minus the second; set {key}")
    for arm in named:
        if not isinstance(arm, str) or arm not in seeds:
            raise ConfigError(f"{key} names {arm!r}, which is no arm; {nearest(str(arm), list(seeds))}")
    first, second = named
    if first == second:
        raise ConfigError(f"{key} names {first!r} twice; name two arms")
    if not set(seeds[first]) & set(seeds[second]):
        raise ConfigError(
            f"{key} names {first!r} (seeds {list(seeds[first])}) and {second!r} (seeds {list(seeds[second])}), which "
            "share no seed, and arms are compared seed by seed; set their seeds"
        )
    return first, second


def _pairs(
    values: Mapping[str, Any], seeds: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, str], tuple[tuple[str, str], ...]]:
    """The compared arms, and the further pairs."""
    compare = _compare(values["compare"], seeds)
    also = [_pair("also_compare", pair, seeds) for pair in values["also_compare"]]
    if repeated := [pair for index, pair in enumerate(also) if pair in [compare, *also[:index]]]:
        raise ConfigError(f"also_compare names {list(repeated[0])}, which is compared already; name each pair once")
    return compare, tuple(also)


def _compare(named: Sequence[Any], seeds: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    first, second = _pair("compare", named, seeds)
    if set(seeds[first]) != set(seeds[second]):
        raise ConfigError(
            f"the compared arms {first!r} (seeds {list(seeds[first])}) and {second!r} (seeds {list(seeds[second])}) "
            "must have equal seeds, as they are paired by seed; set their seeds"
        )
    for arm, own in seeds.items():
        if not set(own) & set(seeds[first]):
            raise ConfigError(
                f"arm {arm!r} (seeds {list(own)}) shares no seed with {first!r} ({list(seeds[first])}), and arms are "
                "compared seed by seed; set its seeds"
            )
    return first, second


def _merged(where: str, recipe: Mapping[str, Any], settings: Sequence[tuple[str, Any]]) -> Config:
    try:
        made = configs.from_dict(configs.with_overrides(recipe, settings))
        algorithm(made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return made


def flat(recipe: Config) -> dict[str, Any]:
    """`section.key` → value."""
    return {f"{s}.{key}": value for s, entries in configs.to_dict(recipe).items() for key, value in entries.items()}


def check_comparable(recipes: Mapping[str, Config], compare: tuple[str, str]) -> None:
    """Raise ConfigError unless the arms of a task spend their budget on the same thing.

    More steps are allowed, so that a faster arm can be shown at equal seconds; a learning rate that depends on the
    number of steps is not, as the scores on the way would then be those of another schedule.
    """
    values = {arm: flat(recipe) for arm, recipe in recipes.items()}
    (first, one), *others = values.items()
    if one["eval.every"] < 1:
        raise ConfigError(
            f"eval.every must be at least 1 so that scores at equal budgets are known, got {one['eval.every']}; "
            "set it in [settings]"
        )
    for arm, two in others:
        for name in one:
            equal = name.split(".")[0] in EQUAL_SECTIONS or name in EQUAL_KEYS
            if equal and one[name] != two[name]:
                raise ConfigError(
                    f"{name} is {one[name]!r} in arm {first!r} and {two[name]!r} in {arm!r}, but arms that are "
                    "compared must act in the same world and be measured alike; set it in [settings] or in [tasks]"
                )
    needed = min(recipes[arm].train.steps for arm in compare)
    for arm, recipe in recipes.items():
        if recipe.train.steps < needed:
            raise ConfigError(
                f"arm {arm!r} has train.steps = {recipe.train.steps}, but {compare[0]!r} and {compare[1]!r} are "
                f"compared after {needed}, which it never reaches; raise it"
            )
    if len({recipe.train.steps for recipe in recipes.values()}) > 1:
        for arm, recipe in recipes.items():
            if recipe.learner.schedule != "constant":
                raise ConfigError(
                    f"arm {arm!r} has learner.schedule = {recipe.learner.schedule!r}, which depends on train.steps, "
                    "and the arms' train.steps differ; make the schedule constant or the steps equal"
                )


def _check_tasks(recipes: Mapping[str, Sequence[Config]]) -> None:
    """Refuse one task under two names, which would count twice in the mean over all tasks."""
    names = list(recipes)
    for index, task in enumerate(names):
        for before in names[:index]:
            if recipes[before] == recipes[task]:
                raise ConfigError(f"tasks {before!r} and {task!r} have equal settings; keep one of them")


def _check_measure(measure: str, recipes: Sequence[Config]) -> None:
    from empo2.metrics import of_episodes

    known = [f"eval_{split}{key}" for split in ("", "train_") for key in of_episodes([])]
    if measure not in known:
        raise ConfigError(f"measure = {measure!r} is not in evaluations.jsonl; {nearest(measure, known)}")
    key = "train_variations" if measure.startswith("eval_train_") else "num_variations"
    if any(getattr(recipe.eval, key) == 0 for recipe in recipes):
        raise ConfigError(f"measure = {measure!r} is never evaluated, as eval.{key} is 0; raise it in [settings]")


def _cells(
    recipes: Mapping[tuple[str, str], Config], seeds: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]
) -> Iterator[Cell]:
    for seed in dict.fromkeys([*values["seeds"], *(seed for own in seeds.values() for seed in own)]):
        for (task, arm), recipe in recipes.items():
            if seed in seeds[arm]:
                own = [("train.seed", seed), ("train.threads", values["threads"])]
                temperature = values["tips_temperature"]
                yield Cell(
                    task=task,
                    arm=arm,
                    seed=seed,
                    recipe=configs.from_dict(configs.with_overrides(configs.to_dict(recipe), own)),
                    evaluates=_evaluations(recipe) if values["evaluate_tips"] else (),
                    asked={
                        "episodes": values["tips_episodes"],
                        "temperature": temperature if temperature >= 0 else recipe.eval.temperature,
                    },
                )


def _evaluations(recipe: Config) -> tuple[str, ...]:
    return ("none", "own", "other") if recipe.modes.p > 0 else ("none",)


def differences(recipe: Config, ran: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings in which a run's config.toml differs from a recipe. A setting that is younger than the run counts with
    its default; one that the recipe leaves to the machine (auto), or that changes no number, does not count."""
    found, defaults = [], flat(Config())
    for name, wanted in flat(recipe).items():
        section, key = name.split(".")
        value = ran.get(section, {}).get(key, defaults[name])
        if value != wanted and wanted != "auto" and not {name, section} & set(WITHOUT_EFFECT):
            found.append(f"{name} = {value!r} (the file: {wanted!r})")
    return found
