"""The linearised network trained on a data set: captured once, then answered for every time."""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_ntk.capture import first_pass, store_jacobian, training_kernel
from lightning_ntk.checks import check_adjoint, check_determinism
from lightning_ntk.closed_form import ClosedForm, Dynamics, is_infinite
from lightning_ntk.dynamics.sgd import GradientDescent
from lightning_ntk.dynamics.spectral import GradientFlow
from lightning_ntk.error_bounds import ErrorBound
from lightning_ntk.isolation import preserved_rng
from lightning_ntk.jacobian import Jacobian, StreamedJacobian, predict, wide_dtype
from lightning_ntk.kernel import compute_kernel, count_operations
from lightning_ntk.lanczos import LanczosModes
from lightning_ntk.linearization import Linearization, Predict, Tensors
from lightning_ntk.losses import Loss, evaluate_loss, match_targets, measure_loss_factor
from lightning_ntk.memory import available_memory
from lightning_ntk.modes import Modes, eigh_modes
from lightning_ntk.reference import Data, Reference, Unpack
from lightning_ntk.refinement import LanczosRun, LanczosSolver, solve_by_lanczos
from lightning_ntk.solvers import Problem, Solver, choose_solver

_log = logging.getLogger(__name__)

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
    gradient flow. The kernel :math:`\Theta = J J^\top` is decomposed once, in float64 and never inverted; every later
    time costs one pass over the data. Or a Krylov space stands in for it, made of products J (J^T v) and extended when
    a time asks for more; `error_bound` says how exact that is. The module is left as it was: weights, buffers,
    gradients, modes, random state.

    Args:
        module: The network, with outputs `(B, K)` or `(B,)`.
        data: The training set, read in its own order: a map-style Dataset, a DataLoader (whose sampler is not used) or a
            tuple `(inputs, target)`. Integer class labels `(N,)` become one-hot rows.
        lr: Learning rate of the optimizer, as `torch.optim.SGD` takes it.
        loss: A squared loss of outputs and targets. Its factor c, with gradient c (f - Y), is measured; eta = lr * c.
        dynamics: "gradient_descent" (t is a whole number of steps) or "gradient_flow" (t is real; a step lasts `lr`).
        solver: "eigh", a dense eigendecomposition in float64; "lanczos", Ritz pairs from the residual f0 - Y; "auto" takes
            the cheapest by counted operations that fits into memory, see `solver_reason`.
        matrix_free: Whether Lanczos goes without the kernel, in two passes a product. Default: what is cheaper.
        horizon: The largest number of steps that will be asked for, at about `lr`. Lanczos prepares for it at once; later
            times are possible and extend the basis. Infinity takes nearly N K products on most networks, because
            eigenvalues reach down to what counts as zero. Default: unknown, and Lanczos starts when asked.
        tolerance: Truncation error that Lanczos allows in the weights, relative to |w_lin - w0|. It never asks for more than
            the passes can give: in float32, without a kernel, about 1e-5 at 1000 steps of eta lambda_max = 1, 1e-4 at 10000.
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
        >>> training.weights(None)["weight"].round(decimals=4)  # the limit, at once
        tensor([[1., 1.]])
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
        matrix_free: bool | None = None,
        horizon: float | None = None,
        tolerance: float = 1e-6,
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
        if horizon is not None and not horizon >= 0:
            raise ValueError(f"Expected argument `horizon` to be at least 0 optimizer steps or None but got {horizon}.")
        if not 0 < tolerance < 1:
            raise ValueError(f"Expected argument `tolerance` to be between 0 and 1 but got {tolerance}.")
        self.lr = float(lr)
        self.loss_function: Loss = nn.MSELoss() if loss is None else loss
        self.dynamics = dynamics
        self.progress = progress
        self._unpack = unpack
        self._solution: tuple[float | None, Tensors] | None = None
        with preserved_rng():
            self.linearization = Linearization(module, predict=predict, dtype=dtype)
            self.reference = Reference(data, batch_size=batch_size, unpack=unpack)
            problem = Problem(
                samples=len(self.reference),
                outputs=self.linearization.predict(self.reference.read(0, 1).inputs).shape[1],
                parameters=self.linearization.num_parameters,
                itemsize=self.linearization.dtype.itemsize,
                horizon=horizon,
                kernel_given=ntk is not None,
                jacobian_stored=jacobian == "stored",
            )
            if not (problem.kernel_given or problem.jacobian_stored):
                kernel, forward = count_operations(self.linearization, self.reference)
                problem = problem._replace(kernel_operations=kernel, forward_operations=forward)
            free = min(available_memory(), available_memory(self.linearization.device))
            choice = choose_solver(problem, solver=solver, matrix_free=matrix_free, free_memory=free)
            self.solver_reason: str = choice.reason
            _log.info("%s", choice.reason)
            outputs, targets = first_pass(self.linearization, self.reference, progress=progress)
            check_determinism(self.linearization, self.reference, outputs)
            self.initial_predictions = outputs
            self.targets = match_targets(targets, outputs, flat=self.linearization.flat).cpu()
            self.loss_factor = measure_loss_factor(
                self.loss_function, outputs.cpu(), self.targets, flat=self.linearization.flat
            )
            self.jacobian: Jacobian = (
                store_jacobian(self.linearization, self.reference, progress=progress)
                if jacobian == "stored"
                else StreamedJacobian(self.linearization, self.reference, outputs, progress=progress)
            )
            check_adjoint(self.linearization, self.jacobian, outputs)
            self.ntk: Tensor | None = None
            if not choice.matrix_free:
                # Summed in float32, the kernel puts the weights off by 2e-5 at eta * t * lambda_max = 1e4; in float64 by 3e-6.
                # Lanczos is for kernels whose size matters more than that.
                summed = wide_dtype(outputs.device) if choice.solver == "eigh" else self.linearization.dtype
                self.ntk = training_kernel(
                    ntk, self.linearization, self.reference, self.jacobian, outputs, dtype=summed, progress=progress
                )
            self._closed_form = ClosedForm(dynamics, self.lr * self.loss_factor, self.linearization.dtype)
            residual = outputs.cpu().double() - self.targets
            self._solver: LanczosSolver | None = None
            if choice.solver == "lanczos":
                self._solver = solve_by_lanczos(
                    self.jacobian, self.ntk, residual, tolerance=tolerance, max_products=choice.max_products
                )
            elif self.ntk is not None:
                self._dense = eigh_modes(self.ntk, residual.flatten())
        if self.lr > self.max_learning_rate:
            warnings.warn(
                f"The learning rate {self.lr:.4g} is above {self.max_learning_rate:.4g}, the largest for which these linearised "
                "dynamics are stable: the linearised network diverges.",
                stacklevel=2,
            )
        elif horizon and (horizon < math.inf or self.lr < self.max_learning_rate):
            self._refine(None if horizon == math.inf else math.floor(horizon))

    @property
    def initial_weights(self) -> Tensors:
        """w0: clones of the trainable parameters, under their names in `named_parameters()`."""
        return dict(self.linearization.params)

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the kernel, ascending, `(m,)` in float64: all N K, or the Ritz values in their place."""
        return self._modes.eigenvalues

    @property
    def max_learning_rate(self) -> float:
        r"""The largest stable learning rate, :math:`2 / (c\,\lambda_\text{max})`; infinite for gradient flow.

        With Lanczos, :math:`\lambda_\text{max}` is the largest eigenvalue that the residual has part in, plus at most 1e-4
        of it for safety, as Ritz values converge from below.
        """
        modes = self._modes
        largest = modes.largest_eigenvalue if isinstance(modes, LanczosModes) else modes.eigenvalues[-1].item()
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

    def error_bound(self, t: float | None, *, relative: bool = False) -> float:
        r"""Bound on :math:`|w_k(t) - w_\text{lin}(t)|`, the error of `weights(t)` that the solver makes.

        For Lanczos the rigorous truncation error of `lightning_ntk.error_bounds`, plus an estimate of the effect of the
        measured rounding of its products. The basis is extended first, as `weights(t)` would. Not counted are the rounding
        of the pass that turns coefficients into weights and, at t = infinity, eigenvalues that count as zero.

        Args:
            t: Optimizer steps, as for `weights`.
            relative: In units of |w_lin(t) - w0| in the place of those of the weights.

        Returns:
            The bound; 0 for a complete eigendecomposition.
        """
        self._require_time(t)
        bound = self._refine(t)
        return bound.relative if relative else bound.total

    def state(self, t: float | None) -> LinearizedState:
        """The linearised network after `t` steps, in function space: no pass over the data, unless Lanczos needs more."""
        self._require_time(t)
        self._refine(t)
        return self.state_of(self._closed_form.filter(self._modes, t))

    def follow(self) -> GradientDescent | GradientFlow | LanczosRun:
        """These dynamics from step 0 on, to be advanced with the learning rates of a run: `.step(lr)` and `.filter`.

        `state_of(run.filter)` is the state at that moment. With Lanczos, reading the filter extends the basis where the
        steps so far need it, and replays them; several runs may be followed at once if each filter is used when it is read.
        """
        flow = self.dynamics == "gradient_flow"
        if self._solver is not None:
            return LanczosRun(self._solver, self.loss_factor, flow=flow)
        return (GradientFlow if flow else GradientDescent)(self.eigenvalues, self.loss_factor)

    def state_of(self, filtered: Tensor) -> LinearizedState:
        """The state that a filter `(m,)` of the modes gives.

        Raises:
            ValueError: If the filter is of other modes, for Lanczos of those before an extension.
            OverflowError: If it is not finite, because the dynamics have diverged.
        """
        modes = self._modes
        if filtered.shape != modes.eigenvalues.shape:
            raise ValueError(
                f"Expected a filter of {len(modes.eigenvalues)} modes but got shape {tuple(filtered.shape)}: the modes were "
                "extended since, read the filter of the followed run again."
            )
        coefficients = modes.coefficients(filtered)
        if not coefficients.isfinite().all():
            raise OverflowError(
                "The linearised network has diverged beyond floating-point numbers: the learning rate is above the largest "
                f"stable one, {self.max_learning_rate:.4g}."
            )
        shape = self.initial_predictions.shape
        change = modes.prediction_change(filtered).reshape(shape)
        return LinearizedState(coefficients.reshape(shape), self.initial_predictions.cpu().double() + change)

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

    @property
    def _modes(self) -> Modes:
        return self._dense if self._solver is None else self._solver.modes

    def _require_time(self, t: float | None) -> None:
        if t is not None and not t >= 0:
            raise ValueError(f"Expected argument `t` to be at least 0 optimizer steps but got {t}.")
        if is_infinite(t) and self.lr >= self.max_learning_rate:
            raise ValueError(
                f"Expected a stable learning rate for t = infinity but {self.lr:.4g} is not below the maximum "
                f"{self.max_learning_rate:.4g}: the linearised network has no limit."
            )

    def _refine(self, t: float | None) -> ErrorBound:
        if self._solver is None:
            return ErrorBound(0.0, 0.0, 0.0)
        return self._solver.refine(lambda modes: self._closed_form.bound(modes, t))


def require_choice(name: str, value: object, choices: object) -> None:
    """Raises a ValueError if a string argument is none of the values of a Literal."""
    allowed = [v for c in get_args(choices) for v in (get_args(c) or [c])]
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, allowed))} but got {value!r}.")
