"""The results of a monitor: scalars, the verdict, figures and a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from lightning_ntk.callback.status import RunStatus
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.functional.verdict import Verdict, judge
from lightning_ntk.functional.weights import norm
from lightning_ntk.plots import Drawing, plot_history, plot_spectrum
from lightning_ntk.report import document, summarize
from lightning_ntk.report.page import run_page
from lightning_ntk.training.linearized_training import LinearizedTraining

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from lightning_ntk.callback.capture import RunCapture


class RunResults(Callback):
    """The results of a monitor, during a run and after it."""

    history: list[dict[str, float]]
    """One row for each measurement: "step" and every logged scalar, without the prefix."""
    seconds: dict[str, float]
    """Time spent on the "capture" and on "measurements" so far."""

    name: str
    loss: Any
    predict: Any
    unpack: Any
    _capture: "RunCapture | None"
    _status: RunStatus

    @property
    def is_given_loss(self) -> bool:
        """Whether `loss`, `predict` or `unpack` was given.

        Otherwise the training step itself is linearized.
        """
        return not (self.loss is None and self.predict is None and self.unpack is None)

    @property
    def linearized_outputs(self) -> list[tuple[str, tuple[int, ...]]]:
        """The modules whose outputs in the training step are linearized, with shapes.

        It is empty if the loss was given.
        """
        return [] if self._capture is None or self._capture.step is None else self._capture.step.linearized_outputs

    @property
    def comparison(self) -> RunComparison | None:
        """The run beside its linearized network; None before the capture."""
        return None if self._capture is None else self._capture.comparison

    @property
    def training(self) -> LinearizedTraining | None:
        """The linearized training of gradient descent or flow.

        None before the capture, and with replay or the twin.
        """
        return None if self.comparison is None else self.comparison.training

    @property
    def dynamics_used(self) -> str | None:
        """The dynamics that the linearized network follows; None before the capture."""
        return None if self.comparison is None else self.comparison.dynamics

    @property
    def reason(self) -> str:
        """The reason for these dynamics, in a sentence.

        It is empty before the capture and if the user chose the dynamics.
        """
        return "" if self._capture is None else self._capture.reason

    @property
    def verdict(self) -> Verdict:
        """Whether the run was lazy so far, and why; see `lightning_ntk.functional.judge`."""
        doubts = []
        if self._status.lost:
            doubts.append("the linearized network was lost before the run ended")
        if "unstable" in self._status.reported:
            doubts.append("the learning rate is above the largest for which the linearized network is stable")
        resolution = 0.0
        if self.comparison is not None:
            start = self.comparison.initial_weights
            resolution = norm(start) * max(torch.finfo(value.dtype).eps for value in start.values())
        return judge(self.history, resolution=resolution, doubts=doubts)

    def summary(self) -> str:
        """The verdict and a table of the run, in 80 columns."""
        return summarize(self.history, self.verdict)

    def plot(self, title: str | None = None, ax: "Axes | None" = None) -> Drawing:
        """Plots distances and losses over optimizer steps, as `lightning_ntk.plots.plot_history` does. Needs matplotlib.

        A notebook shows the picture. `figure, axes = monitor.plot()` gives the figure, to change or to save.
        """
        return plot_history(self, title, ax)

    def report(self, path: str | Path) -> Path:
        """Writes one HTML page about the run, see `lightning_ntk.report.write_report`. Needs matplotlib."""
        return document.write(path, self._page())

    def _page(self) -> str:
        figures = {}
        if self.training is not None:
            modes, time = self.training.modes, None if self.comparison is None else self.comparison.kernel_time
            figures["The spectrum"] = plot_spectrum(modes.eigenvalues, modes.coordinates, time=time)[0]
        notes = list(self._status.reported.values())
        title = f"Lazy or rich? {self.name}"
        return run_page(self.history, self.verdict, title=title, notes=notes, figures=figures)

    def to_pandas(self) -> "DataFrame":
        """The history as a table. Needs pandas."""
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("A table needs pandas, which is not installed: pip install pandas.") from error
        return pd.DataFrame(self.history)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.verdict.state()})"
