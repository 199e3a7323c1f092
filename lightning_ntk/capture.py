"""What is computed once, when the training of a network is captured."""

import torch
from torch import Tensor

from lightning_ntk.checks import check_kernel
from lightning_ntk.jacobian import Jacobian, StoredJacobian
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.kernel.contraction import contract, sample_jacobians
from lightning_ntk.linearization import Linearization
from lightning_ntk.progress import track
from lightning_ntk.reference import Reference


def first_pass(linearization: Linearization, reference: Reference, *, progress: bool) -> tuple[Tensor, Tensor]:
    """Outputs `(N, K)` and targets of the whole data set.

    Raises:
        ValueError: If there are no targets, or if anything is NaN or infinite.
    """
    outputs, targets = [], []
    for batch in track(reference.batches(), "initial predictions", total=reference.num_batches, enabled=progress):
        if batch.target is None:
            raise ValueError("Expected the training set to have targets but its batches hold inputs only.")
        for name, value in (("inputs", batch.inputs), ("targets", batch.target)):
            _require_finite(name, value, batch.rows)
        outputs.append(linearization.predict(batch.inputs))
        targets.append(batch.target.detach().cpu())
        _require_finite("initial outputs", outputs[-1], batch.rows)
    return torch.cat(outputs), torch.cat(targets)


def store_jacobian(linearization: Linearization, reference: Reference, *, progress: bool) -> StoredJacobian:
    """All of J, N K P numbers."""
    batches = track(reference.batches(), "Jacobian", total=reference.num_batches, enabled=progress)
    blocks = [sample_jacobians(linearization, batch.inputs) for batch in batches]
    return StoredJacobian({name: torch.cat([block[name] for block in blocks]) for name in blocks[0]})


def training_kernel(
    given: Tensor | None,
    linearization: Linearization,
    reference: Reference,
    jacobian: Jacobian,
    predictions: Tensor,
    *,
    dtype: torch.dtype,
    progress: bool,
) -> Tensor:
    """The kernel of the data set with itself, summed in `dtype` or `given`, and verified.

    Raises:
        ValueError: If the given one is not of this network and data.
    """
    size = predictions.numel()
    if given is not None:
        if tuple(given.shape) != (size, size):
            raise ValueError(f"Expected argument `ntk` of shape {(size, size)} but got {tuple(given.shape)}.")
        if not given.isfinite().all():
            raise ValueError("Expected argument `ntk` to be finite but it holds NaN or infinity.")
        kernel = given.detach()
        if not torch.allclose(kernel, kernel.T, rtol=1e-3, atol=1e-4 * kernel.abs().max().item()):
            raise ValueError("Expected argument `ntk` to be symmetric, the kernel of the training set with itself.")
    elif isinstance(jacobian, StoredJacobian):
        kernel = contract(jacobian.blocks, jacobian.blocks, dtype)
    else:
        kernel = compute_kernel(linearization, reference, dtype=dtype, progress=progress)
    # A kernel computed earlier may come from float32 passes whatever its type is now.
    computed = linearization.dtype if given is None else torch.float32
    check_kernel(jacobian, kernel, predictions, dtype=computed)
    return kernel


def _require_finite(name: str, tree: object, rows: slice) -> None:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            raise ValueError(
                f"Expected finite {name} but samples {rows.start} to {rows.stop - 1} hold NaN or infinity."
            )
