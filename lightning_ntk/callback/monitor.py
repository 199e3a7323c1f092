"""The Lightning callback: what can be asked of it."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ntk.callback.monitoring import Monitoring
from lightning_ntk.comparison.options import FollowedDynamics
from lightning_ntk.plots import plot_history
from lightning_ntk.utilities.validation import require_choice, require_device, require_integer, require_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measurements per factor of ten in the number of steps, with steps="log".
_LOG_POINTS_PER_DECADE = 8


class LinearizationMonitor(Monitoring):
    """Logs how far a training run leaves the path of its linearized (neural-tangent-kernel) network.

    When fitting starts, the initial weights, predictions and the empirical neural tangent kernel on the reference set are
    captured. At chosen optimizer steps the weights that the *linearized* network would have after the same steps, with the
    learning rates really used, are computed and compared with those of the run. Training itself is not changed: weights
    after `fit` are bitwise those of a run without the callback.

    Logged to every logger of the Trainer, as `{name}/...` at `step=trainer.global_step`: `weight_distance`,
    `relative_weight_distance`, `weight_cosine`, `weight_norm_ratio`, `displacement`; on the reference set `prediction_rmse`,
    `loss`, `linearized_loss`, `taylor_gap` and, for classes, `accuracy`, `linearized_accuracy`, `taylor_accuracy`; the same on
    the evaluation set as `evaluation/...`; and what is asked for. The same values are in `trainer.callback_metrics`.

    The linearized network is trained as the run trains its own: with the learning rates, momentum, decay and clipping of
    each step. What the dynamics do not describe is said once, in words, and so is a `training_step` whose gradient is not that of
    `loss(predict(module, inputs), target)`, with the size of the mismatch.

    A run resumed with `ckpt_path` goes on as if it had not been interrupted.

    On several devices, with DDP, captures and measurements are shared by the processes, and the linearized network is trained
    on the batches of all of them.

    Not supported: several optimizers, and strategies that divide the network itself, as FSDP. They raise a
    `MisconfigurationException` before training starts.

    Args:
        reference: The training set in a fixed order: a map-style Dataset, a DataLoader (its data set and collate function
            are used, not its sampler), or "train" for the Trainer's own training set: the samples that it sees, with
            `overfit_batches` for example the first ones. None to compare weights only, which
            the twin can do.
        steps: An integer n to measure every n optimizer steps, a list of steps, or "log" for roughly logarithmic steps.
            The first (0) and the last step are always measured.
        dynamics: "gradient_descent" is full-batch `torch.optim.SGD` with the settings of the run; "gradient_flow" is
            continuous time, the sum of the learning rates; "replay" is SGD on the run's own minibatches, with any loss, on the
            kernel; "twin" trains the linearized network in lockstep, with any optimizer and loss, without a kernel. "auto"
            takes the first that is exact for the run and affordable, and says which and why.
        loss: Of outputs and targets, the one that the run minimizes. Default: `nn.MSELoss()`; for a squared loss class labels
            become one-hot rows.
        predict: Maps `(module, inputs)` to outputs `(B, K)`. Default: the LightningModule's `forward`.
        unpack: Maps a batch of the data to `(inputs, target)`. Default: batches that are such pairs.
        evaluation: Data on which functions are compared too, a validation set for example.
        capture_at: The optimizer step at whose weights to linearize. Later than 0 as in studies of fine-tuning: the
            linearized network starts there, with the optimizer's state.
        solver: How the modes of the kernel are found: "eigh" (all of them), "lanczos" (those that matter for the length of
            the run, with or without forming the kernel), or "auto" for the cheapest that fits into memory.
        jacobian: "streamed" or, for small models, "stored": see `LinearizedTraining`.
        batch_size: Samples in one pass.
        dtype: Type of the passes, as "float32" or "float64". Default: that of the parameters, float32 for those in half
            precision.
        device: Where the kernel, its modes and vectors are kept, "cpu" for example where a GPU has no room for them. Passes
            run on the device of the module. Default: there too.
        twin_every: Steps of the twin that share one gradient, that of the first of them. Above 1 the comparison is no longer
            exact, which `twin_coverage`, its reciprocal, records.
        name: Prefix of the logged tags.
        per_parameter: Whether to log the distance of every parameter tensor, `parameter/<name>`.
        taylor: Whether to expand the trained network after the fact, one forward-mode pass, for `taylor_gap`.
        closest: Whether to log `closest_time`, the number of steps after which the linearized network is closest to the
            trained weights, `closest_distance` then, and `distance_floor`, under which no time can go; for gradient descent and
            flow, two passes more.
        modes: For how many leading eigenvectors of the kernel to log `mode/<i>/residual` and `mode/<i>/linearized_residual`;
            for gradient descent and flow.
        kernel_probe: Of how many samples of the reference, evenly spaced, to follow the kernel, for `kernel_distance`,
            `kernel_change` and `kernel_velocity`; each measurement takes the kernel of as many samples. 0 for none.
        figures: Whether to draw figures when training ends, for TensorBoard, Weights & Biases and MLflow: distance and losses
            over steps, accuracies, the kernel, a heat map of the parameters, the kernel's spectrum with the residual's
            energy in each mode (for gradient descent and flow), and outputs of both networks. Needs matplotlib.
        save_state: Whether checkpoints hold what a resumed run needs to go on with its measurements: the initial weights and
            the state of the linearized network. Without it a resumed run is refused.
        strict: Whether a failing measurement ends the run. Default: it is reported once and training goes on.
        progress: Whether captures and measurements show a progress bar, below the Trainer's own, TQDM or Rich.

    Raises:
        ValueError: If an argument has a value that it cannot have.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LinearizationMonitor(steps=100)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        # jsonargparse, so LightningCLI, passes no arguments to a class that is annotated with its type parameters, and takes a
        # callable that returns a Tensor for something that makes objects of the class Tensor.
        reference: Dataset | DataLoader | Literal["train"] | None = "train",  # type: ignore[type-arg]
        steps: int | Sequence[int] | Literal["log"] = "log",
        dynamics: Literal["auto", "gradient_descent", "gradient_flow", "replay", "twin"] = "auto",
        loss: Callable[[Tensor, Tensor], Any] | None = None,
        predict: Callable[[nn.Module, Any], Any] | None = None,
        unpack: Callable[[Any], Any] | None = None,
        evaluation: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        capture_at: int = 0,
        solver: Literal["auto", "eigh", "lanczos"] = "auto",
        jacobian: Literal["streamed", "stored"] = "streamed",
        batch_size: int = 256,
        dtype: Literal["float32", "float64"] | None = None,
        device: str | None = None,
        twin_every: int = 1,
        name: str = "ntk",
        per_parameter: bool = False,
        taylor: bool = True,
        closest: bool = False,
        modes: int = 0,
        kernel_probe: int = 0,
        figures: bool = False,
        save_state: bool = True,
        strict: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.reference = reference
        self.steps = steps
        self.dynamics = dynamics
        self.loss = loss
        self.predict = predict
        self.unpack = unpack
        self.evaluation = evaluation
        self.capture_at = capture_at
        self.solver = solver
        self.jacobian = jacobian
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device
        self.twin_every = twin_every
        self.name = name
        self.per_parameter = per_parameter
        self.taylor = taylor
        self.closest = closest
        self.modes = modes
        self.kernel_probe = kernel_probe
        self.figures = figures
        self.save_state = save_state
        self.strict = strict
        self.progress = progress
        self._validate()

    def _validate(self) -> None:
        if isinstance(self.reference, str) and self.reference != "train":
            raise ValueError(
                f'Expected argument `reference` to be a data set, a DataLoader, "train" or None but got {self.reference!r}.'
            )
        require_steps(self.steps)
        require_choice("dynamics", self.dynamics, FollowedDynamics)
        require_choice("dtype", self.dtype, Literal["float32", "float64", None])
        require_device("device", self.device)
        require_integer("capture_at", self.capture_at, least=0)
        require_integer("twin_every", self.twin_every, least=1)
        require_integer("modes", self.modes, least=0)
        if self.dynamics in ("replay", "twin") and (self.closest or self.modes):
            raise ValueError(
                f'Expected `closest=False` and `modes=0` with dynamics="{self.dynamics}" but got {self.closest} and '
                f'{self.modes}, which need the modes of the kernel, so dynamics="gradient_descent" or "gradient_flow".'
            )
        require_integer("kernel_probe", self.kernel_probe, least=0)
        if self.figures and find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "Argument `figures` needs matplotlib, which is not installed: pip install 'lightning-ntk[plot]'."
            )
        if self.reference is None and self.kernel_probe:
            raise ValueError(
                "Expected a reference set, of which to take samples, for argument `kernel_probe` but got None."
            )
        if self.reference is None and self.dynamics not in ("auto", "twin"):
            raise ValueError(
                f'Expected a reference set for dynamics="{self.dynamics}" but got None: only "twin" goes without.'
            )

    @property
    def state_key(self) -> str:
        """Of its name: two monitors of one Trainer need different ones, or the Trainer refuses them."""
        return self._generate_state_key(name=self.name)

    def should_measure(self, step: int) -> bool:
        """Whether to measure `step` optimizer steps after the capture; override for a schedule of your own."""
        if isinstance(self.steps, int):
            return step % self.steps == 0
        if self.steps == "log":
            exponent = round(_LOG_POINTS_PER_DECADE * math.log10(step)) if step else 0
            return step in (0, round(10 ** (exponent / _LOG_POINTS_PER_DECADE)))
        return step in self.steps

    def plot(self) -> "tuple[Figure, Any]":
        """Distance and losses over optimizer steps: `(figure, axes)`. Needs matplotlib."""
        return plot_history(self.history)
