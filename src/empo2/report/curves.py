"""Learning curves and diagnostics as PNG and SVG (matplotlib, imported when something is drawn).

One column a task. An arm keeps its colour everywhere: a thick line is the mean over finished seeds, the shade its 95 %
interval (t; from three seeds on, that of two would fill the picture), thin lines are seeds. Where there are more arms
than can be told apart, `curves` and `diagnostics` show the compared pairs, and `arms` has a row for each of the others,
beside the first compared arm on the same seeds. The same study gives the same bytes on the same version of matplotlib.
"""

import contextlib
import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empo2.errors import MissingPart
from empo2.report.records import Axis, Record, Study, measure_words
from empo2.report.statistics import Curve, band

#: of Okabe and Ito's palette, told apart by colour-blind readers; the compared arms take the first two
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
DASHES = ("-", "-", "--", "-.", ":")
APART = PALETTE[2]  #: the arm of a row of `draw_arms`

MIN_SHADED = 3  #: seeds

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
}

DIAGNOSTICS = {
    "entropy_sampled": "entropy without tips,\nsampled (nats a token)",
    "entropy": "entropy, trained tokens\n(nats a token)",
    "grad_norm": "gradient norm",
    "distinct_states": "distinct states seen",
}
LOGARITHMIC = {"grad_norm"}  #: one step in a thousand may have a thousand times the norm of the others

#: drawn beside the measure of an arm that has a row of its own: what the paper's figures 6 and 7 are about
BESIDE_ARMS = {"entropy_sampled": "entropy without tips", "grad_norm": "gradient norm"}

#: evaluated beside the score: what follows `eval_` or `eval_train_` → what the axis says
BESIDE = {"success_rate": "success (share)", "valid_action_rate": "valid actions (share)"}


def require() -> None:
    """Raise MissingPart unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPart(
            "matplotlib is not installed, and the report's figures need it; run: pip install 'empo2[report]'"
        )


def draw_curves(study: Study, folder: Path) -> None:
    """curves.png and curves.svg: the measure over episodes, below it over seconds; success and valid actions."""
    axes: tuple[Axis, ...] = ("episodes", "seconds")
    rows = [
        _Quantity(label=measure_words(study.measure), key=study.measure, axis=axis, evaluated=True) for axis in axes
    ]
    prefix = "eval_train_" if study.measure.startswith("eval_train_") else "eval_"
    for name, label in BESIDE.items():
        row = _Quantity(label=label, key=prefix + name, axis="episodes", evaluated=True)
        if any(row.curve(record) != rows[0].curve(record) for record in study.records):  # a score of 0 or 1 is success
            rows.append(row)
    _draw(study, rows, folder / "curves", height=2.6)


def draw_diagnostics(study: Study, folder: Path) -> None:
    """diagnostics.png and diagnostics.svg: how training went, step by step, over episodes."""
    rows = [_Quantity(label=label, key=key, axis="episodes", evaluated=False) for key, label in DIAGNOSTICS.items()]
    _draw(study, _measured(study, rows) or rows, folder / "diagnostics", height=1.9)


def _measured(study: Study, rows: Sequence["_Quantity"]) -> list["_Quantity"]:
    """Those of which there is something to draw: older runs lack some."""
    return [row for row in rows if any(row.curve(record).xs for record in study.records)]


def draw_arms(study: Study, folder: Path) -> None:
    """arms.png and arms.svg: a row for each of `Study.apart`, with the first compared arm on the seeds of both.

    An arm that has no seed with it stands alone. The columns are the measure, the entropy and the gradient norm over
    episodes, each on every task.
    """
    score = _Quantity(label=measure_words(study.measure), key=study.measure, axis="episodes", evaluated=True)
    beside = [_Quantity(label=label, key=key, axis="episodes", evaluated=False) for key, label in BESIDE_ARMS.items()]
    columns = [(task, row) for row in (score, *_measured(study, beside)) for task in study.tasks]
    arms = study.apart
    with _figure(study, width=1.4 + 2.5 * len(columns), height=1.3 * len(arms) + 0.7, target=folder / "arms") as figure:
        panels: Any = figure.subplots(len(arms), len(columns), squeeze=False, sharey="col")
        for arm, arm_panels in zip(arms, panels, strict=True):
            for panel, (task, row) in zip(arm_panels, columns, strict=True):
                _draw_pair(panel, study, row, task, arm)
            arm_panels[0].set_ylabel(
                _plain(textwrap.fill(arm, 14)), rotation=0, ha="right", va="center", color=APART, fontweight="bold"
            )
        for panel, (task, row) in zip(panels[0], columns, strict=True):
            panel.set_title(_plain(f"{task}: {row.label}"), loc="left", color="#333333", fontsize=9)
        for panel in panels[-1]:
            panel.set_xlabel("training episodes")
        figure.suptitle(
            _plain(f"{study.compare[0]} on the same seeds"), x=0.01, ha="left", fontsize=10,
            color=PALETTE[0], fontweight="bold",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """What a panel draws: a key of evaluations.jsonl, or of metrics.jsonl, along a budget."""

    label: str
    key: str
    axis: Axis
    evaluated: bool  #: evaluations are few: single seeds are drawn as well

    def curve(self, record: Record) -> Curve:
        return (record.evaluated if self.evaluated else record.trained)(self.key, self.axis)


def _colours(study: Study) -> dict[str, tuple[str, str]]:
    """Arms that are drawn together → colour and dash; the compared arms first."""
    return {arm: (PALETTE[index], DASHES[index]) for index, arm in enumerate(study.together)}  # MAX_TOGETHER of them


@contextlib.contextmanager
def _figure(study: Study, *, width: float, height: float, target: Path) -> Iterator[Any]:
    """A figure (inches) that is written to ``target`` with both endings when it has been drawn."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": study.name, "svg.fonttype": "path"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(target.with_suffix(".png"), dpi=160, metadata={"Software": None})
        figure.savefig(target.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _draw(study: Study, rows: Sequence[_Quantity], target: Path, *, height: float) -> None:
    columns = len(study.tasks)
    width = 0.8 + (3.4 if columns > 1 else 5.0) * columns + 0.075 * max(map(len, _colours(study)))
    with _figure(study, width=width, height=height * len(rows) + 0.4, target=target) as figure:
        same_x = len({row.axis for row in rows}) == 1
        panels: Any = figure.subplots(
            len(rows), columns, squeeze=False, sharey="row", sharex="col" if same_x else "none"
        )
        for row, row_panels in zip(rows, panels, strict=True):
            _draw_row(study, row, row_panels)
            for panel in row_panels if not same_x or row is rows[-1] else ():
                panel.set_xlabel(f"training {row.axis}")
        for panel, task in zip(panels[0], study.tasks, strict=True):
            panel.set_title(_plain(task), loc="left", fontweight="bold", color="#333333", fontsize=10)


def _draw_pair(panel: Any, study: Study, row: _Quantity, task: str, arm: str) -> None:
    """One panel of `draw_arms`."""
    finished, reference = (study.finished(task, name) for name in (arm, study.compare[0]))
    both = [seed for seed in finished if seed in reference]
    beside = [reference[seed] for seed in both]
    own = [finished[seed] for seed in both or finished]
    for records, colour in ((beside, PALETTE[0]), (own, APART)):
        drawn = [curve for curve in map(row.curve, records) if curve.xs]
        for curve in drawn if row.evaluated else ():
            panel.plot(curve.xs, curve.ys, color=colour, linewidth=0.8, alpha=0.35)
        mean = band(drawn)
        panel.plot(mean.xs, mean.mean, color=colour, linewidth=1.8)
    if row.key in LOGARITHMIC:
        _logarithmic(panel)
    panel.set_xlim(left=0)


def _draw_row(study: Study, row: _Quantity, panels: Any) -> None:
    colours = _colours(study)
    seen = [0.0]  # heights of lines; shades may leave the picture
    ends: dict[str, float] = {}  # heights at which the last panel's lines end
    for panel, task in zip(panels, study.tasks, strict=True):
        ends = {}
        for arm, (colour, dash) in reversed(colours.items()):  # the compared arms lie on top
            for curve in _draw_arm(panel, study, row, task, arm, colour, dash):
                seen += curve.ys
                ends[arm] = curve.ys[-1]
        panel.set_xlim(left=0)
        panel.margins(x=0.02)
    panels[0].set_ylabel(row.label)
    top = max(seen)
    positive = [height for height in seen if height > 0]
    if row.key in LOGARITHMIC and positive:
        panels[0].set_ylim(min(positive) / 1.5, top * 1.5)
        _logarithmic(panels[0])
    else:
        panels[0].set_ylim(min(seen) * 1.05, top * 1.06 if top > 0 else 1.0)
    _label(panels[-1], colours, ends)


def _draw_arm(panel: Any, study: Study, row: _Quantity, task: str, arm: str, colour: str, dash: str) -> list[Curve]:
    """Draw one arm in one panel; the curves that must be in the picture, the mean last."""
    records = [r for r in study.records if (r.task, r.arm) == (task, arm) and study.counts(r, row.axis)]
    every = [curve for curve in map(row.curve, records) if len(curve.xs) > 1]
    finished = [curve for r in records if r.state == "finished" and (curve := row.curve(r)).xs]
    if row.evaluated:
        for curve in every:
            panel.plot(curve.xs, curve.ys, color=colour, linewidth=0.8, alpha=0.35, linestyle=dash)
    if not finished:
        return every if row.evaluated else []
    found = band(finished)
    if not found.xs:
        return every if row.evaluated else []
    panel.plot(found.xs, found.mean, color=colour, linewidth=2.2, linestyle=dash, solid_capstyle="round")
    if found.low and len(finished) >= MIN_SHADED and row.key not in LOGARITHMIC:
        panel.fill_between(found.xs, found.low, found.high, color=colour, alpha=0.14, linewidth=0)
    return [*(every if row.evaluated else []), Curve(found.xs, found.mean)]


def _logarithmic(panel: Any) -> None:
    """A logarithmic y axis over what is in the picture, with few and plain numbers."""
    from matplotlib import ticker

    panel.set_yscale("log", nonpositive="clip")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def _label(panel: Any, colours: dict[str, tuple[str, str]], ends: dict[str, float]) -> None:
    """Arm names right of the last panel, at the height where their lines end, moved apart where they would touch."""
    panel_height = panel.get_figure().get_figheight() / max(panel.get_subplotspec().get_gridspec().nrows, 1)
    gap = 0.19 / panel_height  # of a line of text, as a share of the panel
    to_share = panel.transScale + panel.transLimits  # of the panel's height, logarithmic or not
    wanted = {arm: float(to_share.transform((1, height))[1]) for arm, height in ends.items()}
    order = sorted(wanted, key=lambda arm: wanted[arm])
    for arm, height in zip(order, spread([wanted[arm] for arm in order], gap), strict=True):
        colour, dash = colours[arm]
        place: Any = {"transform": panel.transAxes, "color": colour, "clip_on": False}
        panel.plot([1.02, 1.08], [height, height], linewidth=2.2, linestyle=dash, **place)
        panel.text(1.09, height, _plain(arm), va="center", fontweight="bold", **place)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights (0…1) moved until neighbours are ``gap`` apart: those that touch stand around their middle."""
    blocks: list[list[float]] = []  # of wanted heights that touch
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _placed(blocks[-2], gap)[-1] + gap > _placed(blocks[-1], gap)[0]:
            last = blocks.pop()
            blocks[-1] = [*blocks[-1], *last]
    return [height for block in blocks for height in _placed(block, gap)]


def _placed(block: Sequence[float], gap: float) -> list[float]:
    length = gap * (len(block) - 1)
    begin = max(0.0, min(sum(block) / len(block) - length / 2, 1 - length))
    return [begin + gap * index for index in range(len(block))]
