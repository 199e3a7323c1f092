"""The results of a Lightning run, and how it was followed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from lightning_ntk.callback.status import RunStatus
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.plots import plot_spectrum
from lightning_ntk.report.measured_run import LOST, MeasuredRun
from lightning_ntk.training.linearized_training import LinearizedTraining

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_ntk.callback.capture import RunCapture


class RunResults(MeasuredRun, Callback):
    """The results of a monitor, during a run and after it."""

    seconds: dict[str, float]
    """Time spent on the "capture" and on "measurements" so far."""

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

    @override
    def _initial_weights(self) -> Mapping[str, Tensor]:
        return {} if self.comparison is None else self.comparison.initial_weights

    @override
    def _doubts(self) -> list[str]:
        doubts = []
        if self._status.lost:
            doubts.append(LOST)
        if "unstable" in self._status.reported:
            doubts.append("the learning rate is above the largest for which the linearized network is stable")
        return doubts

    @override
    def _notes(self) -> list[str]:
        return list(self._status.reported.values())

    @override
    def _figures(self) -> "dict[str, Figure]":
        if self.training is None:
            return {}
        modes, time = self.training.modes, None if self.comparison is None else self.comparison.kernel_time
        return {"The spectrum": plot_spectrum(modes.eigenvalues, modes.coordinates, time=time)[0]}
