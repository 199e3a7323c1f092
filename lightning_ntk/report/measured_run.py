"""A measured run as its user reads it: the verdict, a table, figures and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ntk.functional.verdict import Verdict, judge
from lightning_ntk.functional.weights import norm
from lightning_ntk.plots import Drawing, plot_history
from lightning_ntk.report import document
from lightning_ntk.report.page import run_page
from lightning_ntk.report.table import summarize
from lightning_ntk.utilities.lazy import optional_module

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


LOST = "the linearized network was lost before the run ended"
"""A doubt that every callback may have."""


class MeasuredRun:
    """The verdict, table, figures and page of a run, whichever Trainer trains it."""

    history: list[dict[str, float]]
    """One row for each measurement, with "step" and every logged scalar without the prefix."""

    name: str

    @property
    def verdict(self) -> Verdict:
        """Whether the run was lazy so far, and why; see `lightning_ntk.functional.judge`."""
        start = self._initial_weights()
        resolution = max(torch.finfo(value.dtype).eps for value in start.values()) * norm(start) if start else 0.0
        return judge(self.history, resolution=resolution, doubts=self._doubts())

    def summary(self) -> str:
        """The verdict and a table of the run, in 80 columns."""
        return summarize(self.history, self.verdict)

    def plot(self, title: str | None = None, ax: "Axes | None" = None) -> Drawing:
        """Plots distances and losses over optimizer steps, as `lightning_ntk.plots.plot_history` does. Needs matplotlib.

        A notebook shows the picture. `figure, axes = monitor.plot()` gives the figure, to change or to save.
        """
        return plot_history(self.history, title, ax)

    def report(self, path: str | Path) -> Path:
        """Writes one HTML page about the run, see `lightning_ntk.report.write_report`. Needs matplotlib."""
        return document.write(path, self._page())

    def to_pandas(self) -> "DataFrame":
        """The history as a table. Needs pandas."""
        return optional_module("pandas", "A table").DataFrame(self.history)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.verdict.state()})"

    def _page(self) -> str:
        title = f"Lazy or rich? {self.name}"
        return run_page(self.history, self.verdict, title=title, notes=self._notes(), figures=self._figures())

    def _initial_weights(self) -> Mapping[str, Tensor]:
        """The weights at which the run was linearized; empty before that."""
        return {}

    def _doubts(self) -> Sequence[str]:
        """Phrases on what makes the distances doubtful."""
        return ()

    def _notes(self) -> Sequence[str] | None:
        """Sentences on what the linearized network does not describe; None if it is not known."""
        return None

    def _figures(self) -> "Mapping[str, Figure]":
        """More figures for the page, by their headings."""
        return {}
