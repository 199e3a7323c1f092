"""Builds one self-contained HTML page of a sweep.

It shows the runs side by side, at equal steps and at equal loss.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ntk.functional.verdict import LAZY, RICH, Verdict
from lightning_ntk.plots.history import LABELS, History
from lightning_ntk.plots.scalars import draw_scalars
from lightning_ntk.plots.style import MARKERS, PALETTE, label_plainly, new_figure
from lightning_ntk.report import document
from lightning_ntk.report.table import number, spread
from lightning_ntk.sweep.plot import plot_scaling
from lightning_ntk.sweep.statistics import PowerLaw, geometric_mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_ntk.sweep.results import Results, TableRow

# Runs that have markers, points of all curves in a figure with markers and without, and entries of its legend: with more, a
# page is larger than 500 kB and tells nothing.
_MOST_MARKED, _MARKED_POINTS, _MOST_POINTS, _MOST_LABELS = 40, 300, 2000, 24
_WIDTH, _HEIGHT = 6.4, 4.6


class _Group(NamedTuple):
    """The repetitions of one configuration.

    It holds their values of the parameters that vary, and their places in the results.
    """

    values: dict[str, Any]
    runs: list[int]


class _Place(NamedTuple):
    """Where runs are compared: at a step, or at a loss."""

    name: str
    results: "Results"
    step: float | None
    loss: float | None

    @property
    def rows(self) -> "list[TableRow]":
        """A row for each run."""
        return self.results.at_step(self.step)


class _Line(NamedTuple):
    """A figure over the swept parameter, with its slope if there is one."""

    place: str
    slopes: list[PowerLaw]
    figure: "Figure"


def write_sweep_report(
    path: str | Path,
    results: "Results",
    *,
    x: str | None = None,
    over: str | None = None,
    loss: float | None = None,
    title: str = "Lazy or rich?",
) -> Path:
    """Writes the page; see `Results.report`."""
    distance = results.tag("relative_weight_distance")
    over = _repetitions(results) if over is None else over
    groups = _groups(results, over)
    swept = _swept(groups) if x is None else x
    histories = [history for _, history in results.runs]
    places = _places(results, histories, loss)
    verdicts = results.verdicts
    lines, notes = _lines(places, swept, distance, over) if swept else ([], [])
    parts = [_headline(verdicts, swept, lines, over), _table(groups, verdicts, histories, places, distance)]
    if lines:
        parts += [
            document.heading(f"How far, over {swept}"),
            document.paragraph(
                "Networks that train faster have come further after the same number of steps. Only at equal loss do the "
                "distances compare what the networks are."
            ),
            _pair([line.figure for line in lines]),
        ]
    for heading, keys in {
        "Run by run, step by step": (("relative_weight_distance", "step"), ("loss", "step")),
        "Run by run, at equal loss": (("relative_weight_distance", "loss"), ("taylor_gap", "loss")),
    }.items():
        figures = [_curves(groups, histories, key, along) for key, along in keys if _measured(histories, key, along)]
        parts += [document.heading(heading), _pair(figures)] if figures else []
    notes += _notes(results, verdicts, places)
    parts += [document.heading("What to be careful with"), document.listing(notes)] if notes else []
    return document.write(path, document.document(title, parts))


def _repetitions(results: "Results") -> str | None:
    """The parameter that varies and is called a seed."""
    return next((name for name in results.varying if "seed" in name.rpartition(".")[2]), None)


def _groups(results: "Results", over: str | None) -> list[_Group]:
    names = [name for name in results.varying if name != over]
    groups: dict[str, _Group] = {}
    for index, configuration in enumerate(results.configurations):
        values = {name: configuration[name] for name in names if name in configuration}
        groups.setdefault(repr(values), _Group(values, [])).runs.append(index)
    return list(groups.values())


def _swept(groups: Sequence[_Group]) -> str | None:
    """The parameter of positive numbers with the most values."""
    values: dict[str, set[Any]] = {}
    for group in groups:
        for name, value in group.values.items():
            values.setdefault(name, set()).add(value if _is_positive(value) else None)
    numeric = {name: len(found) for name, found in values.items() if None not in found and len(found) > 1}
    return max(numeric, key=lambda name: numeric[name]) if numeric else None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _places(results: "Results", histories: Sequence[History], loss: float | None) -> list[_Place]:
    places = []
    measured = [{row["step"] for row in history if "relative_weight_distance" in row} for history in histories]
    step = max((step for step in set.intersection(*measured) if step > 0), default=None)
    if step is not None:
        places.append(_Place(f"at step {step:g}", results, step, None))
    loss = _common_loss(histories) if loss is None else loss
    if loss is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of runs that never reach it, which the page counts
            places.append(_Place(f"at loss {loss:.2g}", results.at(loss=loss), None, loss))
    return places


def _common_loss(histories: Sequence[History]) -> float | None:
    """The smallest loss that all runs reach, with two digits.

    Runs whose loss is never halved do not count.
    """
    reached = []
    for history in histories:
        losses = [row["loss"] for row in history if math.isfinite(row.get("loss", math.nan))]
        if losses and 0 < min(losses) < losses[0] / 2:
            reached.append(min(losses))
    if not reached:
        return None
    digit = 10.0 ** (math.floor(math.log10(max(reached))) - 1)
    return float(math.ceil(max(reached) / digit) * digit)


def _lines(places: Sequence[_Place], x: str, y: str, over: str | None) -> tuple[list[_Line], list[str]]:
    """The figures over the swept parameter, on one scale.

    It also says why one cannot be drawn.
    """
    lines, axes, sentences = [], [], []
    for place in places:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of points left out, which the page counts
                figure, axis = plot_scaling(place.results, x, y, over=over, step=place.step)
                single = len(place.results.series(x, y, over=over, step=place.step)) == 1
                slopes = [place.results.slope(x, y, step=place.step)] if single else []
        except ValueError as error:
            sentences.append(f"There is no line {place.name}. {error}")
            continue
        axis.set_title(place.name, fontsize=10)
        axis.set_ylabel(LABELS["relative_weight_distance"])
        lines.append(_Line(place.name, slopes, figure))
        axes.append(axis)
    limits = [limit for axis in axes for limit in axis.get_ylim()]
    for axis in axes:
        axis.set_ylim(min(limits), max(limits))
        label_plainly(axis.yaxis)
    return lines, sentences


def _headline(verdicts: Sequence[Verdict], swept: str | None, lines: Sequence[_Line], over: str | None) -> str:
    trends = [
        f"{_trend(law)} {line.place} (slope {law.slope:.2f}, 95% interval {law.low:.2f} to {law.high:.2f})"
        for line in lines
        for law in line.slopes
    ]
    sentence = f"Over {swept}, the distance {' and '.join(trends)}." if trends else ""
    words = f"{len(verdicts)} runs: {_words(verdicts)}."
    small = f"Lazy is a distance below {LAZY}, rich is {RICH} or more."
    repeated = f" Means are geometric, with 95% intervals, over {over}." if over else ""
    return document.headline("sweep", words, sentence, small + repeated)


def _trend(law: PowerLaw) -> str:
    return "rises" if law.low > 0 else "falls" if law.high < 0 else "does not clearly rise or fall"


def _words(verdicts: Iterable[Verdict]) -> str:
    counts = Counter(verdict.word for verdict in verdicts)
    return ", ".join(f"{counts[w]} {w}" for w in ("lazy", "intermediate", "rich", "undecided") if counts[w])


def _table(
    groups: Sequence[_Group],
    verdicts: Sequence[Verdict],
    histories: Sequence[History],
    places: Sequence[_Place],
    distance: str,
) -> str:
    names = list(dict.fromkeys(name for group in groups for name in group.values))
    columns = {f"distance {place.name}": [row.get(distance, math.nan) for row in place.rows] for place in places}
    columns |= {"last loss": [history[-1].get("loss", math.nan) for history in histories]}
    for place in places:
        if place.loss is not None:
            columns[f"steps to loss {place.loss:.2g}"] = [row.get("step", math.nan) for row in place.rows]
    lines = []
    for group in groups:
        cells = [_value(group.values.get(name, "")) for name in names]
        cells.append(_words(verdicts[run] for run in group.runs))
        lines.append(cells + [_mean([column[run] for run in group.runs]) for column in columns.values()])
    return document.table([*names, "verdict", *columns], lines)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean(values: Sequence[float]) -> str:
    """The geometric mean and its interval, as text.

    It says how many of the values have a logarithm if not all do.
    """
    kept = [value for value in values if 0 < value < math.inf]
    if not kept:
        return "-"
    mean = geometric_mean_interval(kept)
    interval = f" [{number(mean.low)}, {number(mean.high)}]" if mean.count > 1 else ""
    return number(mean.mean) + interval + (f" ({len(kept)} of {len(values)})" if len(kept) < len(values) else "")


def _measured(histories: Sequence[History], key: str, along: str) -> bool:
    return any(key in row and along in row for history in histories for row in history)


def _curves(groups: Sequence[_Group], histories: Sequence[History], key: str, along: str) -> "Figure":
    """A curve for each run, in the color of its configuration."""
    from matplotlib import colormaps

    figure = new_figure(_WIDTH, _HEIGHT)
    axis = figure.subplots()
    few = len(groups) <= len(PALETTE)
    marked = few and len(histories) <= _MOST_MARKED
    fitting = max(8, (_MARKED_POINTS if marked else _MOST_POINTS) // len(histories))
    curves: list[tuple[History, str, dict[str, Any]]] = []
    for place, group in enumerate(groups):
        color = PALETTE[place] if few else colormaps["cividis"](place / len(groups))
        style = {"color": color, "linewidth": 1.2, "marker": MARKERS[place] if marked else None, "markersize": 2.5}
        label = ", ".join(f"{name.rpartition('.')[2]}={_value(value)}" for name, value in group.values.items())
        labels = [label or "all runs"] + [None] * len(group.runs)
        for run, named in zip(group.runs, labels, strict=False):
            curves.append((spread(histories[run], fitting), key, {**style, "label": named}))
    draw_scalars(axis, curves, along)
    handles = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
    if len(handles) <= _MOST_LABELS:
        columns = max(1, min(4, 60 // (4 + max(len(str(line.get_label())) for line in handles))))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _pair(figures: "Sequence[Figure]") -> str:
    return f'<div class="pair">{"".join(map(document.drawing, figures))}</div>'


def _notes(results: "Results", verdicts: Sequence[Verdict], places: Sequence[_Place]) -> list[str]:
    notes = []
    undecided: dict[str, list[str]] = {}
    for (label, _), verdict in zip(results.runs, verdicts, strict=True):
        if verdict.word == "undecided":
            undecided.setdefault(verdict.reason, []).append(label)
    for reason, labels in undecided.items():
        some = "; ".join(labels[:3]) + ", ..." * (len(labels) > 3)
        notes.append(f"Undecided, {len(labels)} of {len(verdicts)} runs ({some}): {reason}.")
    compared = [place for place in places if place.loss is not None]
    if not compared:
        notes.append("Nothing is compared at equal loss: no run has halved its loss, or losses were not measured.")
    for place in compared:
        missing = sum(math.isnan(row.get("step", math.nan)) for row in place.rows)
        if missing:
            notes.append(
                f"{missing} of {len(verdicts)} runs never fall to a loss of {place.loss:.2g}, or begin below it, and are left "
                "out there."
            )
    if not results.has_verdicts:
        notes.append(
            "The study keeps no verdicts, so that they follow from the scalars alone. These do not know of the weights' rounding "
            "nor of the largest stable learning rate."
        )
    return notes
