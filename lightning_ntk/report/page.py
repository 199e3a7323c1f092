"""A run on one self-contained HTML page."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ntk.functional.verdict import LAZY, RICH, Verdict
from lightning_ntk.plots import (
    plot_accuracies,
    plot_history,
    plot_kernel,
    plot_over_loss,
    plot_parameters,
    plot_regimes,
)
from lightning_ntk.plots.history import History
from lightning_ntk.report import document
from lightning_ntk.report.table import COLUMNS, evenly_spaced, number, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# More measurements than these make a curve no clearer, and a page larger than 500 kB.
_MOST_ROWS = 120


class _Section(NamedTuple):
    draw: "Callable[[History], tuple[Figure, Any]]"
    reading: str


_SECTIONS = {
    "How far, step by step": _Section(
        plot_history,
        "0 is a run that its linearized network predicts. At 1 the linearized weights are no better a guess than the initial "
        "ones.",
    ),
    "At equal loss": _Section(
        plot_over_loss, "Compare runs that train at different speeds here, and not at equal steps."
    ),
    "Accuracies": _Section(
        plot_accuracies,
        "The expansion puts the trained weights into the linearized network. Where it is as good as the trained network, the "
        "function is still linear in the weights.",
    ),
    "The kernel": _Section(plot_kernel, "The kernel of a lazy run does not change."),
    "The panel of regimes": _Section(
        plot_regimes,
        "A rich run aligns its kernel with the labels, makes few features out of many, and moves its activations. "
        "Bands are 95 % intervals.",
    ),
    "Which parameters leave first": _Section(plot_parameters, "Rows are parameters in the order of the network."),
}


def write_report(
    path: str | Path,
    history: History,
    verdict: Verdict,
    *,
    title: str = "Lazy or rich?",
    notes: Sequence[str] | None = None,
    figures: "Mapping[str, Figure] | None" = None,
) -> Path:
    """Writes one HTML file about a run, without any link to the network.

    It has the verdict, a table, figures as inline SVG (needs matplotlib), what the linearization does not describe, and how
    to cite.

    Args:
        path: The file to write. Its folder is made.
        history: Rows with "step" and the scalars of a monitor, in the order of the steps.
        verdict: What `lightning_ntk.functional.judge` says of them.
        title: The heading.
        notes: Sentences on what the linearization does not describe; None if it is not known.
        figures: More figures, by their headings.

    Returns:
        The path.
    """
    return document.write(path, run_page(history, verdict, title=title, notes=notes, figures=figures))


def run_page(
    history: History,
    verdict: Verdict,
    *,
    title: str,
    notes: Sequence[str] | None,
    figures: "Mapping[str, Figure] | None",
) -> str:
    """The page of `write_report` as HTML."""
    drawn = {}
    shown = spread(history, _MOST_ROWS)
    for heading, section in _SECTIONS.items():
        try:
            drawn[heading] = section.draw(shown)[0]
        except ValueError:  # such scalars were not measured
            continue
    drawn |= figures or {}
    parts = [_verdict(verdict), _table(history)]
    for heading, figure in drawn.items():
        parts.append(document.heading(heading))
        if heading in _SECTIONS:
            parts.append(document.paragraph(_SECTIONS[heading].reading))
        parts.append(document.drawing(figure))
    parts.append(document.heading("What the linearized network does not describe"))
    nothing = (
        "Nothing is known that it leaves out." if notes is not None else "The log does not say: see the run's warnings."
    )
    parts.append(document.listing(notes) if notes else document.paragraph(nothing))
    return document.document(title, parts)


def _verdict(verdict: Verdict) -> str:
    why = f"Why: {verdict.reason}. Lazy is a distance below {LAZY}, rich is {RICH} or more."
    return document.headline(verdict.word, f"{verdict.word.capitalize()}.", verdict.describe(), why)


def _table(history: Sequence[Mapping[str, float]]) -> str:
    measured = {key for row in history for key in row if key != "step" and "/" not in key}
    columns = [key for key in COLUMNS if key in measured] + sorted(measured - COLUMNS.keys())
    rows = (
        [f"{row['step']:g}", *(number(row.get(key, math.nan)) for key in columns)] for row in evenly_spaced(history, 12)
    )
    return document.table([key.replace("_", " ").replace("taylor", "Taylor") for key in ["step", *columns]], rows)
