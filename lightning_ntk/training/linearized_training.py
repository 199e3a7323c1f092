"""The linearized network trained on a data set: captured once, then answered for every time."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Reference, Unpack
from lightning_ntk.dynamics.closed_form import Dynamics
from lightning_ntk.dynamics.sgd import Decay, Hyperparameters, LearningRate, SGDSettings
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization.jacobian import StreamedJacobian
from lightning_ntk.linearization.linearization import Linearization, Predict
from lightning_ntk.linearization.objective import Loss
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.solvers.base import Modes
from lightning_ntk.solvers.lanczos import Lanczos
from lightning_ntk.solvers.selection import Solver
from lightning_ntk.training.carried import carried_vectors
from lightning_ntk.training.closest import ClosestTime, find_closest
from lightning_ntk.training.modal import ModalTraining
from lightning_ntk.training.problem import Capture, JacobianStorage
from lightning_ntk.training.readout import LinearizedState, Readout
from lightning_ntk.training.recorded import Batches, RecordedTraining
from lightning_ntk.training.run import Run
from lightning_ntk.training.scaling import Scaling
from lightning_ntk.training.solution import solve
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.validation import require_choice

__all__ = ["LinearizedState", "LinearizedTraining"]


class LinearizedTraining:
    r"""Full-batch training of the network linearized at the weights that `module` has now.

    .. math:: w_\text{lin}(t) = w_0 - J^\top \Theta^{-1} (I - (I - \eta\Theta)^t) (f_0 - Y)

    for gradient descent (Lee et al., 2019, eq. 8-10), with :math:`e^{-\eta t\Theta}` in the place of the power for
    gradient flow. The kernel :math:`\Theta = J J^\top` is decomposed once, in float64 and never inverted; every later
    time costs one pass over the data. Or a Krylov space stands in for it, made of products J (J^T v) and extended when
    a time asks for more; `error_bound` says how exact that is. The module is left as it was: weights, buffers,
    gradients, modes, random state.

    Args:
        module: The network, with outputs `(B, K)` or `(B,)`; or a `Capture` of it, made already, in the place of `data`, `loss`,
            `jacobian`, `predict`, `unpack`, `batch_size`, `dtype` and `progress`.
        data: The training set, read in its own order: a map-style Dataset, a DataLoader (whose sampler is not used) or a
            tuple `(inputs, target)`. Integer class labels `(N,)` become one-hot rows.
        lr: Learning rate of `torch.optim.SGD`; or one for each step; or a function of the step, which counts from 0.
        loss: A squared loss of outputs and targets. Its factor c, with gradient c (f - Y), is measured; eta = lr * c.
        dynamics: "gradient_descent" (t is a whole number of steps) or "gradient_flow" (t is real; a step lasts `lr`).
        momentum: As for `torch.optim.SGD`, like `dampening`, `nesterov`, `weight_decay` and `maximize`. Plain gradient descent
            and gradient flow have closed forms; momentum, schedules and decay toward zero are a recurrence over the steps.
        dampening: See `momentum`.
        nesterov: See `momentum`.
        weight_decay: See `momentum`.
        decay: How `weight_decay` acts: "coupled", through the gradient as in `torch.optim.SGD`; "decoupled", by multiplying
            the weights by 1 - lr * weight_decay; "initial", through the gradient, toward w0 instead of zero.
        maximize: See `momentum`.
        momentum_buffers: For a capture in the middle of a run: the optimizer's momentum buffers, by parameter.
        lr_scales: By parameter, the multiple of `lr` that it is trained with, 0 for frozen; the others have 1. Then
            w_lin = w0 + D J^T a with the kernel J D J^T, and norms in error bounds are those of D^(-1/2) (w - w0).
        solver: "eigh", a dense eigendecomposition in float64; "lanczos", or `Lanczos` with its options, Ritz pairs from the
            residual f0 - Y; "auto" takes the cheapest by counted operations that fits into memory, see `solver_reason`.
        matrix_free: Whether Lanczos goes without the kernel, in two passes a product. Default: what is cheaper.
        horizon: The largest number of steps that will be asked for, at about `lr`. Lanczos prepares for it at once; later
            times are possible and extend the basis. Infinity takes nearly N K products on most networks, because
            eigenvalues reach down to what counts as zero. Default: unknown, and Lanczos starts when asked.
        tolerance: Truncation error that Lanczos allows in the weights, relative to |w_lin - w0|. It never asks for more than
            a hundredth of what rounding leaves open, see `error_bound`: in float32, without a kernel, the weights are off by
            about 1e-5 after 1000 steps of eta lambda_max = 1, by 1e-4 after 10000; with one, by a tenth of that.
        jacobian: "streamed" recomputes J minibatch by minibatch in every pass, memory O(P + N K); "stored" keeps a small
            model's J, N K P numbers. Both give the same results.
        ntk: A kernel computed earlier, `(N K, N K)` in sample-major order, with `lr_scales` the weighted one; it is checked
            against one pass.
        predict: Maps `(module, inputs)` to outputs. Default: `module(inputs)`, or `module(*inputs)` for tuples.
        unpack: Maps a batch of `data` to `(inputs, target)`. Default: batches that are such pairs already.
        batch_size: Samples in one pass through the network.
        dtype: Type of the Jacobian passes, by default that of the parameters. Spectra are always float64.
        progress: Whether long operations show a progress bar.
        batches: For a run on minibatches whose order was recorded: for every step the rows of its samples in the training
            set, or a tuple of such, micro-batches whose gradients are averaged. Then `loss` may be any differentiable one,
            `t` is at most their number, and the kernel is formed; there are no modes.

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
        module: nn.Module | Capture,
        data: Data | None = None,
        *,
        lr: LearningRate,
        loss: Loss | None = None,
        dynamics: Dynamics = "gradient_descent",
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "coupled",
        maximize: bool = False,
        momentum_buffers: Mapping[str, Tensor] | None = None,
        lr_scales: Mapping[str, float] | None = None,
        solver: Solver | Lanczos = "auto",
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
        batches: Batches | None = None,
    ) -> None:
        require_choice("dynamics", dynamics, Dynamics)
        require_choice("decay", decay, Decay)
        lanczos = Lanczos(tolerance, horizon, matrix_free)
        if isinstance(solver, Lanczos):
            if lanczos != Lanczos():
                raise ValueError(
                    "Expected `matrix_free`, `horizon` and `tolerance` as options of `solver=Lanczos(...)` but got some of them "
                    "beside it."
                )
            lanczos, solver = solver, "lanczos"
        require_choice("solver", solver, Solver)
        require_choice("jacobian", jacobian, JacobianStorage)
        self.dynamics = dynamics
        template = SGDSettings(0.0, momentum, dampening, nesterov, weight_decay, maximize, decay == "decoupled")
        self.hyperparameters = Hyperparameters(lr, template, decays_to_initial=decay == "initial")
        _require_describable(dynamics, self.hyperparameters)
        self._solution: tuple[float | None, Tensors] | None = None
        if isinstance(module, Capture):
            self.capture = module
        elif data is None:
            raise ValueError("Expected argument `data` to be the training set but got None.")
        else:
            self.capture = Capture(
                module, data, loss=loss, predict=predict, unpack=unpack, jacobian=jacobian, batch_size=batch_size,
                dtype=dtype, progress=progress,
            )  # fmt: skip
        self._scaling = None if lr_scales is None else Scaling(self.capture, lr_scales)
        if self._scaling is not None:
            self._scaling.require_commuting(weight_decay)
        scaled = self.capture if self._scaling is None else self._scaling.capture
        with preserved_rng():
            self._carried = carried = carried_vectors(
                self.capture, self.hyperparameters, momentum_buffers, self._scaling
            )
            self._readout = Readout(scaled, carried)
            if batches is not None:
                recorded = RecordedTraining(self.capture, self._scaling, self.hyperparameters, carried, batches, ntk)
                self._engine: ModalTraining | RecordedTraining = recorded
                self.ntk: Tensor | None = recorded.kernel
                self.solver_reason = "No modes: recorded minibatches are replayed on the kernel."
                return
            residual = self.initial_predictions.cpu().double() - self.targets
            solution = solve(
                self.capture, [residual, *(c.image for c in carried)], scaling=self._scaling, ntk=ntk, solver=solver,
                lanczos=lanczos,
            )  # fmt: skip
        self.ntk = solution.kernel
        self.solver_reason = solution.reason
        self._engine = ModalTraining(
            solution.solver, dynamics, self.hyperparameters, self.loss_factor, carried, self._readout,
            self.linearization.dtype, solution.rounding,
        )  # fmt: skip
        if self._modal.unstable:
            warnings.warn(
                f"The learning rate {self.lr:.4g} is above {self.max_learning_rate:.4g}, the largest for which these linearized "
                "dynamics are stable: the linearized network diverges.",
                stacklevel=2,
            )
        elif lanczos.horizon:
            self._modal.prepare(lanczos.horizon)

    @property
    def lr(self) -> LearningRate:
        """The learning rate as it was given."""
        return self.hyperparameters.lr

    @property
    def linearization(self) -> Linearization:
        """The network at w0."""
        return self.capture.linearization

    @property
    def reference(self) -> Reference:
        """The training set in a fixed order."""
        return self.capture.reference

    @property
    def initial_weights(self) -> Tensors:
        """w0: clones of the trainable parameters, under their names in `named_parameters()`."""
        return dict(self.linearization.params)

    @property
    def initial_predictions(self) -> Tensor:
        """f0, `(N, K)` in the type of the passes."""
        return self.capture.predictions

    @property
    def targets(self) -> Tensor:
        """Y, `(N, K)` in float64 on the CPU, class labels as one-hot rows."""
        return self.capture.objective.targets

    @property
    def loss_factor(self) -> float:
        """C of a squared loss, whose gradient in the outputs is c (f - Y); a ValueError for other losses."""
        return self.capture.objective.require_factor()

    @property
    def modes(self) -> Modes:
        """The modes of the kernel: all N K, or Ritz pairs in their place."""
        return self._modal.solver.modes[0]

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the kernel, ascending, `(m,)` in float64: all N K, or the Ritz values in their place."""
        return self._modal.solver.modes[0].eigenvalues

    @property
    def max_learning_rate(self) -> float:
        r"""The largest stable learning rate, :math:`2 (1 + \mu) / (c\,\lambda_\text{max})` for momentum :math:`\mu`.

        Dampening, Nesterov's momentum and decay change it, see `lightning_ntk.dynamics.stability`; infinite for gradient
        flow. With Lanczos, :math:`\lambda_\text{max}` is the largest eigenvalue that the residual has part in, plus at most
        1e-4 of it for safety, as Ritz values converge from below.
        """
        return self._modal.max_learning_rate

    def weights(self, t: float | None) -> Tensors:
        """The linearized weights after `t` optimizer steps: one pass over the data.

        Args:
            t: Optimizer steps, a whole number for gradient descent; None for infinity, with a constant learning rate:
                the minimum-norm solution, or with decay that of kernel ridge regression. Later times go on from earlier ones.

        Returns:
            The weights, with the names and shapes of `initial_weights`, in the type of the passes.

        Raises:
            ValueError: If `t` is negative, fractional for gradient descent, or None where the dynamics have no limit.
            OverflowError: If the linearized network has diverged beyond floating-point numbers.
        """
        return self._add_to_initial(self.displacement(t))

    def weights_at(self, times: Sequence[float | None]) -> list[Tensors]:
        """`weights` at several times for one pass: one forward and `len(times)` backward passes, memory O(T P)."""
        stacked = self._displacements([self.state(t) for t in times])
        return [self._add_to_initial({n: value[i] for n, value in stacked.items()}) for i in range(len(times))]

    def displacement(self, t: float | None) -> Tensors:
        """w_lin(t) - w0 in float64, which `weights` rounds: one pass over the data, none for the last `t` again."""
        if self._solution is None or self._solution[0] != t:
            self._solution = (t, self.displacement_of(self.state(t)))
        return self._solution[1]

    def predictions(self, t: float | None, data: Data | None = None) -> Tensor:
        """Outputs of the linearized network after `t` steps.

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
            other = Reference(data, batch_size=self.reference.batch_size, unpack=self.capture.unpack)
            passes = DataPasses(self.linearization, other, progress=self.capture.progress)
            outputs = passes.predict()
            samples, classes = outputs.shape
            # In units of P: the kernel's products against a backward pass here and a forward-mode pass there.
            plain = self._scaling is None and not state.scales
            if plain and samples * len(self.reference) * classes**2 < 3 * (samples + len(self.reference)):
                kernel = compute_kernel(self.linearization, other, self.reference, progress=self.capture.progress)
                change = kernel.double() @ state.coefficients.flatten().to(kernel.device)
                return outputs + change.reshape(samples, classes).to(outputs)
            return outputs + StreamedJacobian(passes, outputs).jvp(self.displacement(t)).to(outputs)

    def loss(self, t: float | None) -> float:
        """The loss of the linearized network on the training set after `t` steps."""
        return self.capture.loss_of(self.state(t).predictions)

    def error_bound(self, t: float | None, *, relative: bool = False) -> float:
        r"""A bound on the error of `weights(t)`, as `lightning_ntk.dynamics.error_bounds` derives it.

        The truncation error of Lanczos, which is rigorous, and four times the effect of rounding, from errors of the
        passes that were measured against float64 at construction. `weights(t)` and `displacement(t)` meet it.

        Args:
            t: Optimizer steps, as for `weights`.
            relative: Whether to give the bound in units of |w_lin(t) - w0|.

        Returns:
            The bound. At t = infinity without decay it counts the eigenvalues that are zero for the passes but not for
            float64, which may hold most of the solution. It is infinite where the passes do not determine these: in
            float32, without a kernel.

        Raises:
            ValueError: If recorded `batches` are replayed, for which there is no bound, or there is no such `t`.
        """
        bound = self._modal.error_bound(t)
        return bound.relative if relative else bound.total

    def state(self, t: float | None) -> LinearizedState:
        """The linearized network after `t` steps, in function space: no pass over the data, unless Lanczos needs more."""
        return self._engine.state(t)

    @property
    def knows_all_times(self) -> bool:
        """Whether `closest` looks at all times to infinity, from closed forms on all modes."""
        engine = self._engine
        return isinstance(engine, ModalTraining) and engine.last_time == math.inf and engine.has_closed_form(1)

    def closest(self, displacement: Mapping[str, Tensor], *, until: float | None = None) -> ClosestTime:
        """The time at which the linearized network is closest to given weights, and the distance there.

        One pass of Jacobian-vector products and one that forms the weights of the time found; the search takes none.

        Args:
            displacement: w - w0, with the names and shapes of `initial_weights`.
            until: The last time to look at, in optimizer steps. Default: infinity where every time has a closed form and all
                modes are known, the number of learning rates where they are a sequence.

        Raises:
            ValueError: If `until` is needed, or there is no such time, or with `lr_scales` other than 0 and 1.
        """
        return find_closest(
            self.capture, self._scaling, self._modal, self._carried, displacement, until, self.displacement_of
        )

    def follow(self) -> Run:
        """These dynamics from step 0 on, to be advanced with the settings of a run: `.step(settings)` and `.state`.

        The settings are those that every step really used, not those of this training, which only say whether the weights
        decay, and toward what. Gradient flow takes their learning rate for the duration of a step.
        """
        return self._modal.follow()

    def displacement_of(self, state: LinearizedState) -> Tensors:
        """w_lin - w0 of a state, J^T a and what is carried along, in float64: one pass over the data."""
        return {name: value[0] for name, value in self._displacements([state]).items()}

    @property
    def _modal(self) -> ModalTraining:
        if isinstance(self._engine, RecordedTraining):
            raise ValueError(
                "Expected full-batch training, which has modes, but this one replays recorded `batches`: ask for its weights, "
                "predictions and loss, or leave `batches` out."
            )
        return self._engine

    def _displacements(self, states: Sequence[LinearizedState]) -> Tensors:
        stacked = self._readout.displacements(states)
        return stacked if self._scaling is None else self._scaling.to_weights(stacked)

    def _add_to_initial(self, displacement: Tensors) -> Tensors:
        return {name: (start + displacement[name]).to(start) for name, start in self.linearization.params.items()}


def _require_describable(dynamics: Dynamics, hyperparameters: Hyperparameters) -> None:
    template = hyperparameters.template
    if dynamics == "gradient_flow" and (template.momentum != 0 or template.maximize):
        raise ValueError(
            'Expected no momentum, and no maximization, with dynamics="gradient_flow", which has neither, but got momentum '
            f'{template.momentum} and maximize={template.maximize}. Use dynamics="gradient_descent".'
        )
