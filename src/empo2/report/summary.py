"""A study → the figures that are reported: scores at equal budgets, differences, tips. Pure.

A budget is the largest that all finished cells of the two compared arms reached, task by task. The score there is read
from the line between evaluations; the compared arms are also read at fifths of it, as one budget may show what no
other does. What is called final is the last evaluation's, never the best.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from empo2.report.records import AXES, Axis, Record, Study
from empo2.report.statistics import Estimate, bootstrap_interval, common_reach, mean_interval, value_at

Place = Literal["episodes", "tokens", "seconds", "final"]

PLACES: tuple[Place, ...] = (*AXES, "final")

EARLIER = (0.2, 0.4, 0.6, 0.8)  #: parts of a budget at which the compared arms are read as well

Budgets = Mapping[str, Mapping[Axis, float]]  #: task → axis → budget; nothing where no compared cell is finished


@dataclass(frozen=True, kw_only=True)
class ArmScores:
    """One arm on one task, over its finished seeds. None: no finished seed, or not all of them reached the budget."""

    task: str
    arm: str
    num_planned: int
    num_finished: int
    before: Estimate | None
    at: Mapping[Place, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First compared arm minus the second, paired by seed: only seeds that are finished in both."""

    task: str  #: empty: the mean over all tasks
    place: Place
    budget: float | None  #: in the place's units; None for final and over all tasks
    shares: tuple[float, float] | None  #: the budget as a share of what a training of each arm spent, on average
    seeds: tuple[int, ...]
    first: float
    second: float
    estimate: Estimate
    bootstrap: tuple[float, float] | None
    ratio: float | None
    part: float = 1.0  #: of the budget; less: on the way there


@dataclass(frozen=True, kw_only=True)
class TipsScores:
    """A trained arm that acts with no tips, its own, or another variation's; differences are paired by seed.

    None: an arm that never acts with tips.
    """

    task: str
    arm: str
    none: Estimate
    own: Estimate | None
    other: Estimate | None
    own_minus_none: Estimate | None
    own_minus_other: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Versus:
    """First compared arm minus another one at equal episodes, paired by seed: only seeds finished in both."""

    task: str
    arm: str
    seeds: tuple[int, ...]
    score: float  #: of the other arm
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that is reported of one measure."""

    measure: str
    budgets: Budgets
    arms: tuple[ArmScores, ...]
    differences: tuple[Difference, ...]
    overall: tuple[Difference, ...]  #: over all tasks; empty for a single task
    earlier: tuple[Difference, ...]  #: the same (over all tasks first) at parts of the budgets, axis by axis
    versus: tuple[Versus, ...]  #: the first compared arm against every other one


def summarize(study: Study, measure: str) -> Summary:
    """The figures of one measure; cells that are not finished or never evaluated it take no part."""
    budgets = {task: _budgets(study, task) for task in study.tasks}
    differences = _differences(study, measure, budgets, PLACES)
    earlier = [
        row for axis in AXES for part in EARLIER for row in _differences(study, measure, budgets, (axis,), part=part)
    ]
    rows = [_arm_scores(study, task, arm, measure, budgets[task]) for task in study.tasks for arm in study.arms]
    return Summary(
        measure=measure,
        budgets=budgets,
        arms=tuple(rows),
        differences=tuple(row for row in differences if row.task),
        overall=tuple(row for row in differences if not row.task),
        earlier=tuple(earlier),
        versus=tuple(_versus(study, measure, budgets)),
    )


def _budgets(study: Study, task: str) -> dict[Axis, float]:
    """Of the study's own measure, so that every table stands at the same budgets."""
    arms = [study.finished(task, arm) for arm in study.compare]
    if not all(arms):  # the reach of one arm alone says nothing of what both can reach
        return {}
    compared = [record for finished in arms for record in finished.values()]
    found = {
        axis: common_reach([r.evaluated(study.measure, axis) for r in compared if study.counts(r, axis)])
        for axis in AXES
    }
    return {axis: reach for axis, reach in found.items() if reach is not None}


def _score(study: Study, record: Record, measure: str, place: Place, budgets: Mapping[Axis, float]) -> float | None:
    if place == "final":
        return _last(record, measure)
    if place not in budgets or not study.counts(record, place):
        return None
    return value_at(record.evaluated(measure, place), budgets[place])


def _before(record: Record, measure: str) -> float | None:
    return next(iter(record.evaluated(measure, "episodes").ys), None)


def _last(record: Record, measure: str) -> float | None:
    """Of the last evaluation; None if it was not finite there."""
    curve, last = record.evaluated(measure, "episodes"), max(record.spent("episodes").values())
    return curve.ys[-1] if curve.xs and curve.xs[-1] == last else None


def _over_seeds(scores: Sequence[float | None]) -> Estimate | None:
    """Mean over seeds; None where there are none or one of them has no score."""
    known = [score for score in scores if score is not None]
    return mean_interval(known) if known and len(known) == len(scores) else None


def _arm_scores(study: Study, task: str, arm: str, measure: str, budgets: Mapping[Axis, float]) -> ArmScores:
    records = study.finished(task, arm).values()
    return ArmScores(
        task=task,
        arm=arm,
        num_planned=len(study.seeds[arm]),
        num_finished=len(records),
        before=_over_seeds([_before(record, measure) for record in records]),
        at={place: _over_seeds([_score(study, r, measure, place, budgets) for r in records]) for place in PLACES},
    )


Pairs = dict[int, tuple[float, float]]  #: seed → scores of the first and the second compared arm


def _differences(
    study: Study, measure: str, budgets: Budgets, places: Sequence[Place], *, part: float = 1.0
) -> list[Difference]:
    """The compared arms at ``part`` of each budget: over all tasks where there are several, then task by task."""
    at = {task: {axis: part * budget for axis, budget in found.items()} for task, found in budgets.items()}
    paired = {
        task: {place: _pairs(study, task, measure, at[task], place, study.compare) for place in places}
        for task in study.tasks
    }
    found = [*_overall(study, paired, places)] if len(study.tasks) > 1 else []
    found += [
        _difference(study, task, place, pairs, at[task])
        for task, by_place in paired.items()
        for place, pairs in by_place.items()
        if pairs
    ]
    return [dataclasses.replace(row, part=part) for row in found]


def _pairs(
    study: Study, task: str, measure: str, budgets: Mapping[Axis, float], place: Place, arms: tuple[str, str]
) -> Pairs:
    """Scores of two arms by seed, where both have one at the budget."""
    first, second = (study.finished(task, arm) for arm in arms)

    def score(record: Record) -> float | None:
        return _score(study, record, measure, place, budgets)

    both = {seed: (score(first[seed]), score(second[seed])) for seed in sorted(set(first) & set(second))}
    return {seed: (a, b) for seed, (a, b) in both.items() if a is not None and b is not None}


def _difference(study: Study, task: str, place: Place, pairs: Pairs, budgets: Mapping[Axis, float]) -> Difference:
    budget = None if place == "final" else budgets.get(place)
    differences = [a - b for a, b in pairs.values()]
    first, second = (math.fsum(scores) / len(pairs) for scores in zip(*pairs.values(), strict=True))
    return Difference(
        task=task,
        place=place,
        budget=budget,
        shares=None if place == "final" or budget is None else _shares(study, task, place, pairs, budget),
        seeds=tuple(pairs),
        first=first,
        second=second,
        estimate=mean_interval(differences),
        bootstrap=bootstrap_interval(differences),
        ratio=first / second if second >= study.ratio_from and second > 0 and first >= 0 else None,
    )


def _shares(study: Study, task: str, axis: Axis, seeds: Collection[int], budget: float) -> tuple[float, float]:
    first, second = (
        budget * len(seeds) / math.fsum(max(study.finished(task, arm)[s].spent(axis).values()) for s in seeds)
        for arm in study.compare
    )
    return first, second


def _overall(study: Study, paired: Mapping[str, Mapping[Place, Pairs]], places: Sequence[Place]) -> list[Difference]:
    """Each seed's scores averaged over all tasks, then paired by seed; only seeds that are finished everywhere."""
    found = []
    for place in places:
        tasks = [by_place[place] for by_place in paired.values()]
        seeds = sorted(set.intersection(*(set(pairs) for pairs in tasks)))
        means = {
            seed: (
                math.fsum(pairs[seed][0] for pairs in tasks) / len(tasks),
                math.fsum(pairs[seed][1] for pairs in tasks) / len(tasks),
            )
            for seed in seeds
        }
        if means:
            found.append(_difference(study, "", place, means, {}))
    return found


def _versus(study: Study, measure: str, budgets: Budgets) -> Iterator[Versus]:
    first = study.compare[0]
    for task in study.tasks:
        for arm in study.arms:
            if arm == first:
                continue
            pairs = _pairs(study, task, measure, budgets[task], "episodes", (first, arm))
            if pairs:
                yield Versus(
                    task=task,
                    arm=arm,
                    seeds=tuple(pairs),
                    score=math.fsum(b for _, b in pairs.values()) / len(pairs),
                    estimate=mean_interval([a - b for a, b in pairs.values()]),
                )


def tips_scores(study: Study) -> tuple[TipsScores, ...]:
    """The evaluations with tips, where there are any."""
    key = study.measure.removeprefix("eval_train_").removeprefix("eval_")

    def minus(first: list[float], second: list[float]) -> Estimate | None:
        return mean_interval([a - b for a, b in zip(first, second, strict=True)]) if first else None

    rows = []
    for task in study.tasks:
        for arm in study.arms:
            found = [record.tips for record in study.finished(task, arm).values() if record.tips]
            none, own, other = (
                [float(tips[name][key]) for tips in found if name in tips] for name in ("none", "own", "other")
            )
            if found:
                rows.append(
                    TipsScores(
                        task=task,
                        arm=arm,
                        none=mean_interval(none),
                        own=mean_interval(own) if own else None,
                        other=mean_interval(other) if other else None,
                        own_minus_none=minus(own, none),
                        own_minus_other=minus(own, other),
                    )
                )
    return tuple(rows)
