"""What the figures and tables of the reproductions share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_ntk.sweep import PowerLaw, log_log_slope

# The Okabe-Ito palette, which stays apart for color-blind readers; markers and lines tell curves apart in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
Points = Sequence[tuple[float, float]]


def grid_of_panels(rows: int, columns: int, *, width: float = 4.9, height: float = 3.9) -> tuple[Figure, list[Any]]:
    """A figure with panels, sized in inches each, row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def finish(axis: Any, x: str, y: str, *, scales: str = "log-log", title: str = "", **legend: Any) -> None:
    """Names and scales of the axes ("linear-log" is a logarithmic vertical one), grid and legend."""
    horizontal, vertical = scales.split("-")
    axis.set_xscale(horizontal)
    axis.set_yscale(vertical)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**{"edgecolor": "none", "framealpha": 0.8, "fontsize": 8} | legend)


def from_step_zero(axis: Any, left: float = 0) -> None:
    """Puts optimizer steps on a logarithmic horizontal axis that begins with step 0."""
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(left=left)


def number(value: float) -> str:
    """Two decimals, without a minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def draw_power_law(axis: Any, points: Points, label: str, index: int, *, filled: bool = True) -> PowerLaw:
    """Points of all seeds and their least-squares line; slope and 95 % interval are in the legend."""
    law = log_log_slope([x for x, _ in points], [y for _, y in points])
    ends = [min(x for x, _ in points), max(x for x, _ in points)]
    color, marker = COLORS[index], MARKERS[index]
    name = f"{label}: {number(law.slope)} [{number(law.low)}, {number(law.high)}]"
    face = color if filled else "none"
    axis.plot(*zip(*points, strict=True), marker, color=color, markersize=4.5, alpha=0.75, markerfacecolor=face)
    style = f"-{marker}" if filled else f"--{marker}"
    # The marker of the legend's entry, drawn nowhere else.
    axis.plot(ends, [law.at(x) for x in ends], style[:-1], color=color, linewidth=1.3)
    axis.plot([], [], style, color=color, markersize=4.5, markerfacecolor=face, label=name)
    return law


def draw_reference(axis: Any, points: Points, slope: float, *, offset: float = 1.6) -> None:
    """A dotted line of a stated slope, above (`offset` > 1) or below the points."""
    xs = [x for x, _ in points]
    law = log_log_slope(xs, [y for _, y in points])
    ends = [min(xs), max(xs)]
    middle = (ends[0] * ends[1]) ** 0.5
    level = offset * law.at(middle)
    name = f"reference slope {slope:g}"
    known = axis.get_legend_handles_labels()[1]
    label = {} if name in known else {"label": name}
    axis.plot(ends, [level * (x / middle) ** slope for x in ends], ":", color="#555555", linewidth=1.5, **label)


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    body = [list(header), ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of moderate size and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"Figure: {path}")
