"""What is computed once, when the training of a network is captured."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Reference, Unpack
from lightning_ntk.data.targets import Classes
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.kernel.per_sample import contract, sample_jacobians
from lightning_ntk.linearization.jacobian import Jacobian, StoredJacobian, StreamedJacobian
from lightning_ntk.linearization.linearization import Linearization, Predict
from lightning_ntk.linearization.objective import Loss, Objective
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.linearization.verification import check_adjoint, check_determinism, check_kernel
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.memory import mirror_upper_

JacobianStorage = Literal["streamed", "stored"]


class Capture:
    """A network at its initial weights w0 on a training set: what all linearized dynamics start from.

    Args:
        module: The network, left as it is.
        data: The training set, as for `Reference`.
        loss: Of outputs and targets. Default: `nn.MSELoss()`.
        predict: As for `Linearization`.
        unpack: As for `Reference`.
        jacobian: "streamed" or "stored".
        batch_size: Samples in one pass.
        dtype: Type of the passes.
        device: Where the kernel and all that is as large as its rows is kept. Default: with the passes, on the device of the
            parameters.
        progress: Whether passes show a progress bar.
        start: What `Linearization.state_dict` returned, to linearize at in the place of the module's own state.
        processes: The processes that share the passes. All of them read the whole data set once, later only their rows. Buffers
            are those of the first process, as in distributed training.

    Attributes:
        linearization: The network at w0.
        reference: The training set in a fixed order.
        predictions: f0, `(N, K)` in the type of the passes.
        objective: The loss, with the targets of all samples.
        jacobian: J of all samples.
        samples: The samples of the training set by content.
        fingerprint: A digest of the content and order of the training set.
        classes: The classes that the targets stand for, or None.

    Raises:
        ValueError: If the data, the network or the loss cannot be used.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        *,
        loss: Loss | None = None,
        predict: Predict | None = None,
        unpack: Unpack | None = None,
        jacobian: JacobianStorage = "streamed",
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        progress: bool = False,
        start: Mapping[str, Mapping[str, Tensor]] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.progress = progress
        self.processes = processes
        self.unpack = unpack
        with preserved_rng():
            self.linearization = Linearization(module, predict=predict, dtype=dtype)
            self.device = device or self.linearization.device
            if start is not None:
                self.linearization.load_state_dict(start)
            self.linearization.share_buffers(processes)
            self.reference = Reference(data, batch_size=batch_size, unpack=unpack)
            self.passes = DataPasses(self.linearization, self.reference, progress=progress, processes=processes)
            self.predictions, targets, self.samples = self.passes.first()
            self.fingerprint = self.samples.fingerprint
            check_determinism(self.linearization, self.reference, self.predictions)
            self.objective = Objective(
                nn.MSELoss() if loss is None else loss, self.predictions, targets, flat=self.linearization.flat
            )
            self.jacobian: Jacobian = (
                StoredJacobian.cat(
                    sample_jacobians(self.linearization, batch.inputs)
                    for batch in self.passes.batches("Jacobian", range(len(self.reference)))
                )
                if jacobian == "stored"
                else StreamedJacobian(self.passes, self.predictions)
            )
            check_adjoint(self.linearization, self.jacobian, self.predictions)
        self.classes = Classes.of(self.objective.targets, self.predictions.shape[1], self.objective.gradient)

    @property
    def initial_weights(self) -> Tensors:
        """w0: clones of the trainable parameters, under their names in `named_parameters()`."""
        return self.linearization.params

    def predict(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the (non-linear) network at other weights, `(N, K)`: one forward pass over the training set."""
        with preserved_rng():
            return self.passes.predict(weights)

    def push_forward(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """J v, `(N, K)` in float64."""
        with preserved_rng():
            return self.jacobian.jvp(tangent)

    def pull_back(self, coefficients: Tensor) -> Tensors:
        """J^T a for coefficients `(T, N, K)`: for every parameter `(T, *shape)` in float64."""
        with preserved_rng():
            return self.jacobian.vjp(coefficients)

    def loss_of(self, predictions: Tensor) -> float:
        """The loss of predictions `(N, K)` on the training set, in float64."""
        return self.objective.value(predictions.detach().cpu(), self.objective.targets).item()


def training_kernel(given: Tensor | None, capture: Capture, *, dtype: torch.dtype) -> Tensor:
    """The kernel of the training set with itself, `(N K, N K)`, summed in `dtype` or `given`, and verified.

    Raises:
        ValueError: If the given one is not of this network and data.
    """
    linearization, jacobian = capture.linearization, capture.jacobian
    size = capture.predictions.numel()
    if given is not None:
        if tuple(given.shape) != (size, size):
            raise ValueError(f"Expected argument `ntk` of shape {(size, size)} but got {tuple(given.shape)}.")
        if not given.isfinite().all():
            raise ValueError("Expected argument `ntk` to be finite but it holds NaN or infinity.")
        kernel = given.detach().to(capture.device)
        if not torch.allclose(kernel, kernel.T, rtol=1e-3, atol=1e-4 * kernel.abs().max().item()):
            raise ValueError("Expected argument `ntk` to be symmetric, the kernel of the training set with itself.")
    elif isinstance(jacobian, StoredJacobian):
        kernel = mirror_upper_(contract(jacobian.blocks, jacobian.blocks, dtype)).to(capture.device)
    else:
        kernel = compute_kernel(
            linearization,
            capture.reference,
            dtype=dtype,
            device=capture.device,
            progress=capture.progress,
            processes=capture.processes,
        )
    # A kernel computed earlier may come from float32 passes whatever its type is now.
    computed = linearization.dtype if given is None else torch.float32
    check_kernel(jacobian, kernel, capture.predictions, dtype=computed)
    return kernel
