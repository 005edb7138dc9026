"""Run folders → the results folder, and records for the report from either.

A finished cell's small files are copied to `cells/TASK/ARM/seed-N` of the results, so that the report can be made again
when the run folders are gone, and the experiment goes on elsewhere. A run folder that is there counts, not its copy.
"""

import datetime
import gzip
import io
import json
import shlex
import zlib
from pathlib import Path
from typing import Any

from empo2 import report as reports
from empo2.config import read_toml
from empo2.errors import CheckpointError, UsageError
from empo2.experiment.plan import Cell, Experiment, differences
from empo2.report import curves
from empo2.report.records import Record, State, Study
from empo2.run import RunFolder, read_object, write_whole


def report(experiment: Experiment, out: Path, results: Path) -> None:
    """Make the results folder from what is there: copies of finished cells, results.{md,json}, figures.

    May be called while cells run. Raises MissingPart without matplotlib, CheckpointError for a damaged file.
    """
    curves.require()
    for cell in experiment.cells:
        _copy(cell, out / cell.place, results / "cells" / cell.place)
    reports.write(study(experiment, out, results), results)


def study(experiment: Experiment, out: Path, results: Path) -> Study:
    """The experiment with a record of each cell."""
    steps: dict[str, int] = {}
    for cell in experiment.cells:
        steps[cell.arm] = max(steps.get(cell.arm, 0), cell.recipe.train.steps)
    return Study(
        name=experiment.name,
        measure=experiment.measure,
        compare=experiment.compare,
        also_compare=experiment.also_compare,
        ratio_from=experiment.ratio_from,
        tasks=experiment.tasks,
        seeds=experiment.seeds,
        threads=experiment.threads,
        tips_temperature=experiment.tips_temperature,
        steps=steps,
        command=f"empo2 experiment {shlex.quote(_shown(experiment.path))}",
        records=tuple(record(cell, out, results) for cell in experiment.cells),
    )


def _shown(path: Path) -> str:
    """As it was given, without the folders of the machine."""
    return path.name if path.is_absolute() else str(path)


def beside(folder: Path, suffix: str) -> Path:
    """A file next to a cell's run folder: seed-11 → seed-11.log."""
    return folder.with_name(folder.name + suffix)


def failure(folder: Path) -> list[str]:
    """The last lines of the log of a cell that failed; empty for others."""
    return list(read_json(beside(folder, ".state.json")).get("failed", []))


def is_done(folder: Path) -> bool:
    """Whether a cell has been trained in an out folder, and is still there, whole."""
    return bool(read_json(beside(folder, ".state.json")).get("done")) and is_trained(folder)


def asked_tips(cell: Cell, folder: Path) -> dict[str, Any]:
    """The evaluations with tips that a cell asks for, as far as they were made, and made as it asks."""
    found = read_json(folder / "tips.json")
    return {
        name: found[name] for name in cell.evaluates if name in found and found[name].get("asked") == dict(cell.asked)
    }


def is_busy(folder: Path) -> bool:
    """Whether some process trains in a run folder."""
    if not (folder / "config.toml").exists():
        return False
    try:
        with RunFolder(folder).locked():
            return False
    except UsageError:
        return True


def is_trained(folder: Path) -> bool:
    """Whether a run folder, or its copy, holds the last step and the evaluation after it."""
    if not (folder / "config.toml").exists():
        return False
    steps = _steps(folder)
    return all(lines and lines[-1]["step"] == steps for lines in (_metrics(folder), RunFolder(folder).evaluations()))


def _steps(folder: Path) -> int:
    """Training steps of a run. Raises CheckpointError."""
    steps = read_toml(folder / "config.toml").get("train", {}).get("steps")
    if not isinstance(steps, int):
        raise CheckpointError(f"{folder / 'config.toml'} is damaged; delete {folder}")
    return steps


def record(cell: Cell, out: Path, results: Path) -> Record:
    """What is known of a cell: from its run folder, else from the copy in the results."""
    own, copy = out / cell.place, results / "cells" / cell.place
    here = (own / "config.toml").exists() or bool(failure(own))
    folder = own if here else copy
    told = read_json(beside(own, ".state.json") if here else copy / "failed.json")
    lines, trained_well = list(told.get("failed", [])), bool(told.get("done"))
    if not (folder / "config.toml").exists():
        return Record(
            task=cell.task,
            arm=cell.arm,
            seed=cell.seed,
            state="failed" if lines else "not run yet",
            detail=lines[-1] if lines else "",
            provenance={},
        )
    metrics = _metrics(folder)
    tips = asked_tips(cell, folder)
    evaluated = set(tips) == set(cell.evaluates)
    missing = "" if evaluated else f"failed: {lines[-1]}" if lines else "not yet"
    changed = differences(cell.recipe, read_toml(folder / "config.toml"))
    state, detail = _state(folder, [] if trained_well else lines, metrics)
    if changed:
        state, detail = "other settings", ", ".join(changed)
    return Record(
        task=cell.task,
        arm=cell.arm,
        seed=cell.seed,
        state=state,
        detail=detail,
        metrics=tuple(metrics),
        evaluations=tuple(RunFolder(folder).evaluations()),
        tips=tips if tips and evaluated else None,
        tips_missing=missing,
        provenance=_provenance(folder),
    )


def is_kept(cell: Cell, out: Path, results: Path) -> bool:
    """Whether only a cell's copy in the results is left, whole and of the file as it is."""
    if (out / cell.place / "config.toml").exists():
        return False
    found = record(cell, out, results)
    return found.state == "finished" and not found.tips_missing


def _state(folder: Path, failed: list[str], metrics: list[dict[str, Any]]) -> tuple[State, str]:
    """A run's state and its detail; ``failed``: the last lines of a training that failed."""
    if failed:
        return "failed", failed[-1]
    if is_trained(folder):
        return "finished", ""
    step = metrics[-1]["step"] if metrics else 0
    return "running" if is_busy(folder) else "stopped", f"step {step} of {_steps(folder)}"


def _copy(cell: Cell, folder: Path, target: Path) -> None:
    """Copy a finished cell's small files, or how it failed; never a run of other settings over one of these."""
    if (folder / "config.toml").exists() and differences(cell.recipe, read_toml(folder / "config.toml")):
        return
    if lines := failure(folder):
        target.mkdir(parents=True, exist_ok=True)
        told = {"done": is_done(folder), "failed": lines}
        write_whole(target / "failed.json", as_json(told))
    elif (folder / "config.toml").exists():
        (target / "failed.json").unlink(missing_ok=True)
    if not is_trained(folder):
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in ("evaluations.jsonl", "config.toml"):
        write_whole(target / name, (folder / name).read_bytes())
    write_whole(target / "run.json", as_json(_provenance(folder)))
    packed = io.BytesIO()
    with gzip.GzipFile("", mode="wb", fileobj=packed, mtime=0) as file:
        file.write("".join(json.dumps(line) + "\n" for line in _metrics(folder)).encode())
    write_whole(target / "metrics.jsonl.gz", packed.getvalue())
    if tips := asked_tips(cell, folder):
        kept = {name: {key: value for key, value in found.items() if key != "model"} for name, found in tips.items()}
        write_whole(target / "tips.json", as_json(kept))


def as_json(content: Any) -> bytes:
    """The bytes of a small JSON file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def _provenance(folder: Path) -> dict[str, Any]:
    """run.json with the day on which it was written, and without the folders of the machine."""
    path = folder / "run.json"
    told = read_json(path)
    if told and "date" not in told:
        told["date"] = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    if told.get("command"):
        told["command"] = ["empo2", *(Path(word).name for word in told["command"][1:])]
    return told


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Of a run folder, or of its copy: numbers to six digits, which halves the copy."""
    copied = folder / "metrics.jsonl.gz"
    if not copied.exists():
        return [{key: _short(value) for key, value in line.items()} for line in RunFolder(folder).metrics()]
    try:
        with gzip.open(copied, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise CheckpointError(f"{copied} is damaged ({error}); delete {folder}") from None


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is no such file. Raises CheckpointError for a damaged one."""
    return read_object(path) if path.exists() else {}
