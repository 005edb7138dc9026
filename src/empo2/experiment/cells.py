"""Runs an experiment's cells, some at once, each in processes of its own; goes on where an earlier call was stopped.

Below the out folder, for each cell: `seed-11/` (the run folder), `seed-11.toml` (its recipe), `seed-11.log` and
`seed-11.state.json` (done, or how it failed). Whatever is killed, this call included, a later call goes on: a run that
is there is resumed, one in which a process of an earlier call still trains is waited for. A cell of which only the copy
in the results is left, as on another machine, is done.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import tomli_w

from empo2 import config as configs
from empo2.config import nearest, read_toml
from empo2.errors import ConfigError, Empo2Error, UsageError
from empo2.experiment.gather import as_json, asked_tips, beside, is_busy, is_done, is_kept, record, report
from empo2.experiment.plan import Cell, Experiment, differences
from empo2.report import curves
from empo2.run import RunFolder, available_cores, write_whole

EMPO2 = (sys.executable, "-m", "empo2")
TIPS = {
    "none": (),
    "own": ("--memory", "run", "--memory.source", "own"),
    "other": ("--memory", "run", "--memory.source", "other"),
}
ATTEMPTS = 2
LOG_LINES = 5  #: of a failed cell that are kept
REPORT_EVERY_S = 300.0  #: while cells run, when one has ended since the last

Say = Callable[[str], None]


def run(
    experiment: Experiment, out: Path, results: Path, jobs: int | None, arms: Sequence[str] | None, say: Say
) -> int:
    """Run what is not done yet and make the report, at the end and now and then as cells end.

    The exit status: 0 all done, 1 some cell failed, 130 interrupted.

    ``jobs`` cells at once (None: as many as the cores allow), ``arms`` only (None: all). On Ctrl-C each cell under way
    finishes its step and saves. Cells that failed in an earlier call are tried again. Raises UsageError (ConfigError,
    MissingPart) before the first cell runs.
    """
    curves.require()
    cells = [cell for cell in experiment.cells if not arms or cell.arm in arms]
    for arm in arms or ():
        if arm not in experiment.seeds:
            raise UsageError(f"there is no arm {arm!r}; {nearest(arm, list(experiment.seeds))}")
    at_once = max(1, available_cores() // experiment.threads) if jobs is None else jobs
    if at_once < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    with _alone_in(out):
        _check_unchanged(cells, out)
        _check_copies(experiment, cells, out, results)
        kept = [cell for cell in cells if not experiment.keep_checkpoints and is_kept(cell, out, results)]
        if kept:
            say(f"{len(kept)} cell(s) done, from {results}")
        cells = [cell for cell in cells if cell not in kept]
        _prepare(cells, out, say)

        def report_so_far() -> None:
            try:
                report(experiment, out, results)
            except (Empo2Error, OSError) as error:  # the cells go on; the report at the end says it again
                say(f"no report yet: {error}")

        status = _run_cells(experiment, cells, out, at_once, say, report_so_far)
    report(experiment, out, results)
    say(f"report: {results / 'results.md'}")
    return status


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the out folder for this call."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"the out folder {out} cannot be made ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another experiment runs in {out}; let it end, or choose another --out") from None
        yield


def _check_unchanged(cells: Sequence[Cell], out: Path) -> None:
    """Refuse to mix runs of the file as it is with runs of the file as it was."""
    for cell in cells:
        path = out / cell.place / "config.toml"
        if path.exists() and (changed := differences(cell.recipe, read_toml(path))):
            raise ConfigError(
                f"{out / cell.place} ran with {', '.join(changed)}; delete it, choose another --out, or change the "
                "experiment file back"
            )
        folder = out / cell.place
        gone = is_done(folder) and RunFolder(folder).checkpoints_deleted()
        if gone and not _is_complete(cell, folder):
            raise ConfigError(
                f"{folder} is done and its checkpoint deleted, but its evaluations with tips are not those that the "
                "file asks for (evaluate_tips, tips_episodes, tips_temperature); delete it, choose another --out, or "
                "change the file back"
            )


def _check_copies(experiment: Experiment, cells: Sequence[Cell], out: Path, results: Path) -> None:
    """Refuse a results folder that cannot be written, or that holds cells of other settings, before they are lost."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=results).close()
    except OSError as error:
        raise UsageError(
            f"the report cannot be written to {results} ({error.strerror}); choose another --results"
        ) from None
    for cell in cells:
        copy = results / "cells" / cell.place / "config.toml"
        if copy.exists() and (changed := differences(cell.recipe, read_toml(copy))):
            raise ConfigError(
                f"{copy.parent} ran with {', '.join(changed)}, and the report would replace it; delete it, choose "
                "another --results, or change the experiment file back"
            )
        if experiment.keep_checkpoints or (out / cell.place / "config.toml").exists():
            continue  # it is trained here
        found = record(cell, out, results)
        if found.state == "finished" and found.tips_missing and not (copy.parent / "failed.json").exists():
            raise ConfigError(
                f"{copy.parent} was trained elsewhere, and its evaluations with tips are not those that the file asks "
                "for (evaluate_tips, tips_episodes, tips_temperature); change the file back, or delete it to train "
                "the cell anew"
            )


def _prepare(cells: Sequence[Cell], out: Path, say: Say) -> None:
    """Refuse what cannot run, fetch models that are missing, write each cell's recipe.

    The precision that a recipe leaves to the machine is chosen here, while no cell keeps the machine busy.
    """
    from empo2 import models
    from empo2.assemble import needed_models, preflight, resolved

    for cell in {(cell.task, cell.arm): cell for cell in cells}.values():
        preflight(cell.recipe)
        if "other" in cell.evaluates:
            preflight(replace(cell.recipe, memory=replace(cell.recipe.memory, source="other")))
        for name in needed_models(cell.recipe):
            say(f"fetching {name} (once) …")
            models.fetch(name)
    for cell in cells:
        path = beside(out / cell.place, ".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(configs.to_dict(resolved(cell.recipe))), encoding="utf-8")


def _run_cells(
    experiment: Experiment, cells: Sequence[Cell], out: Path, jobs: int, say: Say, report_so_far: Callable[[], None]
) -> int:
    todo = [cell for cell in cells if not _is_complete(cell, out / cell.place)]
    threads = experiment.threads
    say(
        f"{len(cells)} cells, {len(cells) - len(todo)} of them done; {jobs} at once, {threads} thread(s) each; in {out}"
    )
    children = Children(threads)
    states: list[str] = []
    with ThreadPoolExecutor(jobs) as pool, _interrupts() as asked:
        futures = {pool.submit(run_cell, experiment, cell, out / cell.place, children): cell for cell in todo}
        try:
            reported, num_reported = time.monotonic(), 0
            pending: set[Future[str]] = set(futures)
            while pending:
                ended, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in sorted(ended, key=lambda f: todo.index(futures[f])):
                    states.append(future.result())
                    _tell(futures[future], out, states, len(todo), say)
                is_due = len(states) > num_reported and time.monotonic() - reported >= REPORT_EVERY_S
                if is_due and pending:
                    report_so_far()
                    reported, num_reported = time.monotonic(), len(states)
                while children.interrupts < len(asked):
                    if not children.interrupts:
                        say("stopping: the steps under way are finished and saved first (once more: end at once)")
                    children.interrupt()
        except BaseException:
            children.interrupt()
            raise
    for cell in cells:
        if not experiment.keep_checkpoints and _is_complete(cell, out / cell.place):
            shutil.rmtree(out / cell.place / "checkpoints", ignore_errors=True)  # left by a call that was killed
    return 130 if "stopped" in states else int("failed" in states)


def _is_complete(cell: Cell, folder: Path) -> bool:
    """Done, evaluations included: those may have been asked for later."""
    return is_done(folder) and set(cell.evaluates) <= set(asked_tips(cell, folder))


def _tell(cell: Cell, out: Path, states: Sequence[str], total: int, say: Say) -> None:
    ended = sum(state != "stopped" for state in states)
    if states[-1] != "stopped":
        where = f"; see {beside(out / cell.place, '.log')}" if states[-1] == "failed" else ""
        say(f"[{ended}/{total}] {cell}: {states[-1]}{where}")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C and termination are noted in a list instead of ending this process."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda received, _: asked.append(received))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Children:
    """The processes of the cells under way. Threads call; the main thread interrupts."""

    def __init__(self, threads: int) -> None:
        count = str(threads)
        self._environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.interrupts = 0

    def call(self, arguments: Sequence[str], log: Path, *, output: Path | None = None) -> bool:
        """Run `empo2` with arguments; whether it ended well. What it prints is added to the log, or to ``output``.

        In a session of its own, so that a terminal's Ctrl-C reaches it through `interrupt` only. After an interrupt
        nothing is started any more.
        """
        with log.open("ab") as told, output.open("wb") if output else contextlib.nullcontext(told) as printed:
            with self._lock:
                if self.interrupts:
                    return False
                told.write(f"$ empo2 {' '.join(arguments)}\n".encode())
                told.flush()
                process = subprocess.Popen(
                    [*EMPO2, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=told,
                    env=self._environment,
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                status = process.wait()
                if status < 0:
                    told.write(f"ended by {signal.Signals(-status).name}\n".encode())
                return status == 0
            finally:
                with self._lock:
                    self._running.discard(process)

    def interrupt(self) -> None:
        """What Ctrl-C does: once, trainings finish their step and save; twice, they end at once."""
        with self._lock:
            self.interrupts += 1
            for process in self._running:
                process.send_signal(signal.SIGINT)


def run_cell(experiment: Experiment, cell: Cell, folder: Path, children: Children) -> str:
    """Train a cell and evaluate it; "finished", "failed" (after a second attempt) or "stopped"."""
    state, log = beside(folder, ".state.json"), beside(folder, ".log")
    if children.interrupts:
        return "stopped"  # before what is known of an earlier attempt is forgotten
    if not is_done(folder):
        state.unlink(missing_ok=True)
    trained = False
    for _ in range(ATTEMPTS):
        trained = _train(cell, folder, log, children)
        if trained and _evaluate(cell, folder, log, children):
            write_whole(state, as_json({"done": True}))
            if not experiment.keep_checkpoints:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return "finished"
        if children.interrupts:
            return "stopped"
    write_whole(state, as_json({"done": trained, "failed": last_lines(log)}))  # done: only the evaluations failed
    return "failed"


def _train(cell: Cell, folder: Path, log: Path, children: Children) -> bool:
    """Begin or go on. A process of an earlier call that was killed may still train here: it is waited for."""
    if is_done(folder):
        return True
    while is_busy(folder):
        if children.interrupts:
            return False
        time.sleep(0.5)
    if (folder / "config.toml").exists():
        return children.call(["train", "--resume", "--run", str(folder)], log)
    return children.call(["train", str(beside(folder, ".toml")), "--run", str(folder)], log)


def _evaluate(cell: Cell, folder: Path, log: Path, children: Children) -> bool:
    """Evaluate on the trained variations with no tips, its own and another variation's, into tips.json."""
    env = cell.recipe.env
    common = ["evaluate", str(folder), "--split", "train", "--json"]
    common += ["--variations", str(len(env.variations) or env.num_variations)]
    common += ["--episodes", str(cell.asked["episodes"]), "--eval.temperature", str(cell.asked["temperature"])]
    output = beside(folder, ".tips.json")
    for name in cell.evaluates:
        if name in (found := asked_tips(cell, folder)):
            continue
        if not children.call([*common, *TIPS[name]], log, output=output):
            return False
        printed = output.read_text(encoding="utf-8").splitlines()
        try:
            made = json.loads(printed[-1])
        except (IndexError, ValueError):
            with log.open("a", encoding="utf-8") as told:
                told.write(f"no result: it printed {printed[-1:]}\n")
            return False
        write_whole(folder / "tips.json", as_json(found | {name: made | {"asked": dict(cell.asked)}}))
    output.unlink(missing_ok=True)
    return True


def last_lines(log: Path) -> list[str]:
    """The last lines of a log that hold something."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-LOG_LINES:]
