"""The linearised network trained on a data set: captured once, then answered for every time."""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_ntk.checks import check_adjoint, check_determinism, check_kernel
from lightning_ntk.dynamics.sgd import GradientDescent
from lightning_ntk.dynamics.spectral import (
    GradientFlow,
    gradient_descent_filter,
    gradient_flow_filter,
    minimum_norm_filter,
)
from lightning_ntk.isolation import preserved_rng
from lightning_ntk.jacobian import Jacobian, StoredJacobian, StreamedJacobian, predict
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.kernel.contraction import contract, sample_jacobians
from lightning_ntk.linearization import Linearization, Predict, Tensors
from lightning_ntk.losses import Loss, evaluate_loss, match_targets, measure_loss_factor
from lightning_ntk.memory import available_memory, format_bytes
from lightning_ntk.modes import eigh_modes
from lightning_ntk.progress import track
from lightning_ntk.reference import Data, Reference, Unpack

_log = logging.getLogger(__name__)

Dynamics = Literal["gradient_descent", "gradient_flow"]
Solver = Literal["auto", "eigh"]
JacobianStorage = Literal["streamed", "stored"]


class LinearizedState(NamedTuple):
    """The linearised network at one time, in function space.

    Attributes:
        coefficients: a, `(N, K)` in float64 on the CPU; the weights are `w0 + J^T a`.
        predictions: Outputs on the training set, `(N, K)` in float64 on the CPU.
    """

    coefficients: Tensor
    predictions: Tensor


class LinearizedTraining:
    r"""Full-batch training of the network linearised at the weights that `module` has now.

    .. math:: w_\text{lin}(t) = w_0 - J^\top \Theta^{-1} (I - (I - \eta\Theta)^t) (f_0 - Y)

    for gradient descent (Lee et al., 2019, eq. 8-10), with :math:`e^{-\eta t\Theta}` in the place of the power for
    gradient flow. The kernel :math:`\Theta = J J^\top` is factorised once, in float64 and never inverted; every later
    time costs one pass over the data. The module is left as it was: weights, buffers, gradients, modes, random state.

    Args:
        module: The network, with outputs `(B, K)` or `(B,)`.
        data: The training set, read in its own order: a map-style Dataset, a DataLoader (whose sampler is not used) or a
            tuple `(inputs, target)`. Integer class labels `(N,)` become one-hot rows.
        lr: Learning rate of the optimizer, as `torch.optim.SGD` takes it.
        loss: A squared loss of outputs and targets. Its factor c, with gradient c (f - Y), is measured; eta = lr * c.
        dynamics: "gradient_descent" (t is a whole number of steps) or "gradient_flow" (t is real; a step lasts `lr`).
        solver: "eigh", a dense eigendecomposition in float64; "auto" chooses.
        jacobian: "streamed" recomputes J minibatch by minibatch in every pass, memory O(P + N K); "stored" keeps a small
            model's J, N K P numbers. Both give the same results.
        ntk: A kernel computed earlier, `(N K, N K)` in sample-major order; it is checked against one pass.
        predict: Maps `(module, inputs)` to outputs. Default: `module(inputs)`, or `module(*inputs)` for tuples.
        unpack: Maps a batch of `data` to `(inputs, target)`. Default: batches that are such pairs already.
        batch_size: Samples in one pass through the network.
        dtype: Type of the Jacobian passes, by default that of the parameters. Spectra are always float64.
        progress: Whether long operations show a progress bar.

    Raises:
        ValueError: If an argument, the data or the network cannot be used; the message says what was expected.
        MemoryError: If the kernel needs more memory than the machine has.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> inputs, target = torch.eye(2), torch.ones(2, 1)
        >>> training = LinearizedTraining(module, (inputs, target), lr=0.1, progress=False)
        >>> training.weights(None)  # the limit: one step at a time, or all at once
        {'weight': tensor([[1.0000, 1.0000]])}
        >>> round(training.max_learning_rate, 6)
        2.0
    """

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        *,
        lr: float,
        loss: Loss | None = None,
        dynamics: Dynamics = "gradient_descent",
        solver: Solver = "auto",
        jacobian: JacobianStorage = "streamed",
        ntk: Tensor | None = None,
        predict: Predict | None = None,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        if not (isinstance(lr, int | float) and math.isfinite(lr) and lr >= 0):
            raise ValueError(f"Expected argument `lr` to be a finite number, at least 0, but got {lr!r}.")
        require_choice("dynamics", dynamics, Dynamics)
        require_choice("solver", solver, Solver)
        require_choice("jacobian", jacobian, JacobianStorage)
        self.lr = float(lr)
        self.loss_function: Loss = nn.MSELoss() if loss is None else loss
        self.dynamics = dynamics
        self.progress = progress
        self._unpack = unpack
        self._solution: tuple[float | None, Tensors] | None = None
        with preserved_rng():
            self.linearization = Linearization(module, predict=predict, dtype=dtype)
            self.reference = Reference(data, batch_size=batch_size, unpack=unpack)
            self._require_memory(jacobian)
            outputs, targets = self._first_pass()
            check_determinism(self.linearization, self.reference, outputs)
            self.initial_predictions = outputs
            self.targets = match_targets(targets, outputs, flat=self.linearization.flat).cpu()
            self.loss_factor = measure_loss_factor(
                self.loss_function, outputs.cpu(), self.targets, flat=self.linearization.flat
            )
            self.jacobian = self._make_jacobian(jacobian)
            check_adjoint(self.linearization, self.jacobian, outputs)
            self.ntk: Tensor | None = self._make_kernel(ntk)
        self._modes = eigh_modes(self.ntk, (outputs.cpu().double() - self.targets).flatten())
        if self.lr > self.max_learning_rate:
            warnings.warn(
                f"The learning rate {self.lr:.4g} is above {self.max_learning_rate:.4g}, the largest for which these linearised "
                "dynamics are stable: the linearised network diverges.",
                stacklevel=2,
            )

    @property
    def initial_weights(self) -> Tensors:
        """w0: clones of the trainable parameters, under their names in `named_parameters()`."""
        return dict(self.linearization.params)

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the kernel, ascending, `(m,)` in float64."""
        return self._modes.eigenvalues

    @property
    def max_learning_rate(self) -> float:
        r"""The largest stable learning rate, :math:`2 / (c\,\lambda_\text{max})`; infinite for gradient flow."""
        largest = self.eigenvalues[-1].item()
        if self.dynamics == "gradient_flow" or largest <= 0:
            return math.inf
        return 2 / (self.loss_factor * largest)

    def weights(self, t: float | None) -> Tensors:
        """The linearised weights after `t` optimizer steps: one pass over the data.

        Args:
            t: Optimizer steps, a whole number for gradient descent; None for infinity, the minimum-norm solution.

        Returns:
            The weights, with the names and shapes of `initial_weights`, in the type of the passes.

        Raises:
            ValueError: If `t` is negative, fractional for gradient descent, or None where the dynamics have no limit.
            OverflowError: If the linearised network has diverged beyond floating-point numbers.
        """
        return self._add_to_initial(self.displacement(t))

    def weights_at(self, times: Sequence[float | None]) -> list[Tensors]:
        """`weights` at several times for one pass: one forward and `len(times)` backward passes, memory O(T P)."""
        coefficients = torch.stack([self.state(t).coefficients for t in times])
        stacked = self._pull_back(coefficients)
        return [self._add_to_initial({n: value[i] for n, value in stacked.items()}) for i in range(len(times))]

    def displacement(self, t: float | None) -> Tensors:
        """w_lin(t) - w0 in float64, which `weights` rounds: one pass over the data, none for the last `t` again."""
        if self._solution is None or self._solution[0] != t:
            self._solution = (t, self.displacement_of(self.state(t)))
        return self._solution[1]

    def predictions(self, t: float | None, data: Data | None = None) -> Tensor:
        """Outputs of the linearised network after `t` steps.

        On the training set they come from the modes, without a pass. On other data from `f0 + J (w_lin(t) - w0)`, or from the
        kernel between the two data sets where that takes fewer operations.

        Args:
            t: Optimizer steps, as for `weights`.
            data: Other data, as for `empirical_ntk`. Default: the training set.

        Returns:
            The outputs `(M, K)`, in the type of the passes.
        """
        state = self.state(t)
        if data is None:
            return state.predictions.to(self.initial_predictions)
        with preserved_rng():
            other = Reference(data, batch_size=self.reference.batch_size, unpack=self._unpack)
            outputs = predict(self.linearization, other, progress=self.progress)
            samples, classes = outputs.shape
            # In units of P: the kernel's products against a backward pass here and a forward-mode pass there.
            if samples * len(self.reference) * classes**2 < 3 * (samples + len(self.reference)):
                kernel = compute_kernel(self.linearization, other, self.reference, progress=self.progress)
                change = kernel.double() @ state.coefficients.flatten().to(kernel.device)
                return outputs + change.reshape(samples, classes).to(outputs)
            there = StreamedJacobian(self.linearization, other, outputs, progress=self.progress)
            return outputs + there.jvp(self.displacement(t)).to(outputs)

    def loss(self, t: float | None) -> float:
        """The loss of the linearised network on the training set after `t` steps."""
        return self.loss_of(self.state(t).predictions)

    def state(self, t: float | None) -> LinearizedState:
        """The linearised network after `t` steps, in function space: no pass over the data."""
        if t is None or t == math.inf:
            if self.lr >= self.max_learning_rate:
                raise ValueError(
                    f"Expected a stable learning rate for t = infinity but {self.lr:.4g} is not below the maximum "
                    f"{self.max_learning_rate:.4g}: the linearised network has no limit."
                )
            return self.state_of(self._minimum_norm())
        if not t >= 0:
            raise ValueError(f"Expected argument `t` to be at least 0 optimizer steps but got {t}.")
        rate = self.lr * self.loss_factor
        if self.dynamics == "gradient_flow":
            return self.state_of(gradient_flow_filter(self.eigenvalues, rate * t))
        return self.state_of(gradient_descent_filter(self.eigenvalues, rate, t))

    def follow(self) -> GradientDescent | GradientFlow:
        """These dynamics from step 0 on, to be advanced with the learning rates of a run: `.step(lr)` and `.filter`."""
        online = GradientFlow if self.dynamics == "gradient_flow" else GradientDescent
        return online(self.eigenvalues, self.loss_factor)

    def state_of(self, filtered: Tensor) -> LinearizedState:
        """The state that a filter `(m,)` of the modes gives.

        Raises:
            OverflowError: If it is not finite, because the dynamics have diverged.
        """
        modes = self._modes
        coefficients = modes.coefficients(filtered)
        if not coefficients.isfinite().all():
            raise OverflowError(
                "The linearised network has diverged beyond floating-point numbers: the learning rate is above the largest "
                f"stable one, {self.max_learning_rate:.4g}."
            )
        shape = self.initial_predictions.shape
        change = (modes.basis @ (modes.eigenvalues.clamp_min(0) * filtered * modes.residual)).reshape(shape)
        return LinearizedState(coefficients.reshape(shape), self.initial_predictions.cpu().double() - change)

    def displacement_of(self, state: LinearizedState) -> Tensors:
        """w_lin - w0 = J^T a of a state, in float64: one pass over the data."""
        return {name: value[0] for name, value in self._pull_back(state.coefficients.unsqueeze(0)).items()}

    def loss_of(self, predictions: Tensor) -> float:
        """The loss of predictions `(N, K)` on the training set, in float64."""
        outputs = predictions.detach().cpu().double()
        return evaluate_loss(self.loss_function, outputs, self.targets, flat=self.linearization.flat).item()

    def _pull_back(self, coefficients: Tensor) -> Tensors:
        with preserved_rng():
            return self.jacobian.vjp(coefficients)

    def _add_to_initial(self, displacement: Tensors) -> Tensors:
        return {name: (start + displacement[name]).to(start) for name, start in self.linearization.params.items()}

    def _minimum_norm(self) -> Tensor:
        modes = self._modes
        cutoff = modes.cutoff(self.linearization.dtype)
        dropped = modes.eigenvalues <= cutoff
        energy = modes.residual[dropped].square().sum() / modes.residual.square().sum().clamp_min(1e-300)
        _log.info(
            "At t = infinity %d of %d modes, below %.3g, count as zero; they hold %.3g of the residual's energy.",
            int(dropped.sum()), len(dropped), cutoff, energy.item(),
        )  # fmt: skip
        return minimum_norm_filter(modes.eigenvalues, cutoff)

    def _require_memory(self, storage: JacobianStorage) -> None:
        samples = len(self.reference)
        classes = self.linearization.predict(self.reference.read(0, 1).inputs).shape[1]
        rows = samples * classes
        # The kernel, and in float64 its copy, its eigenvectors and the workspace of the eigensolver.
        needed = rows**2 * (self.linearization.dtype.itemsize + 4 * 8)
        if storage == "stored":
            needed += rows * self.linearization.num_parameters * self.linearization.dtype.itemsize
        free = available_memory()
        if needed > free:
            raise MemoryError(
                f"The modes of {samples} samples with {classes} outputs need {format_bytes(needed)} but {format_bytes(free)} "
                f"are free. Use at most {int(samples * math.sqrt(free / needed))} samples as the reference."
            )

    def _first_pass(self) -> tuple[Tensor, Tensor]:
        outputs, targets = [], []
        for batch in track(
            self.reference.batches(), "initial predictions", total=self.reference.num_batches, enabled=self.progress
        ):
            if batch.target is None:
                raise ValueError("Expected the training set to have targets but its batches hold inputs only.")
            for name, value in (("inputs", batch.inputs), ("targets", batch.target)):
                _require_finite(name, value, batch.rows)
            outputs.append(self.linearization.predict(batch.inputs))
            targets.append(batch.target.detach().cpu())
            _require_finite("initial outputs", outputs[-1], batch.rows)
        return torch.cat(outputs), torch.cat(targets)

    def _make_jacobian(self, storage: JacobianStorage) -> Jacobian:
        if storage == "streamed":
            return StreamedJacobian(
                self.linearization, self.reference, self.initial_predictions, progress=self.progress
            )
        batches = track(self.reference.batches(), "Jacobian", total=self.reference.num_batches, enabled=self.progress)
        blocks = [sample_jacobians(self.linearization, batch.inputs) for batch in batches]
        return StoredJacobian({name: torch.cat([block[name] for block in blocks]) for name in blocks[0]})

    def _make_kernel(self, given: Tensor | None) -> Tensor:
        size = self.initial_predictions.numel()
        if given is not None:
            if tuple(given.shape) != (size, size):
                raise ValueError(f"Expected argument `ntk` of shape {(size, size)} but got {tuple(given.shape)}.")
            if not given.isfinite().all():
                raise ValueError("Expected argument `ntk` to be finite but it holds NaN or infinity.")
            kernel = given.detach()
            if not torch.allclose(kernel, kernel.T, rtol=1e-3, atol=1e-4 * kernel.abs().max().item()):
                raise ValueError("Expected argument `ntk` to be symmetric, the kernel of the training set with itself.")
        elif isinstance(self.jacobian, StoredJacobian):
            kernel = contract(self.jacobian.blocks, self.jacobian.blocks)
        else:
            kernel = compute_kernel(self.linearization, self.reference, progress=self.progress)
        check_kernel(self.linearization, self.jacobian, kernel, self.initial_predictions)
        return kernel


def require_choice(name: str, value: object, choices: object) -> None:
    """Raises a ValueError if a string argument is none of the values of a Literal."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, allowed))} but got {value!r}.")


def _require_finite(name: str, tree: object, rows: slice) -> None:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            raise ValueError(
                f"Expected finite {name} but samples {rows.start} to {rows.stop - 1} hold NaN or infinity."
            )
