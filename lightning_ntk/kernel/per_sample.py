"""The kernel of any module: per-sample Jacobians by vmap over vector-Jacobian products, contracted block by block.

This is the plain reference for every faster rule. Its cost is that of the products J1 J2^T, 2 (N1 K) (N2 K) P operations.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import isolated_pass
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.memory import empty_matrix, mirror_upper_
from lightning_ntk.utilities.progress import track_operations

# Samples whose activations, K times each, are held at once while their Jacobians are made.
_VMAP_CHUNK = 32
# Making one element of a Jacobian, in multiply-adds of a long matrix product.
_JACOBIAN_COST = 400


def sample_jacobians(linearization: Linearization, inputs: object, names: Sequence[str] | None = None) -> Tensors:
    """The Jacobian of every sample of a batch, `(B, K, *shape)` for every parameter, or for those in `names`.

    Operations that vmap does not support, or for which it is wrong (that of `nn.PReLU`, in some versions of PyTorch), are
    differentiated sample by sample, K backward passes each.
    """
    inputs = linearization.convert(inputs)
    leaves, structure = pytree.tree_flatten(inputs)
    variables = {name: linearization.params[name] for name in names or linearization.params}
    in_dims = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)

    def jacobian(*sample: object) -> Tensors:
        batch_of_one = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in sample]
        rebuilt = pytree.tree_unflatten(batch_of_one, structure)

        def outputs(chosen: Tensors) -> Tensor:
            return linearization.forward(linearization.params | chosen, rebuilt).squeeze(0)

        return dict(jacrev(outputs)(variables))

    jacobians: Tensors | None = None
    with isolated_pass(linearization.module, linearization.device.type), sdpa_kernel(SDPBackend.MATH):
        try:
            jacobians = dict(vmap(jacobian, in_dims, chunk_size=_VMAP_CHUNK)(*leaves))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            reason = f"vmap does not support an operation of the network: {error}"
        else:
            reason = "vmap differentiates an operation of the network wrongly, as a plain backward pass shows."
    if jacobians is not None and _match_autograd(linearization, inputs, jacobians):
        return jacobians
    warnings.warn(
        f"Per-sample Jacobians are computed one sample at a time, which is slow, because {reason}", stacklevel=2
    )
    return _row_by_row(linearization, leaves, structure, list(variables))


def _match_autograd(linearization: Linearization, inputs: object, jacobians: Tensors) -> bool:
    """Whether J^T u, for a random u and every parameter, is what a plain backward pass gives."""
    first = next(iter(jacobians.values()))
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(first.shape[:2], generator=generator, dtype=torch.float64).to(first)
    expected = linearization.predict_and_vjp([cotangent], inputs)[1][0]
    tolerance = 1e4 * torch.finfo(first.dtype).eps
    close = []
    for name, block in jacobians.items():
        product = cotangent.flatten() @ block.reshape(block.shape[:2].numel(), -1)
        scale = (block.reshape(*cotangent.shape, -1).square().sum(2) * cotangent.square()).sum().sqrt()
        close.append((product - expected[name].flatten()).norm() <= tolerance * scale)
    return bool(torch.stack(close).all())


def _row_by_row(
    linearization: Linearization, leaves: list[object], structure: pytree.TreeSpec, names: Sequence[str]
) -> Tensors:
    batch = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
    samples = []
    for index in range(batch):
        sample = [leaf[index : index + 1] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        rebuilt = pytree.tree_unflatten(sample, structure)
        classes = linearization.predict(rebuilt).shape[1]
        basis = torch.eye(classes, dtype=linearization.dtype, device=linearization.device).unsqueeze(1)
        rows = linearization.predict_and_vjp(basis, rebuilt)[1]
        samples.append({name: torch.stack([row[name] for row in rows]) for name in names})
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def contract(first: Tensors, second: Tensors, dtype: torch.dtype | None = None) -> Tensor:
    """J1 J2^T, in `dtype`, for Jacobians `(B1, K, *shape)` and `(B2, K, *shape)` of every parameter: `(B1 K, B2 K)`."""
    total: Tensor | None = None
    for name, block in first.items():
        rows, columns = (
            jacobian.reshape(jacobian.shape[:2].numel(), -1).to(dtype) for jacobian in (block, second[name])
        )
        total = rows @ columns.T if total is None else total.addmm_(rows, columns.T)
    assert total is not None
    return total


def contraction_kernel(
    linearization: Linearization,
    rows: Reference,
    columns: Reference | None,
    *,
    num_outputs: int,
    memory_limit: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Tensor:
    """The kernel between two data sets, or of one with itself (half of the blocks computed, the others mirrored).

    Args:
        linearization: The network.
        rows: The first data set, N1 samples.
        columns: The second one, N2 samples, or None for the first one again.
        num_outputs: K.
        memory_limit: Bytes for the Jacobians of two blocks of samples.
        dtype: Type in which the products are summed. Default: that of the passes.
        device: Where the kernel is kept, tile by tile as it is made. Default: with the passes.
        progress: Whether to show a progress bar.
        processes: The processes that share the blocks; each one holds the whole kernel in the end.

    Returns:
        The kernel `(N1 K, N2 K)`, in `dtype`.
    """
    symmetric = columns is None
    columns = rows if columns is None else columns
    jacobian_size = num_outputs * linearization.num_parameters * linearization.dtype.itemsize
    # Blocks enough that every process has some.
    longest = max(1, min(len(rows), len(columns)) // processes.size)
    size = max(1, min(memory_limit // (2 * jacobian_size), longest))
    dtype = dtype or linearization.dtype
    device = device or linearization.device
    kernel = empty_matrix(len(rows) * num_outputs, len(columns) * num_outputs, dtype=dtype, device=device)
    blocks = [
        (i, j) for i in range(0, len(rows), size) for j in range(0, len(columns), size) if not symmetric or i <= j
    ]
    # Exact zeros where the blocks of other processes are, so that the sum is their copy.
    if processes.size > 1:
        kernel.zero_()
    own = processes.rows(len(blocks))
    blocks = blocks[own.start : own.stop]
    operations = _operations(
        blocks, size, (len(rows), len(columns)), symmetric, num_outputs, linearization.num_parameters
    )
    held: tuple[int, Tensors] | None = None
    with track_operations("kernel by contraction", total=sum(operations), enabled=progress) as advance:
        for (i, j), cost in zip(blocks, operations, strict=True):
            if held is None or held[0] != i:
                held = None  # freed before the next block is made
                held = (i, sample_jacobians(linearization, rows.read(i, i + size).inputs))
            first = held[1]
            same = symmetric and i == j
            second = first if same else sample_jacobians(linearization, columns.read(j, j + size).inputs)
            block = contract(first, second, dtype)
            block = mirror_upper_(block) if same else block
            at_row, at_column = i * num_outputs, j * num_outputs
            kernel[at_row : at_row + block.shape[0], at_column : at_column + block.shape[1]] = block
            if symmetric and i != j:
                kernel[at_column : at_column + block.shape[1], at_row : at_row + block.shape[0]] = block.T
            advance(cost)
    return processes.sum_(kernel)


def _operations(
    blocks: list[tuple[int, int]], size: int, samples: tuple[int, int], symmetric: bool, outputs: int, parameters: int
) -> list[float]:
    """Multiply-adds of every block: of its product, and of the Jacobians made for it."""
    operations, held = [], None
    for i, j in blocks:
        height, width = min(size, samples[0] - i), min(size, samples[1] - j)
        made = (height if held != i else 0) + (0 if symmetric and i == j else width)
        operations.append(float(outputs * parameters * (made * _JACOBIAN_COST + height * width * outputs)))
        held = i
    return operations
