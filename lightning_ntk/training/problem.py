"""The problem that linearized training solves."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Reference, Unpack
from lightning_ntk.data.targets import Classes
from lightning_ntk.kernel.ntk import PlannedKernel, complete_scales
from lightning_ntk.kernel.per_sample import contract, sample_jacobians
from lightning_ntk.linearization.jacobian import Jacobian, StoredJacobian, StreamedJacobian
from lightning_ntk.linearization.linearization import Linearization, Predict
from lightning_ntk.linearization.objective import Loss, Objective
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.linearization.verification import check_adjoint, check_determinism, check_kernel, check_samples
from lightning_ntk.utilities.contexts import full_precision, preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.errors import describe, explained
from lightning_ntk.utilities.memory import format_bytes, mirror_upper_
from lightning_ntk.utilities.representation import name_of, parameter_count, represent
from lightning_ntk.utilities.shapes import Float, Float64, Int
from lightning_ntk.utilities.validation import require_callable, require_choice, require_instance

JacobianStorage = Literal["streamed", "stored"]


class LinearizedProblem:
    r"""A network at its initial weights on a training set.

    Learning rates that differ between parameters are part of the problem. With rates :math:`\eta D`, D diagonal,

    .. math:: w_\text{lin} = w_0 + D J^\top a, \qquad \Theta = J D J^\top, \qquad f_\text{lin} = f_0 + \Theta a,

    so that D is the identity where all rates are equal.

    Args:
        module: The network. It is left as it is.
        data: The training set, as for `Reference`.
        loss: Maps outputs and targets to one number. Default: `nn.MSELoss()`.
        predict: As for `Linearization`.
        unpack: As for `Reference`, like `transfer`.
        transfer: See `unpack`.
        jacobian: "streamed" recomputes J in every pass; "stored" keeps it in memory, N K P numbers.
        batch_size: Samples in one pass.
        dtype: Floating-point type of the passes. Default: that of the parameters.
        device: Where the kernel, its modes and all vectors of its size are kept. Default: the device of the parameters.
        lr_scales: The learning rate of each named parameter as a multiple of the common one; 0 freezes it. Default: 1.
        progress: Whether passes show a progress bar.
        start: A `Linearization.state_dict()` to linearize at, instead of the module's own state.
        processes: The processes that share the passes. Each reads the whole data set once and later only its own rows. The
            buffers are those of the first process, as in distributed training.

    Attributes:
        linearization: The network at w0.
        reference: The training set in a fixed order.
        predictions: f0, `(N, K)` in the type of the passes.
        objective: The loss with the targets of all samples.
        jacobian: J on all samples, without D.
        lr_scales: D, one number for every parameter.
        samples: The samples of the training set by content.
        classes: The classes that the targets stand for, or None.

    Raises:
        ValueError: If the data, the network, the loss or `lr_scales` cannot be used.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        *,
        loss: Loss | None = None,
        predict: Predict | None = None,
        unpack: Unpack | None = None,
        transfer: Callable[[Any], Any] | None = None,
        jacobian: JacobianStorage = "streamed",
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        lr_scales: Mapping[str, float] | None = None,
        progress: bool = False,
        start: Mapping[str, Mapping[str, Tensor]] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        require_choice("jacobian", jacobian, JacobianStorage)
        require_callable("loss", loss)
        self.progress = progress
        self.processes = processes
        self.unpack = unpack
        self.transfer = transfer
        self._loss = nn.MSELoss() if loss is None else loss
        self._storage = jacobian
        self._batch_size = batch_size
        with preserved_rng():
            self.linearization = Linearization(module, predict=predict, dtype=dtype)
            if start is not None:
                self.linearization.load_state_dict(start)
            self.linearization.share_buffers(processes)
        self.device = device or self.linearization.device
        self.lr_scales = complete_scales(lr_scales or {}, self.linearization.params)
        self._read(data)

    def on(self, data: Data) -> "LinearizedProblem":
        """The same network, at the same weights, on another data set."""
        other = copy(self)
        other._read(data)
        return other

    def at(self, tensors: Mapping[str, Tensor]) -> "LinearizedProblem":
        """Returns the same data set with the network at other weights and buffers.

        Those that are not among `tensors` stay.
        """
        other = copy(self)
        other.linearization = copy(self.linearization)
        state = self.linearization.state_dict()
        other.linearization.load_state_dict(
            {kind: {name: tensors.get(name, value) for name, value in own.items()} for kind, own in state.items()}
        )
        other.linearization.share_buffers(self.processes)
        other._read(self._data)
        return other

    @preserved_rng()
    def _read(self, data: Data) -> None:
        linearization, self._data = self.linearization, data
        self.reference = Reference(data, batch_size=self._batch_size, unpack=self.unpack, transfer=self.transfer)
        self._passes = DataPasses(linearization, self.reference, progress=self.progress, processes=self.processes)
        check_samples(linearization, self.reference)
        self.predictions, targets, self.samples = self._passes.first()
        check_determinism(linearization, self.reference, self.predictions)
        with explained(lambda: f"The loss of the first outputs, {describe(self.predictions)},", "Check the loss."):
            self.objective = Objective(self._loss, self.predictions, targets, flat=linearization.flat)
        self.jacobian: Jacobian = StreamedJacobian(self._passes, self.predictions)
        if self._storage == "stored":
            size = self.predictions.numel() * linearization.num_parameters * linearization.dtype.itemsize
            if size > (free := self.processes.free_memory(linearization.device)):
                raise MemoryError(
                    f"The stored Jacobian of {len(self.reference)} samples needs {format_bytes(size)} but {format_bytes(free)} "
                    'are free. Use fewer samples, or jacobian="streamed".'
                )
            batches = self._passes.batches("Jacobian", range(len(self.reference)))
            parts = (sample_jacobians(linearization, batch.inputs) for batch in batches)
            self.jacobian = StoredJacobian.cat(parts, len(self.reference))
        check_adjoint(linearization, self.jacobian, self.predictions)
        self.classes = Classes.of(self.objective.targets, self.predictions.shape[1], self.objective.gradient)
        self._planned: PlannedKernel | None = None

    @property
    def freezes_only(self) -> bool:
        """Whether all parameters that train have the same learning rate."""
        return set(self.lr_scales.values()) <= {0.0, 1.0}

    def scaled(self, vector: Mapping[str, Tensor]) -> Tensors:
        """D v for a vector with the names of the weights."""
        return {
            name: value if self.lr_scales[name] == 1 else value * self.lr_scales[name] for name, value in vector.items()
        }

    @preserved_rng()
    def rows(self, batch: Any) -> Int[Tensor, "B"]:
        """Finds a batch's samples in the training set by content, `(B,)`.

        Raises:
            UnknownSamplesError: If the batch has samples that are not in the training set.
        """
        return self.samples.rows(*self.reference.unpack(batch))

    @preserved_rng()
    def predict(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "N K"]:
        """Computes outputs of the (non-linear) network at other weights, `(N, K)`.

        It takes one forward pass over the training set.
        """
        return self._passes.predict(weights)

    @preserved_rng()
    def push_forward(self, tangent: Mapping[str, Tensor]) -> Float64[Tensor, "N K"]:
        """Computes J v, `(N, K)` in float64.

        The tangent v has the names and shapes of the weights.
        """
        return self.jacobian.jvp(tangent)

    @preserved_rng()
    def pull_back(self, coefficients: Float[Tensor, "T N K"]) -> dict[str, Float64[Tensor, "T ..."]]:
        """Computes D J^T a for coefficients `(T, N, K)`.

        Every parameter has a tensor `(T, *shape)` in float64.
        """
        return self.scaled(self.jacobian.vjp(coefficients))

    def loss_of(self, predictions: Float[Tensor, "N K"]) -> float:
        """The loss of predictions `(N, K)` on the training set, in float64."""
        return self.objective.value(predictions.detach().cpu(), self.objective.targets).item()

    @property
    def planned_kernel(self) -> PlannedKernel:
        """The plan of the training set's kernel, made on first use."""
        if self._planned is None:
            with preserved_rng():
                self._planned = PlannedKernel(self.linearization, self.reference, lr_scales=self.lr_scales)
        return self._planned

    @preserved_rng()
    def kernel(
        self, given: Float[Tensor, "rows rows"] | None = None, *, dtype: torch.dtype
    ) -> Float[Tensor, "rows rows"]:
        r"""Computes the kernel :math:`J D J^\top` of the training set.

        It is verified against one random vector-Jacobian product.

        Args:
            given: A kernel computed earlier, `(N K, N K)` in sample-major order. It is held to the precision of its type and of
                the passes: one of passes in float32 is given in float32 where these passes are in float64.
            dtype: Type in which the products are summed.

        Raises:
            ValueError: If the given kernel does not belong to this network, data and order.
        """
        size, computed = self.predictions.numel(), self.linearization.dtype
        if given is not None:
            kernel = _checked_kernel(given, size).to(self.device)
            computed = max(given.dtype, computed, key=lambda kind: torch.finfo(kind).eps)
        elif isinstance(self.jacobian, StoredJacobian):
            blocks = self.jacobian.blocks
            with full_precision(self.linearization.device.type):
                kernel = mirror_upper_(contract(self.scaled(blocks), blocks, dtype)).to(self.device)
        else:
            kernel = self.planned_kernel.compute(
                dtype=dtype, device=self.device, progress=self.progress, processes=self.processes
            )
        check_kernel(self.jacobian, kernel, self.predictions, lr_scales=self.lr_scales, dtype=computed)
        return kernel

    def __repr__(self) -> str:
        samples, outputs = self.predictions.shape
        return represent(
            self,
            f"{samples} samples x {outputs} outputs",
            parameter_count(self.linearization.params),
            f"loss={name_of(self._loss)}",
        )


def _checked_kernel(given: Tensor, size: int) -> Tensor:
    require_instance("ntk", given, Tensor, "a tensor")
    if tuple(given.shape) != (size, size):
        raise ValueError(f"Expected argument `ntk` of shape {(size, size)} but got {tuple(given.shape)}.")
    if not given.is_floating_point():
        raise ValueError(f"Expected argument `ntk` to hold real floating-point numbers but got {given.dtype}.")
    if not given.isfinite().all():
        raise ValueError("Expected argument `ntk` to be finite but it holds NaN or infinity.")
    if not torch.allclose(given, given.T, rtol=1e-3, atol=1e-4 * given.abs().max().item()):
        raise ValueError("Expected argument `ntk` to be symmetric, the kernel of the training set with itself.")
    return given.detach()
