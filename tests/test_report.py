"""Reports: intervals against values worked out by hand, equal budgets, sentences, figures."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from empo2 import report
from empo2.errors import CheckpointError, MissingPart
from empo2.report import curves, tables, verdict
from empo2.report.records import Record, Study, measure_words
from empo2.report.statistics import (
    Curve,
    Estimate,
    band,
    bootstrap_interval,
    common_reach,
    mean_interval,
    percentile,
    t_probability,
    t_quantile,
    value_at,
)
from empo2.report.summary import EARLIER, summarize, tips_scores

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 29: 2.0452, 120: 1.9799}
"""Two-sided 95 % points of Student's t, from a printed table."""

MEASURE = "eval_train_score_mean"


def make(
    arm: str,
    seed: int,
    scores: list[float],
    *,
    task: str = "easy",
    seconds: float = 1.0,
    state: str = "finished",
    detail: str = "",
    unseen: float | None = None,
    tips: tuple[float, float, float] | None = None,
) -> Record:
    """A cell that is evaluated before training and after each step; a step: 10 episodes, 100 + 40 tokens."""
    steps = range(1, len(scores))
    return Record(
        task=task,
        arm=arm,
        seed=seed,
        state=state,
        detail=detail,
        metrics=tuple(
            {"step": step, "num_episodes": 10, "tokens_sampled": 100, "tokens_computed": 40, "seconds_total": seconds,
             "updates": 1, "entropy": 1.0, "grad_norm": "inf" if step == 2 else 1.0, "distinct_states": step,
             "valid_action_rate": 0.5, "success_rate": 0.1}
            for step in steps
        ),
        evaluations=tuple(
            {"step": step, MEASURE: score} | ({} if unseen is None else {"eval_score_mean": unseen})
            for step, score in enumerate(scores)
        ),
        tips=tips and {name: {"score_mean": s} for name, s in zip(("none", "own", "other"), tips, strict=True)},
        provenance={"code": "abc", "machine": {"processor": "P", "cores": 2}, "packages": {"torch": "2"},
                    "date": "2026-01-02"},
    )  # fmt: skip


def study(*records: Record, planned: int = 2, tasks: tuple[str, ...] = ("easy",), compare=("new", "old")) -> Study:
    arms = dict.fromkeys([*compare, *(record.arm for record in records)])
    return Study(
        name="coin",
        measure=MEASURE,
        compare=compare,
        ratio_from=0.1,
        tasks=tasks,
        seeds={arm: tuple(range(1, planned + 1)) for arm in arms},
        threads=1,
        steps=dict.fromkeys(arms, 2),
        command="empo2 experiment coin.toml",
        records=records,
    )


# --- statistics ---


@pytest.mark.parametrize(("df", "expected"), TABLE.items())
def test_t_quantile_equals_the_printed_table(df: int, expected: float):
    assert t_quantile(df) == pytest.approx(expected, abs=5e-5)
    assert t_probability(t_quantile(df), df) == pytest.approx(0.95, abs=1e-12)


def test_t_probability_at_other_levels():
    assert t_quantile(4, 0.9) == pytest.approx(2.1318, abs=5e-5)
    assert t_quantile(7, 0.99) == pytest.approx(3.4995, abs=5e-5)
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile(0)


def test_the_mean_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, half width 4.3027 / √3."""
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.num_seeds) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - found.low == pytest.approx(found.high - 2)


def test_one_value_has_no_interval():
    assert mean_interval([0.4]) == Estimate(0.4, None, None, 1)
    assert bootstrap_interval([0.4]) is None
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_the_bootstrap_against_all_samples_there_are():
    values = [0.0, 1.0, 2.0, 7.0, 9.0]
    means = sorted(sum(drawn) / 5 for drawn in itertools.product(values, repeat=5))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(percentile(means, 0.025), abs=0.2)
    assert high == pytest.approx(percentile(means, 0.975), abs=0.2)
    assert bootstrap_interval(values) == (low, high), "the generator is seeded"
    assert len({bootstrap_interval(values, draws=50, seed=seed) for seed in range(5)}) > 1


def test_percentile_is_linear_between_neighbours():
    assert [percentile([0.0, 10.0, 40.0], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0, 5, 10, 25, 40]


def test_values_between_evaluations_are_on_the_line():
    curve = Curve((0.0, 10.0, 30.0), (1.0, 2.0, 6.0))
    assert [value_at(curve, x) for x in (0, 5, 10, 20, 30)] == [1, 1.5, 2, 4, 6]
    assert value_at(curve, 30.1) is None, "what was not reached is not known"
    assert value_at(curve, -1) is None
    assert value_at(Curve((), ()), 0) is None


def test_a_curve_is_checked():
    with pytest.raises(ValueError, match="one y for each x"):
        Curve((0.0,), ())
    with pytest.raises(ValueError, match="rise"):
        Curve((1.0, 0.0), (0.0, 0.0))


def test_bands_end_where_the_shortest_curve_ends():
    shorter, longer = Curve((0.0, 10.0), (0.0, 1.0)), Curve((0.0, 5.0, 20.0), (0.0, 1.0, 2.0))
    assert common_reach([shorter, longer]) == 10
    assert common_reach([]) is None
    found = band([shorter, longer])
    assert found.xs == (0, 5, 10)
    assert found.mean == pytest.approx((0, 0.75, (1 + 4 / 3) / 2))
    assert found.high[1] - found.mean[1] == pytest.approx(12.7062 * math.sqrt(0.125) / math.sqrt(2), rel=1e-5)
    assert band([shorter]).low == (), "one seed has no band"


# --- records and summary ---


def test_budgets_add_up_over_steps():
    record = make("new", 1, [0.0, 0.1, 0.5], seconds=2.5)
    assert record.spent("episodes") == {0: 0, 1: 10, 2: 20}
    assert record.spent("tokens") == {0: 0, 1: 140, 2: 280}
    assert record.spent("seconds") == {0: 0, 1: 2.5, 2: 5}
    assert record.evaluated(MEASURE, "tokens") == Curve((0, 140, 280), (0.0, 0.1, 0.5))
    assert record.trained("grad_norm", "episodes") == Curve((10,), (1.0,)), "an infinite step is left out"


def test_metrics_that_lack_a_step_are_named():
    cell = make("new", 3, [0.0, 0.1, 0.2])
    with pytest.raises(CheckpointError, match="easy, new, seed 3 lack step 1"):
        replace(cell, metrics=cell.metrics[1:]).spent("seconds")


def test_steps_that_trained_nothing_have_no_entropy():
    """Not 0, as metrics.jsonl said before it said null: the curve would fall where nothing was measured."""
    first, second = make("new", 1, [0.0, 0.1, 0.5]).metrics
    for nothing in ({"entropy": None, "updates": 0}, {"entropy": 0.0, "updates": 0}):
        record = replace(make("new", 1, [0.0, 0.1, 0.5]), metrics=({**first, **nothing}, second))
        assert record.trained("entropy", "episodes") == Curve((20,), (1.0,))
        assert record.trained("distinct_states", "episodes").xs == (10, 20)


def test_an_evaluation_whose_step_is_not_recorded_yet_has_no_place():
    record = make("new", 1, [0.0, 0.1])
    ahead = replace(record, evaluations=(*record.evaluations, {"step": 2, MEASURE: 0.9}))
    assert ahead.evaluated(MEASURE, "episodes").ys == (0.0, 0.1)


def test_equal_seconds_compare_the_slower_arm_whole_with_the_faster_one_midway():
    """new: 4 s a step, 8 s; old: 1 s a step, 4 steps, 4 s. At 4 s new is at its step 1, old at its end."""
    found = summarize(study(
        make("new", 1, [0.0, 0.4, 0.8], seconds=4), make("new", 2, [0.0, 0.6, 1.0], seconds=4),
        make("old", 1, [0.0, 0.1, 0.2, 0.3, 0.4]), make("old", 2, [0.0, 0.1, 0.2, 0.3, 0.2]),
    ), MEASURE)  # fmt: skip
    assert found.budgets == {"easy": {"episodes": 20, "tokens": 280, "seconds": 4}}
    at = {difference.place: difference for difference in found.differences}
    assert (at["seconds"].first, at["seconds"].second) == pytest.approx((0.5, 0.3))
    assert (at["episodes"].first, at["episodes"].second) == pytest.approx((0.9, 0.2))
    assert (at["final"].first, at["final"].second) == pytest.approx((0.9, 0.3)), "the last evaluation, not the best"
    assert at["episodes"].estimate.mean == pytest.approx(0.7)
    assert at["episodes"].estimate.high - 0.7 == pytest.approx(12.7062 * 0.1, rel=1e-4), "0.6 and 0.8, paired by seed"
    assert at["episodes"].bootstrap == pytest.approx((0.6, 0.8))
    assert at["episodes"].ratio == pytest.approx(4.5)
    assert found.overall == ()


def test_an_early_budget_is_told_with_how_early_it_is():
    """The cheapest cell of all seeds sets the budget: 5 of on average 10 and 12.5 seconds."""
    records = [make("new", seed, [0.0, 0.4, 0.6], seconds=5.0) for seed in (1, 2)]
    records += [make("old", 1, [0.0, 0.2, 0.2], seconds=2.5), make("old", 2, [0.0, 0.2, 0.3], seconds=10.0)]
    made = study(*records)
    found = {d.place: d for d in summarize(made, MEASURE).differences}
    assert found["seconds"].shares == (0.5, 0.4)
    assert found["episodes"].shares == (1.0, 1.0)
    assert found["final"].shares is None
    said = verdict.verdict(made, summarize(made, MEASURE))[0]
    assert "At equal seconds (5: 50% of new's training, 40% of old's training): " in said
    assert "At equal episodes (20) " in said


def test_an_advantage_that_was_the_other_way_earlier_is_told():
    """At 4 of 10 seconds new has just begun to learn (0.0), old has learnt all it will (0.5): new − old is −0.5."""
    records = [make("new", seed, [0.0, 0.0, 0.0, 0.0, 0.4, 0.9], seconds=2.0) for seed in (1, 2, 3)]
    records += [make("old", seed, [0.0, 0.5, 0.5, 0.5, 0.5 + seed / 100], seconds=2.5) for seed in (1, 2, 3)]
    made = study(*records, planned=3)
    found = summarize(made, MEASURE)
    earlier = {(row.place, row.part): row for row in found.earlier}
    assert list(earlier) == [(axis, part) for axis in ("episodes", "tokens", "seconds") for part in EARLIER]
    assert all(row.budget == pytest.approx(part * 10) for (_, part), row in earlier.items() if row.place == "seconds")
    assert [earlier["seconds", part].estimate.mean for part in EARLIER] == pytest.approx([-0.4, -0.5, -0.5, -0.104])
    text = verdict.verdict(made, found)[0]
    assert "At equal seconds (10): difference 0.38, 0.36 to 0.40. **Earlier the other way**: at 20% of those seconds " \
        "-0.40, -0.40 to -0.40; at 40% of those seconds -0.50, -0.50 to -0.50; at 60%" in text  # fmt: skip
    rows = tables.earlier_table(made, found, 2).splitlines()
    assert rows[0] == "| after | new | old | difference, 95 % (t, paired) |"
    assert "| 40% of the seconds (4) | 0.00 | 0.50 | -0.50 [-0.50, -0.50] |" in rows
    assert "| 100% of the seconds (10) | 0.90 | 0.52 | 0.38 [0.36, 0.40] |" in rows
    assert len(rows) == 2 + 3 * 5


def test_an_advantage_that_was_there_all_along_needs_no_such_words():
    made = study(*pair([0.6, 0.64], [0.2, 0.24]))
    assert "Earlier" not in verdict.verdict(made, summarize(made, MEASURE))[0]


def test_one_arm_alone_sets_no_budget():
    made = study(make("old", 1, [0.0, 0.5, 0.9]), make("other", 1, [0.0, 0.2]))
    found = {row.arm: row for row in summarize(made, MEASURE).arms}
    assert found["old"].at["episodes"] is None
    assert found["old"].at["final"] == Estimate(0.9, None, None, 1)


def test_a_last_evaluation_that_is_no_number_is_not_replaced_by_the_one_before():
    made = study(make("new", 1, [0.0, 0.5, math.nan]), make("old", 1, [0.0, 0.5, 0.6]))
    found = {row.arm: row.at["final"] for row in summarize(made, MEASURE).arms}
    assert (found["new"], found["old"]) == (None, Estimate(0.6, None, None, 1))


def test_a_measure_of_unseen_variations_has_the_trained_ones_beside_it(tmp_path: Path):
    made = replace(study(*pair([0.6, 0.7], [0.2, 0.3])), measure="eval_score_mean")
    made = replace(made, records=tuple(replace(r, evaluations=tuple({**line, "eval_score_mean": 0.1} for line in
                                                                   r.evaluations)) for r in made.records))  # fmt: skip
    report.write(made, tmp_path)
    assert "## Trained\n\n`eval_train_score_mean`" in (tmp_path / "results.md").read_text()


def test_cells_without_a_partner_count_for_their_arm_and_not_for_the_difference():
    records = [make("new", 1, [0.0, 0.5]), make("new", 2, [0.0, 0.9]), make("old", 1, [0.0, 0.2]),
               make("old", 2, [0.0, 0.0], state="failed", detail="boom")]  # fmt: skip
    found = summarize(study(*records), MEASURE)
    rows = {row.arm: row for row in found.arms}
    assert rows["new"].at["final"].mean == pytest.approx(0.7)
    assert (rows["old"].num_finished, rows["old"].num_planned) == (1, 2)
    assert rows["old"].at["final"] == Estimate(0.2, None, None, 1), "the failed cell is not a zero"
    assert {d.seeds for d in found.differences} == {(1,)}
    assert {d.estimate.low for d in found.differences} == {None}


def test_the_first_arm_is_compared_with_every_other_one():
    """At equal episodes, paired by seed; a seed that one of them lacks counts for neither."""
    records = [
        *(make("new", seed, [0.0, 0.5, score]) for seed, score in ((1, 0.8), (2, 0.6), (3, 0.1))),
        *(make("old", seed, [0.0, 0.1, 0.2]) for seed in (1, 2, 3)),
        *(make("less", seed, [0.0, 0.2, score]) for seed, score in ((1, 0.7), (2, 0.7))),
    ]
    found = {row.arm: row for row in summarize(study(*records, planned=3), MEASURE).versus}
    assert set(found) == {"old", "less"}
    assert found["less"].seeds == (1, 2)
    assert found["less"].score == pytest.approx(0.7)
    assert found["less"].estimate.mean == pytest.approx((0.1 - 0.1) / 2)
    assert found["old"].seeds == (1, 2, 3)
    assert found["old"].estimate.mean == pytest.approx(0.3)


def test_an_arm_without_tips_is_evaluated_without_them_only():
    records = [replace(make("old", seed, [0.0, 0.5]), tips={"none": {"score_mean": 0.3}}) for seed in (1, 2)]
    (row,) = tips_scores(study(*records))
    assert row.none.mean == pytest.approx(0.3)
    assert (row.own, row.other, row.own_minus_none, row.own_minus_other) == (None, None, None, None)
    assert tables.tips_table([row], 2).endswith("| 0.30 [0.30, 0.30] | — | — |")
    assert verdict.tips_verdict([row], 2) == []


def test_an_arm_that_did_not_reach_the_budget_has_no_score_there():
    records = [make(arm, 1, [0.0, 0.5, 0.6]) for arm in ("new", "old")] + [make("third", 1, [0.1, 0.9])]
    row = next(row for row in summarize(study(*records), MEASURE).arms if row.arm == "third")
    assert row.at["episodes"] is None
    assert row.at["final"].mean == 0.9
    assert row.before.mean == 0.1
    both = [*records, make("third", 2, [0.1, 0.9, 0.9])]
    row = next(row for row in summarize(study(*both), MEASURE).arms if row.arm == "third")
    assert row.at["episodes"] is None, "a mean over those who got there would be a mean over other seeds"


def test_over_all_tasks_each_seed_is_averaged_first():
    records = [
        make(arm, seed, [0.0, score + 0.1 * seed], task=task)
        for task, of_new in (("easy", 0.6), ("hard", 0.2))
        for arm, score in (("new", of_new), ("old", 0.1))
        for seed in (1, 2)
    ]
    found = summarize(study(*records, tasks=("easy", "hard")), MEASURE)
    main = next(difference for difference in found.overall if difference.place == "episodes")
    assert main.estimate.mean == pytest.approx(0.3)  # of 0.5 and 0.1
    assert main.seeds == (1, 2)
    records = [r for r in records if (r.task, r.arm, r.seed) != ("hard", "old", 2)]
    found = summarize(study(*records, tasks=("easy", "hard")), MEASURE)
    assert found.overall[0].seeds == (1,), "seed 2 is not finished everywhere"


def test_tips_are_paired_by_seed():
    records = [make("new", 1, [0.0, 0.5], tips=(0.2, 0.5, 0.1)), make("new", 2, [0.0, 0.5], tips=(0.4, 0.6, 0.3))]
    (row,) = tips_scores(study(*records, make("old", 1, [0.0, 0.1])))
    assert (row.arm, row.own.mean, row.other.mean) == ("new", pytest.approx(0.55), pytest.approx(0.2))
    assert row.own_minus_none.mean == pytest.approx(0.25)
    assert row.own_minus_other.high - row.own_minus_other.low == pytest.approx(2 * 12.7062 * 0.05, rel=1e-4)


# --- words ---


def said(*records: Record, **options) -> str:
    made = study(*records, **options)
    return "\n".join(verdict.verdict(made, summarize(made, made.measure)))


def pair(new: list[float], old: list[float], task: str = "easy") -> list[Record]:
    return [
        make(arm, seed, [0.0, score], task=task)
        for arm, scores in (("new", new), ("old", old))
        for seed, score in enumerate(scores, start=1)
    ]


def test_the_verdict_says_what_the_interval_shows():
    text = said(*pair([0.6, 0.62, 0.61], [0.2, 0.22, 0.24]), planned=3)
    assert "At equal episodes (10) new scores 0.61 and old 0.22 (score, trained variations)" in text
    # 0.40, 0.40, 0.37: s = 0.0173, half width 4.3027 · s / √3 = 0.043
    assert "difference 0.39, 95 % interval 0.35 to 0.43, 3 seeds. The interval lies above 0." in text
    assert "That is 2.77 times the score of old." in text
    assert "At equal tokens (140): difference 0.39" in text
    assert "includes 0: no difference was shown" in said(*pair([0.6, 0.1], [0.2, 0.3]))
    assert "below 0: old scores higher" in said(*pair([0.2, 0.21], [0.6, 0.62]))


def test_one_pair_shows_nothing():
    text = said(*pair([0.6], [0.2]), planned=2)
    assert "difference 0.40, 1 of 2 seeds. One seed gives no interval: nothing was shown." in text
    assert "interval" not in text.split("nothing was shown.")[1]
    assert "nothing to compare yet" in said(make("new", 1, [0.0, 0.6]))


def test_no_ratio_to_a_score_of_nearly_nothing():
    text = said(*pair([0.6, 0.62], [0.03, 0.05]))
    assert "No ratio is given: old scores 0.040, less than the 0.1 from which one means something." in text
    assert "times the score" not in text
    assert "No ratio is given: new scores below 0." in said(*pair([-0.6, -0.62], [0.3, 0.3]))


def test_equal_differences_are_called_that():
    assert "(every seed gives the same difference)" in said(*pair([1.0, 1.0], [0.0, 0.0]))


def test_several_tasks_have_a_verdict_each_and_one_for_all():
    tasks = ("easy", "hard")
    text = said(*pair([0.6, 0.64], [0.2, 0.24]), *pair([0.3, 0.1], [0.1, 0.3], task="hard"), tasks=tasks)
    assert text.startswith("**All 2 tasks.** On average over tasks, at equal episodes new scores 0.41 and old 0.21")
    assert "the interval lies above 0 in 1 of 2, below 0 in 0" in text
    assert "\n**easy.** At equal episodes" in text
    assert "\n**hard.** At equal episodes" in text
    only_easy = said(*pair([0.6, 0.62], [0.2, 0.22]), tasks=tasks)
    assert "No seed is finished in all tasks" in only_easy
    assert "**hard.** No seed is finished" in only_easy


def test_over_all_tasks_the_way_there_is_told_too():
    tasks = ("easy", "hard")
    records = [
        make(arm, seed, scores, task=task)
        for arm, scores in (("new", [0.0, 0.0, 0.0, 0.0, 0.0, 0.8]), ("old", [0.0, 0.4, 0.4, 0.4, 0.4, 0.4]))
        for task in tasks
        for seed in (1, 2)
    ]
    made = study(*records, tasks=tasks)
    found = summarize(made, MEASURE)
    assert [row.estimate.mean for row in found.earlier if not row.task] == pytest.approx([-0.4] * 12)
    assert "**Earlier the other way**: at 20% of those episodes -0.40" in verdict.verdict(made, found)[0]
    assert "| all tasks | 20% of the episodes | 0.00 | 0.40 | -0.40 [-0.40, -0.40] |" in tables.earlier_table(
        made, found, 2
    )


def test_own_tips_must_beat_both():
    def finding(*tips: tuple[float, float, float]) -> str:
        records = [make("new", seed, [0.0, 0.5], tips=values) for seed, values in enumerate(tips, start=1)]
        return verdict.tips_verdict(tips_scores(study(*records)), 2)[0]

    assert "own tips beat both" in finding((0.2, 0.5, 0.1), (0.2, 0.51, 0.11))
    assert "not shown to beat both" in finding((0.2, 0.5, 0.5), (0.2, 0.51, 0.51))
    assert "one seed gives no interval" in finding((0.2, 0.5, 0.1))


def test_scores_to_a_hundred_have_one_digit_after_the_point():
    assert verdict.digits(summarize(study(*pair([60.0, 62.0], [20.0, 22.0])), MEASURE)) == 1
    assert verdict.digits(summarize(study(*pair([0.6, 0.7], [0.2, 0.3])), MEASURE)) == 2
    assert verdict.number(-0.001, 2) == "0.00"


def test_cells_of_a_table_cannot_break_it():
    assert tables.table(["a", "b"], [["x|y\nz", "1"]]) == "| a | b |\n|---|---:|\n| x\\|y z | 1 |"
    assert measure_words("eval_success_rate") == "success rate, unseen variations"


def test_the_page_has_everything_and_missing_cells_are_never_zero(tmp_path: Path):
    records = [
        *(make("new", seed, [0.0, 0.6 + seed / 50], unseen=0.25, tips=(0.2, 0.5, 0.1)) for seed in (1, 2)),
        make("old", 1, [0.0, 0.2], unseen=0.05),
        make("old", 2, [0.0], state="failed", detail="empo2: out of memory"),
        make("third", 1, [0.3], state="running", detail="step 0 of 4"),
        replace(make("third", 2, []), state="not run yet", provenance={}),
    ]
    report.write(study(*records), tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert page.split("\n\n")[1].startswith("At equal episodes"), "the verdict comes first"
    for heading in ("## Arms", "## Difference", "## Missing cells", "## Unseen", "## After training", "## Figures"):
        assert heading in page
    assert "| easy | old | 2 | failed: empo2: out of memory |" in page
    assert "| easy | third | 1 | running: step 0 of 4 |" in page
    assert "| easy | third | 2 | not run yet |" in page
    assert "| old | 1/2 | 0.00 | 0.20 | 0.20 | 0.20 | 0.20 |" in page
    assert "| third | 0/2 | — | — | — | — | — |" in page
    assert "| new | 2/2 | 0.00 [0.00, 0.00] | 0.63 [0.50, 0.76] |" in page
    assert "| new | 2/2 | 0.25 [0.25, 0.25] |" in page.split("## Unseen")[1]
    assert "3 of 6 cells are finished" in page
    assert "empo2 experiment coin.toml" in page.split("## How to repeat")[1]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["cells"][0]["score"] == [0.0, 0.62]
    assert content["cells"][0]["tokens"] == [0, 140]
    assert content["verdict"][0] in page
    for name in ("curves.png", "curves.svg", "diagnostics.png", "diagnostics.svg"):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_further_pair_has_a_verdict_and_budgets_of_its_own(tmp_path: Path):
    """At equal seconds: the third arm's steps cost twice those of the old one, which had twice as many."""
    records = [
        *(make("new", seed, [0.0, 0.5, 0.9]) for seed in (1, 2, 3)),
        *(make("old", seed, [0.0, 0.1, 0.2, 0.3, 0.4 + seed / 100]) for seed in (1, 2, 3)),
        *(make("third", seed, [0.0, 0.6, 0.8], seconds=2.0) for seed in (1, 2)),
    ]
    made = study(*records, planned=3)
    made = replace(made, seeds={**made.seeds, "third": (1, 2)}, also_compare=(("third", "old"),))
    report.write(made, tmp_path)
    page = (tmp_path / "results.md").read_text()
    own = page.split("### third and old")[1].split("\n## ")[0]
    assert own.strip().startswith("At equal episodes (20: 50% of old's training) third scores 0.80 and old 0.20 ")
    assert "difference 0.60, 95 % interval 0.60 to 0.60, 2 seeds." in own, "2 of the 3 were planned for both"
    assert "At equal seconds (4): difference 0.39" in own
    assert "| 4 seconds | 2 | 0.80 | 0.42 | 0.39 " in own
    assert "2 seconds" in page.split("## Also compared")[0], "the first pair keeps its budget"
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["also"][0]["compare"] == ["third", "old"]
    assert content["also"][0]["budgets"]["easy"]["seconds"] == 4
    assert content["also"][0]["differences"][2]["estimate"]["mean"] == pytest.approx(0.8 - 0.415)
    report.write(replace(made, also_compare=()), tmp_path)
    assert "Also compared" not in (tmp_path / "results.md").read_text()


def test_a_report_of_nothing_is_a_report(tmp_path: Path):
    blank = [replace(make(arm, 1, []), state="not run yet", provenance={}) for arm in ("new", "old")]
    report.write(study(*blank, planned=1), tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "nothing to compare yet" in page
    assert "0.00" not in page


P32 = {"sampler": "bfloat16", "trainer": "float32"}


def test_runs_with_other_weights_or_on_other_machines_are_named(tmp_path: Path):
    one, other = pair([0.6], [0.2])
    other = replace(
        other,
        provenance={
            **other.provenance,
            "machine": {"processor": "Q", "cores": 4, "gpu": "G"},
            "code": "def",
            "weights": "w2",
        },
    )
    one = replace(one, provenance={**one.provenance, "weights": "w1"})
    text = tables.repeat_section(study(one, other), summarize(study(one, other), MEASURE))
    assert "not all trainings began with the same weights**: w1, w2" in text
    assert "P, 2 cores; G, Q, 4 cores" in text
    assert "seconds are of more than one machine" in text
    assert "code: abc, def" in text
    assert "seconds and tokens are of more than one version of the code" in text
    alone = [replace(record, provenance={**one.provenance, "precision": P32}) for record in pair([0.6], [0.2])]
    text = tables.repeat_section(study(*alone), summarize(study(*alone), MEASURE))
    assert "more than one" not in text
    assert "precision: bfloat16 sampler, float32 trainer" in text
    mixed = replace(alone[1], provenance={**one.provenance, "precision": {**P32, "sampler": "float32"}})
    text = tables.repeat_section(study(alone[0], mixed), summarize(study(*alone), MEASURE))
    assert "**not all trainings ran in the same precision, which changes seconds and scores**" in text
    went_on = replace(alone[0], provenance={**alone[0].provenance, "resumed": [other.provenance]})
    text = tables.repeat_section(study(went_on, alone[1]), summarize(study(*alone), MEASURE))
    assert "code: abc, def" in text
    assert "more than one machine" in text


def on(machine: str, record: Record) -> Record:
    return replace(record, provenance={**record.provenance, "machine": {"processor": machine, "cores": 2}})


def test_seconds_are_compared_on_one_machine_only(tmp_path: Path):
    """Seeds 1 and 2 ran on P, seed 3's arms on P and Q, seed 4 on Q, whose steps take a hundredth of the time."""
    news, olds = (
        [make(arm, seed, [0.0, score, score], seconds=10.0) for seed in (1, 2, 3)]
        for arm, score in (("new", 0.8), ("old", 0.4))
    )
    fast = [
        on("Q", make(arm, seed, [0.0, 0.5, 0.5], seconds=0.1)) for arm, seed in (("old", 3), ("new", 4), ("old", 4))
    ]
    made = study(*news, *olds[:2], *fast, planned=4)
    assert made.timed_on("easy") == ("P, 2 cores",)
    found = summarize(made, MEASURE)
    at = {row.place: row for row in found.differences}
    assert (at["seconds"].budget, at["seconds"].seeds) == (20.0, (1, 2)), "a cell of Q would make it 0.2"
    assert at["seconds"].estimate.mean == pytest.approx(0.4)
    assert at["episodes"].seeds == (1, 2, 3, 4)
    assert {row.arm: row.at["seconds"] for row in found.arms} == {"new": None, "old": None}, "not all ran on P"
    text = tables.repeat_section(made, found)
    assert "more than one machine**: only those of P, 2 cores are compared" in text
    report.write(made, tmp_path)


def test_seconds_of_arms_that_share_no_machine_are_not_compared(tmp_path: Path):
    one, other = pair([0.6], [0.2])
    made = study(one, on("Q", other), planned=1)
    found = summarize(made, MEASURE)
    assert "seconds" not in {row.place for row in found.differences}
    assert "At equal seconds nothing can be compared." in " ".join(verdict.verdict(made, found))
    assert "more than one machine**: none are compared" in tables.repeat_section(made, found)
    report.write(made, tmp_path)
    moved = replace(one, provenance={**one.provenance, "resumed": [on("Q", other).provenance]})
    assert study(moved, other, planned=1).timed_on("easy") is None, "its seconds are of two machines"


# --- figures ---


def test_five_arms_look_different_and_odd_ones_are_drawn(tmp_path: Path):
    made = study(*(make(f"arm {n}", 1, [0.0, 0.5]) for n in range(3)))
    assert len({colour for colour, _ in curves._colours(made).values()}) == 5
    assert len({dash for _, dash in curves._colours(made).values()}) == 4, "colour alone tells the compared arms apart"
    apart = [replace(make("a $x", 1, [0.0, 0.5]), metrics=()), make("$\\frac{", 2, [math.nan, 0.2])]
    apart += [make("a $x", 1, [0.1, math.nan, math.nan]), make("a $x", 2, [math.nan, math.nan, 0.2])]
    made = study(*apart, compare=("a $x", "$\\frac{"))
    curves.draw_curves(made, tmp_path)
    curves.draw_diagnostics(made, tmp_path)


def test_more_arms_than_can_be_told_apart_have_a_row_each(tmp_path: Path):
    few, many = ([make(f"arm {n}", 1, [0.0, 0.5]) for n in range(count)] for count in (3, 4))
    assert study(*few).apart == ()
    assert study(*many).apart == ("arm 0", "arm 1", "arm 2", "arm 3")
    assert list(curves._colours(study(*many))) == ["new", "old"]
    pairs = replace(study(*many), also_compare=tuple((f"arm {n}", "old") for n in (3, 2, 1, 0)))
    assert (pairs.together, pairs.apart) == (("new", "old", "arm 3", "arm 2", "arm 1"), ("arm 0",))
    for name, records in (("few", few), ("many", many)):
        report.write(study(*records, *pair([0.6], [0.2])), tmp_path / name)
        page = (tmp_path / name / "results.md").read_text()
        drawn = name == "many"
        assert ("![the other arms](arms.png)" in page, "[arms](arms.svg)" in page) == (drawn, drawn)
        assert [(tmp_path / name / f"arms.{kind}").exists() for kind in ("png", "svg")] == [drawn, drawn]
    report.write(study(*few, *pair([0.6], [0.2])), tmp_path / "many")
    assert not list((tmp_path / "many").glob("arms.*")), "those of the report with more arms"


def test_an_arm_apart_stands_beside_the_first_arm_on_its_own_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.axes import Axes

    lines: dict[str, list[list[float]]] = {}
    monkeypatch.setattr(
        Axes, "plot", lambda _, xs, ys, color, **__: lines.setdefault(color, []).append([*ys]) if ys else None
    )
    others = [make(f"arm {n}", 3, []) for n in range(3)]
    made = study(*pair([0.6, 0.7], [0.2]), *(make("apart", seed, [0.1, seed / 5]) for seed in (2, 3)), *others)
    curves.draw_arms(made, tmp_path)
    mean_and_seed = 2
    assert lines[curves.APART][:mean_and_seed] == [[0.1, 0.4]] * mean_and_seed, "seed 2 only"
    assert lines[curves.PALETTE[0]][:mean_and_seed] == [[0.0, 0.7]] * mean_and_seed, "seed 2 only"
    assert lines[curves.PALETTE[0]][mean_and_seed:] == [[1.0]], "its gradient norm; none for arms without a seed"


def test_figures_are_the_same_bytes_each_time(tmp_path: Path):
    for name, new in (("a", 0.6), ("b", 0.6), ("c", 0.7)):
        (tmp_path / name).mkdir()
        curves.draw_curves(study(*pair([new, 0.62], [0.2, 0.22])), tmp_path / name)
    first, second, other = ([(tmp_path / n / f"curves.{kind}").read_bytes() for kind in ("png", "svg")] for n in "abc")
    assert first == second
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert b"<dc:date>" not in first[1]


def test_one_or_two_seeds_have_lines_and_no_shade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.axes import Axes

    shades = []
    monkeypatch.setattr(Axes, "fill_between", lambda *given, **_: shades.append(given[1:]))
    curves.draw_curves(study(*pair([0.6], [0.2, 0.3])), tmp_path)
    assert shades == []
    curves.draw_curves(study(*pair([0.6, 0.7, 0.65], [0.2, 0.3])), tmp_path)
    assert len(shades) == 2  # over episodes, over seconds


def test_labels_stand_where_lines_end_on_logarithmic_axes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.axes import Axes

    placed = {}
    monkeypatch.setattr(Axes, "text", lambda panel, x, y, text, **_: placed.update({text: (panel.get_yscale(), y)}))
    made = [
        replace(r, metrics=tuple({**m, "grad_norm": norm} for m in r.metrics))
        for r, norm in zip(pair([0.6], [0.2]), (1e-2, 1e4), strict=True)
    ]
    monkeypatch.setattr(curves, "DIAGNOSTICS", {"grad_norm": "gradient norm"})
    curves.draw_diagnostics(study(*made), tmp_path)
    low, high = 1e-2 / 1.5, 1e4 * 1.5
    share = {name: math.log(norm / low) / math.log(high / low) for name, norm in (("new", 1e-2), ("old", 1e4))}
    assert {name: y for name, (_, y) in placed.items()} == pytest.approx(share)
    assert {scale for scale, _ in placed.values()} == {"log"}


def test_an_arm_without_a_line_has_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.axes import Axes

    named = []
    monkeypatch.setattr(Axes, "text", lambda _, x, y, text, **__: named.append(text))
    curves.draw_curves(study(*pair([0.6], [0.2]), make("not run", 1, [])), tmp_path)
    assert sorted(named) == ["new", "new", "old", "old"]  # over episodes, over seconds


def test_the_compared_arms_keep_the_first_two_colours():
    made = study(make("third", 1, [0.0]), *pair([0.6], [0.2]))
    assert [colour for colour, _ in curves._colours(made).values()] == list(curves.PALETTE[:3])
    assert list(curves._colours(made)) == ["new", "old", "third"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_are_moved_apart_and_stay_in_order(heights: list[float]):
    gap = 0.1
    wanted = sorted(heights)
    placed = curves.spread(wanted, gap)
    assert all(after - before >= gap - 1e-9 for before, after in itertools.pairwise(placed))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)
    if all(after - before >= gap for before, after in itertools.pairwise(wanted)):
        assert placed == pytest.approx(wanted)


def test_without_matplotlib_the_report_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPart, match=r"pip install 'empo2\[report\]'"):
        report.write(study(), tmp_path / "results")
    assert not (tmp_path / "results").exists()
