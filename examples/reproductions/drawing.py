"""What the figures and tables of the reproductions share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lightning_ntk.plots.style import GREY, PALETTE, tidy
from lightning_ntk.plots.style import MARKERS as MARKERS
from lightning_ntk.sweep import PowerLaw, log_log_slope

COLORS = PALETTE
Points = Sequence[tuple[float, float]]


def grid_of_panels(
    rows: int, columns: int, *, width: float = 4.9, height: float = 3.9, **shared: Any
) -> tuple[Figure, list[Any]]:
    """A figure with panels, sized in inches each, row by row; `sharey="row"` shares the vertical axes of a row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def finish(axis: Any, x: str, y: str, *, scales: str = "log-log", title: str = "", legend: str | None = "best") -> None:
    """Names and scales of the axes ("linear-log" is a logarithmic vertical one), grid, and where the legend is, if any."""
    horizontal, vertical = scales.split("-")
    axis.set_xscale(horizontal)
    axis.set_yscale(vertical)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    tidy(axis)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(loc=legend, edgecolor="none", framealpha=0.8, fontsize=8)


def one_legend(figure: Figure, axis: Any, columns: int = 10) -> None:
    """The legend of all panels, below them; they have the same curves."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False, fontsize=9
    )


def number(value: float) -> str:
    """Two decimals, without a minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def draw_power_law(axis: Any, points: Points, label: str, index: int, *, filled: bool = True) -> PowerLaw:
    """Points of all seeds and their least-squares line; slope and 95 % interval are in the legend."""
    law = log_log_slope([x for x, _ in points], [y for _, y in points])
    ends = [min(x for x, _ in points), max(x for x, _ in points)]
    color, marker = COLORS[index], MARKERS[index]
    name = f"{label}: {number(law.slope)} [{number(law.low)}, {number(law.high)}]".replace("-", "−")
    face = color if filled else "none"
    axis.plot(*zip(*points, strict=True), marker, color=color, markersize=4.5, alpha=0.75, markerfacecolor=face)
    style = f"-{marker}" if filled else f"--{marker}"
    # The marker of the legend's entry, drawn nowhere else.
    axis.plot(ends, [law.at(x) for x in ends], style[:-1], color=color, linewidth=1.3)
    axis.plot([], [], style, color=color, markersize=4.5, markerfacecolor=face, label=name)
    return law


def draw_reference(axis: Any, points: Points, slope: float, *, offset: float = 1, color: str = "#555555") -> None:
    """A dotted line of a stated slope through the fit at the last point, or `offset` times above it."""
    xs = [x for x, _ in points]
    first, last = min(xs), max(xs)
    level = offset * log_log_slope(xs, [y for _, y in points]).at(last)
    axis.plot([first, last], [level * (first / last) ** slope, level], ":", color=color, linewidth=1.5)


def draw_limit(axis: Any, level: float, name: str, *, color: str = GREY, vertical: bool = False) -> None:
    """A faint dotted line at a value that means something, with its name."""
    (axis.axvline if vertical else axis.axhline)(level, color=color, linestyle=(0, (1, 2)), linewidth=1, zorder=0.5)
    place: dict[str, Any] = {"textcoords": "offset points", "color": color, "fontsize": 8, "va": "bottom", "ha": "left"}
    if vertical:
        axis.annotate(name, (level, 0), (3, 3), xycoords=("data", "axes fraction"), **place)
    else:
        axis.annotate(name, (0, level), (3, 2), xycoords=("axes fraction", "data"), **place)


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    body = [list(header), ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def save(figure: Figure, path: Path) -> None:
    """Writes the figure, the same file each time, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    print(f"Figure: {path}")
