"""A run on one self-contained HTML page."""

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date
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
from lightning_ntk.report.table import COLUMNS, evenly_spaced, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { border-left: 0.4rem solid #0072B2; padding: 0.5rem 1rem; background: #f4f7fa; font-size: 1.1rem; }
.verdict.rich { border-color: #D55E00; } .verdict.undecided { border-color: #999; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: right; padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { width: 100%; height: auto; min-width: 40rem; }
figure.narrow { max-width: 34rem; } figure.narrow svg { min-width: 0; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; } footer { color: #666; font-size: 0.85rem; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""
_CITATION = """@software{lightning_ntk,
  title = {lightning_ntk: how far a network leaves its linearized (NTK) regime, during training},
  author = {{The lightning_ntk developers}},
  year = {2026}
}"""


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
        "Bars are 95 % intervals.",
    ),
    "Which parameters leave first": _Section(plot_parameters, "Rows are parameters in the order of the network."),
}


def write_report(
    path: str | Path,
    history: Sequence[Mapping[str, float]],
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
    drawn = {}
    for heading, section in _SECTIONS.items():
        try:
            drawn[heading] = section.draw(history)[0]
        except ValueError:  # such scalars were not measured
            continue
    drawn |= figures or {}
    parts = [f"<h1>{html.escape(title)}</h1>", _verdict(verdict), _table(history)]
    for heading, figure in drawn.items():
        narrow = ' class="narrow"' if figure.get_figwidth() < 8 else ""
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if heading in _SECTIONS:
            parts.append(f"<p>{html.escape(_SECTIONS[heading].reading)}</p>")
        parts.append(f"<figure{narrow}>{_svg(figure)}</figure>")
    parts.append("<h2>What the linearized network does not describe</h2>")
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes or ())
    nothing = (
        "Nothing is known that it leaves out." if notes is not None else "The log does not say: see the run's warnings."
    )
    parts.append(f"<ul>{listed}</ul>" if listed else f"<p>{nothing}</p>")
    parts.append(f"<h2>How to cite</h2><pre>{html.escape(_CITATION)}</pre>")
    parts.append(f"<footer>Written by lightning_ntk on {date.today():%Y-%m-%d}.</footer>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _verdict(verdict: Verdict) -> str:
    return (
        f'<p class="verdict {verdict.word}"><strong>{verdict.word.capitalize()}.</strong> '
        f"{html.escape(verdict.describe())}<br><small>Why: {html.escape(verdict.reason)}. Lazy is below {LAZY}, rich is "
        f"{RICH} or more.</small></p>"
    )


def _table(history: Sequence[Mapping[str, float]]) -> str:
    measured = {key for row in history for key in row if key != "step" and "/" not in key}
    columns = [key for key in COLUMNS if key in measured] + sorted(measured - COLUMNS.keys())
    heads = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in ["step", *columns])
    rows = "".join(
        "<tr>"
        + f"<td>{row['step']:g}</td>"
        + "".join(f"<td>{number(row.get(key, math.nan))}</td>" for key in columns)
        + "</tr>"
        for row in evenly_spaced(history, 12)
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _svg(figure: "Figure") -> str:
    import matplotlib as mpl

    file = io.StringIO()
    # No date and a fixed salt, so that equal runs have equal pages.
    with mpl.rc_context({"svg.hashsalt": "lightning_ntk"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]
