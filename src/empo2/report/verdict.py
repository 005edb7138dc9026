"""What the figures say, in plain sentences. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from empo2.report.records import Study, measure_words
from empo2.report.statistics import Estimate
from empo2.report.summary import Difference, Place, Summary, TipsScores


def digits(*summaries: Summary) -> int:
    """Digits after the point: one where scores reach 10 (they go to 100), else two."""
    found = [e for s in summaries for row in s.arms for e in (row.before, *row.at.values()) if e is not None]
    return 1 if any(abs(estimate.mean) >= 10 for estimate in found) else 2


def number(value: float, places: int) -> str:
    return f"{value:z.{places}f}"


def amount(value: float) -> str:
    """A budget: three digits below 100, else whole, or in millions."""
    if value >= 1e6:
        return f"{value / 1e6:.2f} million"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def verdict(study: Study, summary: Summary) -> list[str]:
    """The comparison that the experiment was made for: over all tasks first, then a paragraph a task."""
    places = digits(summary)
    several = len(study.tasks) > 1
    said = [_overall(study, summary, places)] if several else []
    for task in study.tasks:
        found = {d.place: d for d in summary.differences if d.task == task}
        earlier = [d for d in summary.earlier if d.task == task]
        head = f"**{task}.** " if several else ""
        said.append(head + (_task(study, found, earlier, places) if found else _nothing(study)))
    return said


def _nothing(study: Study) -> str:
    return f"No seed is finished in both {study.compare[0]} and {study.compare[1]}: there is nothing to compare yet."


def _task(study: Study, found: dict[Place, Difference], earlier: Sequence[Difference], places: int) -> str:
    main = found["episodes"]
    sentences = [
        _scores(study, f"At equal episodes ({_budget(study, main)})", main, places),
        reading(main.estimate, study.compare),
        *_turned(main, earlier, places),
        _ratio(study, main, places),
        *_beside(study, found, earlier, places),
        f"At the end of each training: {_shortly(found['final'], places)}.",
    ]
    return " ".join(sentences)


def _beside(
    study: Study, found: Mapping[Place, Difference], earlier: Sequence[Difference], places: int
) -> Iterator[str]:
    """The comparison at equal tokens and at equal seconds; over all tasks there is no one budget to name."""
    for place in ("tokens", "seconds"):
        if (there := found.get(place)) is None:
            yield f"At equal {place} nothing can be compared."
            continue
        budget = f" ({_budget(study, there)})" if there.budget is not None else ""
        yield f"At equal {place}{budget}: {_shortly(there, places)}."
        yield from _turned(there, earlier, places)


def _budget(study: Study, found: Difference) -> str:
    """A budget, and how early that is in the training of an arm that went on for long after it."""
    said = amount(found.budget or 0)
    early = [
        f"{share:.0%} of {arm}'s training"
        for arm, share in zip(study.compare, found.shares or (), strict=False)
        if share < 0.95
    ]
    return f"{said}: {', '.join(early)}" if early else said


def _turned(there: Difference, earlier: Sequence[Difference], places: int) -> list[str]:
    """Where on the way to a budget the interval lay on the other side of 0 than the difference does there."""
    said = [
        f"{row.part:.0%} of those {there.place} {number(row.estimate.mean, places)}, {_interval(row.estimate, places)}"
        for row in earlier
        if row.place == there.place and _is_opposed(row.estimate, there.estimate)
    ]
    return [f"**Earlier the other way**: at {'; at '.join(said)}."] if said else []


def _is_opposed(earlier: Estimate, there: Estimate) -> bool:
    if earlier.low is None or earlier.high is None:
        return False
    return earlier.high < 0 < there.mean or there.mean < 0 < earlier.low


def _overall(study: Study, summary: Summary, places: int) -> str:
    earlier = [d for d in summary.earlier if not d.task]
    found = {d.place: d for d in summary.overall}
    if "episodes" not in found:
        return "**All tasks.** No seed is finished in all tasks of both arms: there is nothing to compare yet."
    main = found["episodes"]
    tasks = [d for d in summary.differences if d.place == "episodes"]
    above = sum(d.estimate.low is not None and d.estimate.low > 0 for d in tasks)
    below = sum(d.estimate.high is not None and d.estimate.high < 0 for d in tasks)
    return " ".join(
        [
            _scores(study, f"**All {len(study.tasks)} tasks.** On average over tasks, at equal episodes", main, places),
            reading(main.estimate, study.compare),
            *_turned(main, earlier, places),
            _ratio(study, main, places),
            *_beside(study, found, earlier, places),
            f"Task by task the interval lies above 0 in {above} of {len(tasks)}, below 0 in {below}.",
        ]
    )


def _scores(study: Study, where: str, found: Difference, places: int) -> str:
    first, second = study.compare
    interval = _interval(found.estimate, places)
    shown = f", 95 % interval {interval}" if interval else ""
    return (
        f"{where} {first} scores {number(found.first, places)} and {second} {number(found.second, places)} "
        f"({measure_words(study.measure)}): difference {number(found.estimate.mean, places)}{shown}, "
        f"{_seeds(study, len(found.seeds))}."
    )


def _seeds(study: Study, finished: int) -> str:
    first, second = study.compare
    planned = len(set(study.seeds[first]) & set(study.seeds[second]))
    seeds = "seed" if planned == 1 else "seeds"
    return f"{finished} {seeds}" if finished == planned else f"{finished} of {planned} {seeds}"


def reading(estimate: Estimate, arms: tuple[str, str]) -> str:
    """What an interval of a difference shows."""
    if estimate.low is None or estimate.high is None:
        return "One seed gives no interval: nothing was shown."
    same = " (every seed gives the same difference)" if estimate.low == estimate.high else ""
    if estimate.low > 0:
        return f"The interval lies above 0{same}."
    if estimate.high < 0:
        return f"The interval lies below 0: {arms[1]} scores higher{same}."
    return f"The interval includes 0: no difference was shown{same}."


def _ratio(study: Study, found: Difference, places: int) -> str:
    first, second = study.compare
    if found.ratio is not None:
        return f"That is {found.ratio:.2f} times the score of {second}."
    if found.second <= 0:
        return f"No ratio is given: {second} scores {number(found.second, places + 1)}."
    if found.second < study.ratio_from:
        return (
            f"No ratio is given: {second} scores {number(found.second, places + 1)}, less than the "
            f"{study.ratio_from:g} from which one means something."
        )
    return f"No ratio is given: {first} scores below 0."


def _shortly(found: Difference, places: int) -> str:
    interval = _interval(found.estimate, places)
    difference = number(found.estimate.mean, places)
    return f"difference {difference}" + (f", {interval}" if interval else " (one seed)")


def _interval(estimate: Estimate, places: int) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low, places)} to {number(estimate.high, places)}"


def tips_verdict(rows: Sequence[TipsScores], places: int) -> list[str]:
    """Whether a trained arm's own tips beat both no tips and another variation's, a sentence an arm and task."""
    said = []
    for row in rows:
        if row.own_minus_none is None or row.own_minus_other is None:
            continue
        lows = [row.own_minus_none.low, row.own_minus_other.low]
        if None in lows:
            finding = "one seed gives no interval, so nothing was shown"
        elif all(low is not None and low > 0 for low in lows):
            finding = "own tips beat both: both intervals lie above 0"
        else:
            finding = "own tips were not shown to beat both"
        compared = "; ".join(
            f"own − {name}: {number(estimate.mean, places)}"
            + (f", {_interval(estimate, places)}" if estimate.low is not None else "")
            for name, estimate in (("none", row.own_minus_none), ("another variation's", row.own_minus_other))
        )
        said.append(f"{row.arm}, {row.task}: {finding} ({compared}).")
    return said
