"""What a report is made from: one record a cell, and the study they belong to. Values only, no files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from empo2.errors import CheckpointError
from empo2.metrics import OF_UPDATES
from empo2.report.statistics import Curve

Axis = Literal["episodes", "tokens", "seconds"]

AXES: tuple[Axis, ...] = ("episodes", "tokens", "seconds")

AXIS_HELP: dict[Axis, str] = {
    "episodes": "training episodes collected so far",
    "tokens": "tokens sampled in training (actions and tips) + tokens that went through the model in training "
    "(behavior and reference log-probs, updates); what the sampler reads again and evaluations are not counted",
    "seconds": "seconds of training steps; loading the model and evaluations are not counted",
}

MAX_TOGETHER = 5  #: arms whose curves can be told apart in one panel

_SPENT: dict[Axis, tuple[str, ...]] = {
    "episodes": ("num_episodes",),
    "tokens": ("tokens_sampled", "tokens_computed"),
    "seconds": ("seconds_total",),
}

#: other settings: it ran with others than the experiment file has now, so it is not one of its cells
State = Literal["finished", "failed", "running", "stopped", "not run yet", "other settings"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell: what its run folder (or the copy in the results) says.

    ``evaluations`` and ``metrics`` are the lines of the run's files, by step; ``tips`` is the content of tips.json
    (evaluations without tips and, where the arm acts with tips, with its own and another variation's), None where that
    was not done or not asked for.
    """

    task: str
    arm: str
    seed: int
    state: State
    detail: str  #: what the table of missing cells says: "step 7 of 40", the last line of the log
    metrics: tuple[Mapping[str, Any], ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()
    tips: Mapping[str, Mapping[str, Any]] | None = None
    tips_missing: str = ""  #: why evaluations with tips that were asked for are not there
    provenance: Mapping[str, Any]

    @property
    def machines(self) -> tuple[str, ...]:
        """Where its seconds were measured: several if it went on on another machine, none if that was not noted."""
        noted = [part.get("machine") for part in (self.provenance, *self.provenance.get("resumed", ()))]
        return tuple(dict.fromkeys(machine_words(machine) for machine in noted if machine))

    def spent(self, axis: Axis) -> dict[int, float]:
        """Step → what had been spent after it; step 0 → 0."""
        total = {0: 0.0}
        for number, line in enumerate(self.metrics, start=1):
            if line["step"] != number:
                raise CheckpointError(f"the metrics of {self.task}, {self.arm}, seed {self.seed} lack step {number}")
            total[number] = total[number - 1] + sum(float(line[key]) for key in _SPENT[axis])
        return total

    def evaluated(self, measure: str, axis: Axis) -> Curve:
        """The measure of each evaluation, at what had been spent after its step."""
        spent = self.spent(axis)
        lines = [line for line in self.evaluations if line["step"] in spent and measure in line]
        return _finite([spent[line["step"]] for line in lines], [line[measure] for line in lines])

    def trained(self, key: str, axis: Axis) -> Curve:
        """A key of metrics.jsonl after each step; steps that did not measure it, or not finite, are left out."""
        spent = self.spent(axis)
        lines = [line for line in self.metrics if line.get(key) is not None]
        if key in OF_UPDATES:  # older runs noted zeros where nothing was trained
            lines = [line for line in lines if line["updates"]]
        return _finite([spent[line["step"]] for line in lines], [line[key] for line in lines])


def _finite(xs: Sequence[float], ys: Sequence[Any]) -> Curve:
    """A curve without points that are not numbers (metrics.jsonl holds "nan" and "inf" as text)."""
    points = [(x, float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(float(y))]
    return Curve(tuple(x for x, _ in points), tuple(y for _, y in points))


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment and its records, as the report needs them."""

    name: str
    measure: str  #: key of evaluations.jsonl
    compare: tuple[str, str]  #: arms; differences are the first minus the second
    also_compare: tuple[tuple[str, str], ...] = ()  #: further pairs
    ratio_from: float  #: smallest score of the second arm, in the measure's units, for which a ratio is given
    tasks: tuple[str, ...]
    seeds: Mapping[str, tuple[int, ...]]  #: arm → planned seeds, in the file's order
    threads: int  #: of the tensor library, a cell
    tips_temperature: float = -1.0  #: of the evaluations after training; negative: the recipe's
    steps: Mapping[str, int]  #: arm → training steps (the most of its tasks)
    command: str  #: what repeats it
    records: tuple[Record, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.seeds)

    @property
    def together(self) -> tuple[str, ...]:
        """The arms of one panel, the compared ones first: all that can be told apart, of more those of the pairs."""
        named = dict.fromkeys(arm for pair in (self.compare, *self.also_compare) for arm in pair)
        few = len(self.arms) <= MAX_TOGETHER
        return tuple(dict.fromkeys((*named, *(self.arms if few else ()))))[:MAX_TOGETHER]

    @property
    def apart(self) -> tuple[str, ...]:
        """The arms with figures of their own."""
        return tuple(arm for arm in self.arms if arm not in self.together)

    def finished(self, task: str, arm: str) -> dict[int, Record]:
        """Seed → record of the finished cells."""
        return {r.seed: r for r in self.records if (r.task, r.arm, r.state) == (task, arm, "finished")}

    @property
    def machines(self) -> tuple[str, ...]:
        """All that cells ran on."""
        return tuple(dict.fromkeys(machine for record in self.records for machine in record.machines))

    def timed_on(self, task: str) -> tuple[str, ...] | None:
        """The machine whose seconds are compared: the one with most seeds in both compared arms.

        None if they share none; empty if it is that of runs that noted none.
        """
        first, second = (self.finished(task, arm) for arm in self.compare)

        def seeds_on(machines: tuple[str, ...], finished: Mapping[int, Record]) -> set[int]:
            return {seed for seed, record in finished.items() if record.machines == machines}

        named = dict.fromkeys(record.machines for record in (*first.values(), *second.values()))
        shared = {
            machines: (len(one & other), min(len(one), len(other)))
            for machines in named
            if len(machines) <= 1 and (one := seeds_on(machines, first)) and (other := seeds_on(machines, second))
        }
        return max(shared, key=lambda machines: shared[machines], default=None)

    def counts(self, record: Record, axis: Axis) -> bool:
        """Whether a cell can stand beside the compared ones on an axis: in seconds only if it ran on their machine."""
        return axis != "seconds" or record.machines == self.timed_on(record.task)


def machine_words(noted: Mapping[str, Any]) -> str:
    """The machine of a run.json: its GPU, processor and cores."""
    return ", ".join([*filter(None, [noted.get("gpu")]), noted["processor"], f"{noted['cores']} cores"])


def measure_words(measure: str) -> str:
    """`eval_train_score_mean` → "score, trained variations"."""
    for prefix, which in (("eval_train_", "trained variations"), ("eval_", "unseen variations")):
        if measure.startswith(prefix):
            quantity = measure.removeprefix(prefix).removesuffix("_mean").replace("_", " ")
            return f"{quantity}, {which}"
    return measure
