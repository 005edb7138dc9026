"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere, a table at the end."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from empo2.metrics import first_successes


class Display:
    """An `Observer` (train.py) that prints. Use as a context manager."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._total = total_steps
        self._seconds: list[float] = []  # of the steps so far
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[doing]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, left="", doing="starting")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def doing(self, text: str) -> None:
        self._progress.update(self._task, doing=text)

    def evaluated(self, step: int, result: dict[str, Any]) -> None:
        moment = "before training" if step == 0 else f"after step {step}"
        self.say(f"evaluation {moment}, without memory: {evaluation_line(result)}")
        self._progress.update(self._task, completed=step)

    def stepped(self, step: int, result: dict[str, Any]) -> None:
        self._seconds.append(result["seconds_total"])
        left = duration(sum(self._seconds) / len(self._seconds) * (self._total - step)) + " left"
        self.say(step_line(step, self._total, result, left))
        self._progress.update(self._task, completed=step, left=left)


@contextlib.contextmanager
def updates_told(total: int) -> Iterator[Callable[[int], None]]:
    """A live bar in a terminal, elsewhere a line every tenth of the way; the function is told the updates done."""
    console = Console(highlight=False)
    with Progress(
        TextColumn("[bold]update"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)

        def told(done: int) -> None:
            progress.update(task, completed=done)
            if not console.is_terminal and (done * 10 // total) > ((done - 1) * 10 // total):
                console.print(f"update {done} of {total}")

        yield told


def step_line(step: int, total: int, result: dict[str, Any], left: str) -> str:
    """One training step in one line."""
    modes = "/".join(str(result[f"mode_{mode}"]) for mode in ("plain", "with_tips", "distill"))
    rate = result["tokens_sampled"] / max(result["seconds_collect"] + result["seconds_tips"], 1e-9)
    parts = [
        f"step {step}/{total}",
        f"score {score(result['score_mean'])}",
        f"success {result['success_rate']:.0%}",
        f"valid {result['valid_action_rate']:.0%}",
        f"novelty {result['novelty_mean']:.2f}",
        f"states {result['distinct_states']}",
        f"tips {result['memory_entries']}",
        f"plain/tips/distill {modes}",
        "nothing to learn from" if result["loss"] is None else f"loss {result['loss']:+.3f}",
        f"{rate:.0f} tokens/s",
        f"{duration(result['seconds_total'])}",
    ]
    return " · ".join([*parts, left])


def evaluation_line(result: dict[str, Any]) -> str:
    parts = []
    for name, label in (("eval_", "unseen"), ("eval_train_", "trained")):
        if f"{name}episodes" in result:
            parts.append(
                f"{label} variations: score {score(result[f'{name}score_mean'])}, success "
                f"{result[f'{name}success_rate']:.0%}, valid {result[f'{name}valid_action_rate']:.0%} "
                f"({result[f'{name}episodes']} episodes)"
            )
    return "; ".join(parts)


def summary(evaluations: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Table:
    """Before, after and difference, for unseen and for trained variations; and the first and last training step."""
    table = Table(title="without memory", title_justify="left")
    for column in ("", "before", "after", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    first, last = evaluations[0], evaluations[-1]
    for name, label in (("eval_", "unseen variations"), ("eval_train_", "trained variations")):
        for key, text, scale in (
            ("score_mean", "score", 1),
            ("success_rate", "success %", 100),
            ("valid_action_rate", "valid actions %", 100),
        ):
            if f"{name}{key}" in first:
                table.add_row(f"{label}: {text}", *_compared(first[f"{name}{key}"], last[f"{name}{key}"], scale))
    if steps:
        table.add_section()
        for key, text, scale in (
            ("score_mean", "score", 1),
            ("valid_action_rate", "valid actions %", 100),
            ("distinct_states", "distinct states", 1),
        ):
            table.add_row(f"training, first → last step: {text}", *_compared(steps[0][key], steps[-1][key], scale))
    return table


def curve(evaluations: list[dict[str, Any]]) -> Table:
    """Score by step, a row an evaluation, with a bar from the smallest (or 0) to the largest."""
    table = Table(title="score without memory", title_justify="left")
    table.add_column("step", justify="right")
    kinds = [
        (f"{name}score_mean", label)
        for name, label in (("eval_train_", "trained"), ("eval_", "unseen"))
        if f"{name}score_mean" in evaluations[0]
    ]
    for _, label in kinds:
        table.add_column(label, justify="right")
        table.add_column("", width=24)
    lowest, highest = (choose(0.0, *(e[key] for e in evaluations for key, _ in kinds)) for choose in (min, max))
    for each in evaluations:
        cells: list[str | Bar] = [str(each["step"])]
        for key, _ in kinds:
            cells += [score(each[key]), Bar(size=(highest - lowest) or 1.0, begin=0.0, end=each[key] - lowest)]
        table.add_row(*cells)
    return table


def solved_line(steps: list[dict[str, Any]]) -> str:
    """Which tasks were solved in training, and in which step first."""
    firsts = first_successes(steps)
    solved = ", ".join(f"{task} (step {step})" for task, step in firsts.items())
    return f"solved in training, first in: {solved}" if firsts else "no task was solved in training"


def _compared(before: float, after: float, scale: int) -> tuple[str, str, str]:
    if scale == 1:
        return score(before), score(after), f"{'+' if after >= before else ''}{score(after - before)}"
    return f"{before * scale:.1f}", f"{after * scale:.1f}", f"{(after - before) * scale:+.1f}"


def score(value: float) -> str:
    """One decimal, or two where scores are as small as 0…1."""
    return f"{value:.2f}" if abs(value) <= 1 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
