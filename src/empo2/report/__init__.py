"""Reports of an experiment: verdict, tables and figures from its records.

statistics (intervals, equal budgets) → summary (figures) → verdict, tables (words) and curves (figures): `write` makes
results.md, results.json, curves.{png,svg}, diagnostics.{png,svg} and, of many arms, arms.{png,svg} in a folder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from empo2.report import curves, tables, verdict
from empo2.report.records import AXES, Record, Study
from empo2.report.summary import Summary, TipsScores, summarize, tips_scores


def write(study: Study, folder: Path) -> None:
    """Write the report. Raises MissingPart where matplotlib is not installed, before anything is written."""
    curves.require()
    summary = summarize(study, study.measure)
    split = ("eval_train_", "eval_") if study.measure.startswith("eval_train_") else ("eval_", "eval_train_")
    beside = study.measure.replace(*split, 1)
    other = summarize(study, beside) if beside != study.measure and _evaluated(study, beside) else None
    pairs = [dataclasses.replace(study, compare=pair) for pair in study.also_compare]
    also = [(pair, summarize(pair, study.measure)) for pair in pairs]
    tips = tips_scores(study)
    places = verdict.digits(summary)
    verdicts, tips_verdicts = verdict.verdict(study, summary), verdict.tips_verdict(tips, places)
    text = tables.page(
        study, summary, also=also, other=other, tips=tips, verdicts=verdicts, tips_verdicts=tips_verdicts, places=places
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(text, encoding="utf-8")
    content = _content(study, [summary, *([other] if other else [])], also, tips, [*verdicts, *tips_verdicts])
    (folder / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    curves.draw_curves(study, folder)
    curves.draw_diagnostics(study, folder)
    if study.apart:
        curves.draw_arms(study, folder)
    else:  # an earlier report may have had more arms
        for ending in (".png", ".svg"):
            (folder / "arms").with_suffix(ending).unlink(missing_ok=True)


def _evaluated(study: Study, measure: str) -> bool:
    return any(measure in line for record in study.records for line in record.evaluations)


def _content(
    study: Study,
    summaries: list[Summary],
    also: list[tuple[Study, Summary]],
    tips: tuple[TipsScores, ...],
    said: list[str],
) -> dict[str, Any]:
    """results.json: everything that results.md says, and the points of the curves."""
    return {
        "name": study.name,
        "measure": study.measure,
        "compare": list(study.compare),
        "verdict": said,
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "also": [
            {
                "compare": list(pair.compare),
                "verdict": verdict.verdict(pair, found),
                "budgets": found.budgets,
                "differences": [dataclasses.asdict(row) for row in (*found.overall, *found.differences)],
            }
            for pair, found in also
        ],
        "tips": [dataclasses.asdict(row) for row in tips],
        "cells": [_cell(record, study.measure) for record in study.records],
    }


def _cell(record: Record, measure: str) -> dict[str, Any]:
    along = {axis: record.evaluated(measure, axis) for axis in AXES}
    return {
        "task": record.task,
        "arm": record.arm,
        "seed": record.seed,
        "state": record.state,
        "detail": record.detail,
        "score": list(along["episodes"].ys),
        **{axis: list(curve.xs) for axis, curve in along.items()},
    }
