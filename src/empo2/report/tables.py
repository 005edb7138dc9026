"""The page of results as Markdown. Pure."""

from collections.abc import Iterable, Sequence

from empo2.report.records import AXES, AXIS_HELP, Record, Study, measure_words
from empo2.report.statistics import Estimate
from empo2.report.summary import PLACES, Difference, Summary, TipsScores, Versus
from empo2.report.verdict import amount, number, verdict

NONE = "—"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; all but the first ``left`` columns are aligned to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---" if index < left else "---:" for index in range(len(header))) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def with_interval(estimate: Estimate | None, places: int) -> str:
    """mean [low, high]; a mean of one seed stands alone."""
    if estimate is None:
        return NONE
    mean = number(estimate.mean, places)
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{number(estimate.low, places)}, {number(estimate.high, places)}]"


def arms_table(study: Study, summary: Summary, places: int) -> str:
    """One row an arm (and task)."""
    task, left = (["task"], 2) if len(study.tasks) > 1 else ([], 1)
    header = [*task, "arm", "seeds", "before", *(f"at equal {axis}" for axis in AXES), "final"]
    rows = [
        [
            *([row.task] if task else []),
            row.arm,
            f"{row.num_finished}/{row.num_planned}",
            with_interval(row.before, places),
            *(with_interval(row.at[place], places) for place in PLACES),
        ]
        for row in summary.arms
    ]
    return table(header, rows, left=left)


def differences_table(study: Study, summary: Summary, places: int) -> str:
    """The comparison at each budget: the paired t interval, and the bootstrap beside it."""
    first, second = study.compare
    header = [
        *(["task"] if len(study.tasks) > 1 else []),
        "at",
        "seeds",
        first,
        second,
        "difference, 95 % (t, paired)",
        "95 % (bootstrap)",
    ]
    rows = [
        [
            *([found.task or "all tasks"] if len(study.tasks) > 1 else []),
            _place(found),
            str(len(found.seeds)),
            number(found.first, places),
            number(found.second, places),
            with_interval(found.estimate, places),
            "[" + ", ".join(number(end, places) for end in found.bootstrap) + "]" if found.bootstrap else NONE,
        ]
        for found in (*summary.overall, *summary.differences)
    ]
    return table(header, rows, left=2 if len(study.tasks) > 1 else 1)


def earlier_table(study: Study, summary: Summary, places: int) -> str:
    """The comparison on the way to each budget, and there."""
    first, second = study.compare
    several = len(study.tasks) > 1
    reached = [row for row in (*summary.overall, *summary.differences) if row.place != "final"]
    rows = [
        [
            *([row.task or "all tasks"] if several else []),
            f"{row.part:.0%} of the {row.place}" + (f" ({amount(row.budget)})" if row.budget is not None else ""),
            number(row.first, places),
            number(row.second, places),
            with_interval(row.estimate, places),
        ]
        for task in (*([""] if several else []), *study.tasks)
        for axis in AXES
        for row in (*summary.earlier, *reached)
        if (row.task, row.place) == (task, axis)
    ]
    header = [*(["task"] if several else []), "after", first, second, "difference, 95 % (t, paired)"]
    return table(header, rows, left=2 if several else 1)


def versus_table(study: Study, rows: Sequence[Versus], places: int) -> str:
    """What the first compared arm gains over every other one, at equal episodes, paired by seed."""
    task = ["task"] if len(study.tasks) > 1 else []
    header = [*task, "arm", "seeds", "its score", f"{study.compare[0]} − it, 95 % (t, paired)"]
    cells = [
        [
            *([row.task] if task else []),
            row.arm,
            str(len(row.seeds)),
            number(row.score, places),
            with_interval(row.estimate, places),
        ]
        for row in rows
    ]
    return table(header, cells, left=1 + len(task))


def _place(found: Difference) -> str:
    if found.place == "final":
        return "the end"
    return f"{amount(found.budget)} {found.place}" if found.budget is not None else f"equal {found.place}"


def tips_table(rows: Sequence[TipsScores], places: int) -> str:
    header = ["task", "arm", "seeds", "no tips", "own tips", "another variation's tips"]
    cells = [
        [
            row.task,
            row.arm,
            str(row.none.num_seeds),
            *(with_interval(estimate, places) for estimate in (row.none, row.own, row.other)),
        ]
        for row in rows
    ]
    return table(header, cells, left=2)


def _asked(study: Study) -> str:
    temperature = "the recipe's" if study.tips_temperature < 0 else f"{study.tips_temperature:g}"
    return f"The last checkpoint on the trained variations; sampling temperature: {temperature}."


def missing_table(records: Sequence[Record]) -> str:
    """Cells that are not finished, and finished ones whose evaluations with tips are missing; empty if none."""
    rows = []
    for record in records:
        cell = [record.task, record.arm, str(record.seed)]
        if record.state != "finished":
            rows.append([*cell, f"{record.state}: {record.detail}" if record.detail else record.state])
        elif record.tips_missing:
            rows.append([*cell, f"trained, but not evaluated with tips: {record.tips_missing}"])
    return table(["task", "arm", "seed", "state"], rows, left=4) if rows else ""


def repeat_section(study: Study, summary: Summary) -> str:
    """Command, machines, dates, code versions, seeds, budgets."""
    begun = [record.provenance for record in study.records if record.provenance]
    told = [part for provenance in begun for part in (provenance, *provenance.get("resumed", ()))]
    precision = _distinct(
        f"{p['precision']['sampler']} sampler, {p['precision']['trainer']} trainer" for p in begun if "precision" in p
    )
    codes = _distinct(str(p["code"]) for p in told)
    packages = _distinct(", ".join(f"{n} {v}" for n, v in p["packages"].items() if v and n != "empo2") for p in told)
    dates = sorted({str(p["date"])[:10] for p in told if p.get("date")})
    lines = [
        "```bash",
        study.command,
        "```",
        "",
        f"- machine: {'; '.join(study.machines) or NONE}; {study.threads} thread(s) a cell",
        *(_timed(study) if len(study.machines) > 1 else []),
        *(["- **the seconds and tokens are of more than one version of the code**"] if len(codes) > 1 else []),
        *(
            ["- **not all trainings ran in the same precision, which changes seconds and scores**"]
            if len(precision) > 1
            else []
        ),
        *([f"- precision: {'; '.join(precision)}"] if precision else []),
        f"- dates: {NONE if not dates else ' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        f"- code: {', '.join(codes) or NONE}",
        f"- packages: {'; '.join(packages) or NONE}",
        *(f"- {text}" for text in _weights(study)),
        *(f"- {arm}: seeds {', '.join(map(str, study.seeds[arm]))}; {study.steps[arm]} steps" for arm in study.arms),
        *(
            f"- equal budgets{f' of {task}' if len(study.tasks) > 1 else ''}: "
            + ", ".join(f"{amount(budget)} {axis}" for axis, budget in summary.budgets[task].items())
            for task in study.tasks
            if summary.budgets[task]
        ),
        *(f"- {axis}: {text}" for axis, text in AXIS_HELP.items()),
    ]
    return "\n".join(lines)


def _timed(study: Study) -> list[str]:
    """Whose seconds are compared, where there is more than one machine."""
    said = []
    for task in study.tasks:
        of = f" of {task}" if len(study.tasks) > 1 else ""
        machine = study.timed_on(task)
        only = f"only those of {machine[0]} are compared" if machine else "none are compared"
        said.append(f"- **the seconds{of} are of more than one machine**: {only}")
    return said


def _also(study: Study, summary: Summary, places: int) -> list[str]:
    """One more pair of arms, at its own equal budgets."""
    return [
        f"### {study.compare[0]} and {study.compare[1]}",
        *verdict(study, summary),
        *(_difference_parts(study, summary, places) if summary.differences else []),
    ]


def _difference_parts(study: Study, summary: Summary, places: int) -> list[str]:
    return [
        differences_table(study, summary, places),
        "On the way there, as which budget is read off can decide what it says:",
        earlier_table(study, summary, places),
    ]


def _split(summary: Summary) -> str:
    return "Trained" if summary.measure.startswith("eval_train_") else "Unseen"


def _weights(study: Study) -> list[str]:
    """The weights that the trainings began with, where they were noted; they must be one on each task."""
    said = []
    for task in study.tasks:
        told = [record.provenance.get("weights") for record in study.records if record.task == task]
        found = _distinct(weights for weights in told if weights)
        if len(found) > 1:
            said.append(f"**{task}: not all trainings began with the same weights**: {', '.join(found)}")
        elif found:
            said.append(f"weights at the beginning{f' of {task}' if len(study.tasks) > 1 else ''}: sha256 {found[0]}")
    return said


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def page(
    study: Study,
    summary: Summary,
    *,
    also: Sequence[tuple[Study, Summary]],
    other: Summary | None,
    tips: Sequence[TipsScores],
    verdicts: Sequence[str],
    tips_verdicts: Sequence[str],
    places: int,
) -> str:
    """results.md: the verdict, tables, figures, how to repeat it.

    ``also``: the study with each further pair as the compared one; ``other``: the same measure on the other split.
    """
    finished = sum(record.state == "finished" for record in study.records)
    missing = missing_table(study.records)
    elsewhere = " (or, of seconds, ran on the machine whose seconds are compared)" if len(study.machines) > 1 else ""
    parts = [
        f"# {study.name}: {study.compare[0]} and {study.compare[1]}",
        *verdicts,
        f"Measured: {measure_words(study.measure)} (`{study.measure}`), without tips; means over seeds with 95 % "
        "intervals. Final is the last checkpoint's value, never the best. "
        f"{finished} of {len(study.records)} cells are finished.",
        "## Arms",
        arms_table(study, summary, places),
        f"{NONE}: no finished seed, or not all of them reached that budget{elsewhere}. The budgets are the largest "
        f"that all finished cells of {study.compare[0]} and {study.compare[1]} reached.",
        "## Difference",
        *(_difference_parts(study, summary, places) if summary.differences else ["Nothing to compare yet."]),
        *(
            [
                f"## {study.compare[0]} against each arm",
                "At equal episodes.",
                versus_table(study, summary.versus, places),
            ]
            if len(study.arms) > 2 and summary.versus
            else []
        ),
        *(["## Also compared"] if also else []),
        *(part for pair, found in also for part in _also(pair, found, places)),
        *(["## Missing cells", missing] if missing else []),
        *([f"## {_split(other)}", f"`{other.measure}`", arms_table(study, other, places)] if other else []),
        *(["## After training", _asked(study), tips_table(tips, places), *tips_verdicts] if tips else []),
        "## Figures",
        "![learning curves](curves.png)",
        "![diagnostics of training](diagnostics.png)",
        *(
            [f"The other arms, each with {study.compare[0]} on the same seeds:", "![the other arms](arms.png)"]
            if study.apart
            else []
        ),
        "Thick lines are means over finished seeds, shades their 95 % intervals (t; from three seeds on; none on "
        "logarithmic axes), thin lines single seeds. The same figures as SVG: [curves](curves.svg), "
        "[diagnostics](diagnostics.svg)" + (", [arms](arms.svg)." if study.apart else "."),
        "## How to repeat",
        repeat_section(study, summary),
    ]
    return "\n\n".join(parts) + "\n"
