"""Linearized training on a data set, set up once and evaluated at any time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Reference, Unpack
from lightning_ntk.dynamics.closed_form import Dynamics
from lightning_ntk.dynamics.sgd import Decay, Hyperparameters, LearningRate, SGDSettings
from lightning_ntk.linearization.jacobian import StreamedJacobian
from lightning_ntk.linearization.linearization import Linearization, Predict
from lightning_ntk.linearization.objective import Loss
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.linearization.passes import DataPasses, require_finite
from lightning_ntk.solvers.base import Modes
from lightning_ntk.solvers.lanczos import Lanczos, LanczosSolver
from lightning_ntk.solvers.selection import Solver
from lightning_ntk.training.base import LinearizedState
from lightning_ntk.training.closest import ClosestTime, find_closest
from lightning_ntk.training.modal import ModalTraining
from lightning_ntk.training.modal_run import ModalRun
from lightning_ntk.training.modes import ModalProblem
from lightning_ntk.training.off_span import displacement, displacements, off_span_terms
from lightning_ntk.training.problem import JacobianStorage, LinearizedProblem
from lightning_ntk.training.replay import Batches, RecordedTraining
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float, Float64, Shaped
from lightning_ntk.utilities.user_warnings import warn_user
from lightning_ntk.utilities.validation import require_choice, require_instance


class LinearizedTraining:
    r"""Trains the network linearized at the weights that `module` has now.

    .. math:: w_\text{lin}(t) = w_0 - J^\top \Theta^{-1} (I - (I - \eta\Theta)^t) (f_0 - Y)

    is full-batch gradient descent (Lee et al., 2019, eq. 8-10). Gradient flow has :math:`e^{-\eta t\Theta}` in the
    place of the power. The kernel :math:`\Theta = J J^\top` is decomposed once, in float64, and never inverted. Every
    later time then costs one pass over the data. A Krylov space can stand in for the decomposition. It consists of
    products J (J^T v) and grows when a time asks for more; `error_bound` says how exact it is. It leaves the module
    unchanged: weights, buffers, gradients, train or eval modes, and random state.

    Args:
        module: The network, with outputs `(B, K)` or `(B,)`; or a `LinearizedProblem`, which replaces `data`, `loss`, `jacobian`,
            `predict`, `unpack`, `batch_size`, `dtype`, `lr_scales` and `progress`.
        data: The training set, read in its own order: a map-style Dataset, a DataLoader (whose sampler is not used) or a
            tuple `(inputs, target)`. A squared loss turns integer class labels `(N,)` into one-hot rows.
        lr: Learning rate of `torch.optim.SGD`; or one for each step; or a function of the step, which counts from 0.
        loss: A squared loss of outputs and targets. Its factor c, with gradient c (f - Y), is measured; eta = lr * c.
        dynamics: "gradient_descent" (t is a whole number of steps) or "gradient_flow" (t is real; a step lasts `lr`).
        momentum: As for `torch.optim.SGD`, like `dampening`, `nesterov` and `weight_decay`. Plain gradient descent and
            gradient flow have closed forms. Momentum, schedules and decay toward zero take a recurrence over the steps.
        dampening: See `momentum`.
        nesterov: See `momentum`.
        weight_decay: See `momentum`.
        decay: How `weight_decay` acts: "coupled", through the gradient as in `torch.optim.SGD`; "decoupled", by multiplying
            the weights by 1 - lr * weight_decay; "initial", through the gradient, toward w0 instead of zero.
        momentum_buffers: The optimizer's momentum buffers at w0, by parameter, for a capture in the middle of a run.
        lr_scales: The learning rate of each named parameter as a multiple of `lr`; 0 freezes it. Default: 1. Then
            w_lin = w0 + D J^T a with the kernel J D J^T, and error bounds measure D^(-1/2) (w - w0).
        solver: "eigh" is a dense eigendecomposition in float64. "lanczos", or `Lanczos` with its options, takes Ritz
            pairs from the residual f0 - Y. "auto" takes the cheapest by counted operations that fits into memory, see
            `solver_reason`.
        matrix_free: Whether Lanczos works without the kernel, with two passes per product. Default: the cheaper way.
        horizon: The largest number of steps you will ask for, at about `lr`. Lanczos prepares for it at once. Later
            times are possible and extend the basis. Infinity takes nearly N K products on most networks, because
            eigenvalues reach down to what counts as zero. Default: unknown, and Lanczos starts with the first question.
        tolerance: Truncation error that Lanczos allows in the weights, relative to |w_lin - w0|. Lanczos never aims
            below a hundredth of the rounding error, see `error_bound`.
        jacobian: "streamed" recomputes J minibatch by minibatch in every pass, with memory O(P + N K). "stored" keeps a small
            model's J, N K P numbers. Both give the same results.
        ntk: A kernel computed earlier, `(N K, N K)` in sample-major order, with `lr_scales` the weighted one. One pass checks
            it to the precision of its type.
        predict: Maps `(module, inputs)` to outputs. Default: `module(inputs)`, or `module(*inputs)` for tuples.
        unpack: Maps a batch of `data` to `(inputs, target)`. Default: batches already are such pairs.
        batch_size: Samples in one pass through the network.
        dtype: Type of the Jacobian passes, by default that of the parameters. Spectra are always float64.
        progress: Whether long operations show a progress bar.
        batches: A recorded order of minibatches: for every step the rows of its samples in the training set, or a tuple of
            such, micro-batches whose gradients are averaged. Then `loss` may be any differentiable one, `t` is at most their
            number, and the kernel is formed. There are no modes, and their arguments are refused.

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
        module: nn.Module | LinearizedProblem,
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
        momentum_buffers: Mapping[str, Tensor] | None = None,
        lr_scales: Mapping[str, float] | None = None,
        solver: Solver | Lanczos = "auto",
        matrix_free: bool | None = None,
        horizon: float | None = None,
        tolerance: float = 1e-6,
        jacobian: JacobianStorage = "streamed",
        ntk: Float[Tensor, "rows rows"] | None = None,
        predict: Predict | None = None,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        progress: bool = True,
        batches: Batches | None = None,
    ) -> None:
        require_choice("dynamics", dynamics, Dynamics)
        require_choice("decay", decay, Decay)
        name, lanczos = _solver_options(solver, Lanczos(tolerance, horizon, matrix_free))
        template = SGDSettings(0.0, momentum, dampening, nesterov, weight_decay, decay == "decoupled")
        self.dynamics = dynamics
        self.hyperparameters = Hyperparameters(lr, template, decays_to_initial=decay == "initial")
        if dynamics == "gradient_flow" and momentum != 0:
            raise ValueError(
                f'Expected no momentum with dynamics="gradient_flow" but got {momentum}. Use dynamics="gradient_descent".'
            )
        if batches is not None:
            beside = {"dynamics": dynamics != "gradient_descent", "solver": name != "auto", "tolerance": tolerance != 1e-6,
                      "matrix_free": matrix_free is not None, "horizon": horizon is not None}  # fmt: skip
            _refuse(beside, "`batches`, which are replayed on the kernel, without modes")
        if isinstance(module, LinearizedProblem):
            beside = {"data": data is not None, "loss": loss is not None, "predict": predict is not None,
                      "unpack": unpack is not None, "jacobian": jacobian != "streamed", "batch_size": batch_size != 256,
                      "dtype": dtype is not None, "lr_scales": lr_scales is not None, "progress": not progress}  # fmt: skip
            _refuse(beside, "a LinearizedProblem, which has settings of its own")
            self.problem = module
        elif data is None:
            raise ValueError("Expected argument `data` to be the training set but got None.")
        else:
            self.problem = LinearizedProblem(
                module, data, loss=loss, predict=predict, unpack=unpack, jacobian=jacobian, batch_size=batch_size,
                dtype=dtype, lr_scales=lr_scales, progress=progress,
            )  # fmt: skip
        self._latest: tuple[float | None, Tensors] | None = None
        if batches is not None:
            recorded = RecordedTraining(
                self.problem, self.hyperparameters, batches, momentum_buffers=momentum_buffers, ntk=ntk
            )
            self._engine: ModalTraining | RecordedTraining = recorded
            self._terms = recorded.terms
            self.ntk: Tensor | None = recorded.kernel
            self.solver_reason = "No modes: recorded minibatches are replayed on the kernel."
            return
        self._terms = off_span_terms(self.problem, self.hyperparameters, momentum_buffers)
        modal = ModalProblem(self.problem, self._terms, solver=name, lanczos=lanczos, ntk=ntk)
        self.ntk = modal.kernel
        self.solver_reason = modal.reason
        self._engine = engine = ModalTraining(modal, dynamics, self.hyperparameters)
        if engine.unstable:
            warn_user(
                f"The learning rate {self.lr:.4g} is above {self.max_learning_rate:.4g}, the largest for which these linearized "
                "dynamics are stable: the linearized network diverges."
            )
        elif lanczos.horizon:
            engine.prepare(lanczos.horizon)

    @property
    def lr(self) -> LearningRate:
        """The learning rate as it was given."""
        return self.hyperparameters.lr

    @property
    def linearization(self) -> Linearization:
        """The network at w0."""
        return self.problem.linearization

    @property
    def reference(self) -> Reference:
        """The training set in a fixed order."""
        return self.problem.reference

    @property
    def initial_weights(self) -> Tensors:
        """Clones of w0, the trainable parameters, under their names in `named_parameters()`."""
        return {name: value.clone() for name, value in self.linearization.params.items()}

    @property
    def initial_predictions(self) -> Float[Tensor, "N K"]:
        """f0, `(N, K)` in the type of the passes."""
        return self.problem.predictions

    @property
    def targets(self) -> Float64[Tensor, "N K"] | Shaped[Tensor, "N ..."]:
        """Y on the CPU, `(N, K)` in float64 for a squared loss (class labels as one-hot rows); else as the data gives them."""
        return self.problem.objective.targets

    @property
    def loss_factor(self) -> float:
        """The factor c of a squared loss, whose gradient is c (f - Y).

        Other losses raise a ValueError.
        """
        return self.problem.objective.require_factor()

    @property
    def modes(self) -> Modes:
        """The modes of the kernel, all N K of them or Ritz pairs in their place."""
        return self._modal.modal.solver.modes[0]

    @property
    def num_products(self) -> int:
        """Products with the kernel that Lanczos has made so far.

        It is 0 for a complete eigendecomposition.
        """
        solver = self._modal.modal.solver
        return solver.num_products if isinstance(solver, LanczosSolver) else 0

    @property
    def eigenvalues(self) -> Float64[Tensor, "m"]:
        """Eigenvalues of the kernel, ascending, `(m,)` in float64.

        These are all N K of them, or the Ritz values of Lanczos.
        """
        return self.modes.eigenvalues

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
        return self._add_to_initial(self._displacement(t))

    def weights_at(self, times: Sequence[float | None]) -> list[Tensors]:
        """Computes `weights` at several times in one pass over the data.

        It takes one forward and `len(times)` backward passes, and memory O(T P).
        """
        require_instance("times", times, list | tuple | range, "a list of times")
        stacked = displacements(self.problem, self._terms, [self.state(t) for t in times])
        return [self._add_to_initial({n: value[i] for n, value in stacked.items()}) for i in range(len(times))]

    def displacement(self, t: float | None) -> Tensors:
        """Computes w_lin(t) - w0 in float64, which `weights` rounds.

        It takes one pass over the data, or none if `t` is the last one again.
        """
        return {name: value.clone() for name, value in self._displacement(t).items()}

    def predictions(self, t: float | None, data: Data | None = None) -> Float[Tensor, "M K"]:
        """Outputs of the linearized network after `t` steps.

        On the training set they come from the modes, without a pass. On other data they are `f0 + J (w_lin(t) - w0)`, which
        takes a forward pass and a forward-mode pass there.

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
            problem = self.problem
            other = Reference(
                data, batch_size=self.reference.batch_size, unpack=problem.unpack, transfer=problem.transfer
            )
            passes = DataPasses(self.linearization, other, progress=self.problem.progress)
            outputs = passes.predict()
            require_finite("outputs", outputs, range(len(other)))
            return outputs + StreamedJacobian(passes, outputs).jvp(self._displacement(t)).to(outputs)

    def loss(self, t: float | None) -> float:
        """The loss of the linearized network on the training set after `t` steps."""
        return self.problem.loss_of(self.state(t).predictions)

    def error_bound(self, t: float | None, *, relative: bool = False) -> float:
        r"""A bound on the error of `weights(t)`, as `lightning_ntk.dynamics.error_bounds` derives it.

        It is the truncation error of Lanczos, which is rigorous, and four times the effect of rounding, from errors of the
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
        """Computes the linearized network after `t` steps, in function space.

        It takes no pass over the data unless Lanczos needs more products.
        """
        return self._engine.state(t)

    @property
    def knows_all_times(self) -> bool:
        """Whether `closest` looks at all times to infinity, from closed forms on all modes."""
        return isinstance(self._engine, ModalTraining) and self._engine.knows_all_times

    def closest(self, displacement: Mapping[str, Tensor], *, until: float | None = None) -> ClosestTime:
        """Finds when the linearized network is closest to given weights, and how close.

        It takes one pass of Jacobian-vector products, and one that forms the weights at that time. The search takes
        none.

        Args:
            displacement: w - w0, with the names and shapes of `initial_weights`.
            until: The last time to look at, in optimizer steps. Default: infinity where every time has a closed form and all
                modes are known, the number of learning rates where they are a sequence.

        Raises:
            ValueError: If `until` is needed, or there is no such time, or with `lr_scales` other than 0 and 1.
        """
        return find_closest(self._modal, displacement, until)

    def follow(self) -> ModalRun:
        """Starts these dynamics at step 0, to be advanced step by step.

        The settings may differ from step to step, as a run's do.

        The hyperparameters of this training only say whether the weights decay, and toward what. Gradient flow takes the
        learning rate of a step for its duration.
        """
        return self._modal.follow()

    @property
    def _modal(self) -> ModalTraining:
        if isinstance(self._engine, RecordedTraining):
            raise ValueError(
                "Expected full-batch training, which has modes, but this one replays recorded `batches`: ask for its weights, "
                "predictions and loss, or leave `batches` out."
            )
        return self._engine

    def _displacement(self, t: float | None) -> Tensors:
        if self._latest is None or self._latest[0] != t:
            self._latest = t, displacement(self.problem, self._terms, self.state(t))
        return self._latest[1]

    def _add_to_initial(self, displacement: Tensors) -> Tensors:
        return {name: (start + displacement[name]).to(start) for name, start in self.linearization.params.items()}

    def __repr__(self) -> str:
        lr = f"{self.lr:g}" if isinstance(self.lr, int | float) else "a schedule"
        modal = isinstance(self._engine, ModalTraining)
        solved = (
            [f"{len(self.modes.eigenvalues)} modes", f"max_learning_rate={self.max_learning_rate:.4g}"]
            if modal
            else ["replayed"]
        )
        return represent(self, f"{self.problem}", self.dynamics, f"lr={lr}", *solved)


def _solver_options(solver: Solver | Lanczos, beside: Lanczos) -> tuple[Solver, Lanczos]:
    if not isinstance(solver, Lanczos):
        require_choice("solver", solver, Solver)
        return solver, beside
    if beside != Lanczos():
        raise ValueError(
            "Expected `matrix_free`, `horizon` and `tolerance` as options of `solver=Lanczos(...)` but some came beside it."
        )
    return "lanczos", solver


def _refuse(given: Mapping[str, bool], beside: str) -> None:
    names = [f"`{name}`" for name, is_given in given.items() if is_given]
    if names:
        raise ValueError(f"Expected no argument {', '.join(names)} beside {beside}. Leave it out.")
