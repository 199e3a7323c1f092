"""The empirical neural tangent kernel between two data sets."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Reference, Unpack
from lightning_ntk.kernel.assembly import structured_kernel
from lightning_ntk.kernel.per_sample import contraction_kernel
from lightning_ntk.linearization.linearization import Linearization, Predict
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.memory import format_bytes

# Share of the free memory that the factors and Jacobians of the blocks at work may take.
_DEFAULT_MEMORY_SHARE = 0.25


def empirical_ntk(
    module: nn.Module,
    x1: Data,
    x2: Data | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    method: Literal["auto", "structured", "contraction"] = "auto",
    batch_size: int = 256,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Tensor:
    r"""The empirical neural tangent kernel :math:`\Theta = J(x_1) J(x_2)^\top` (Jacot et al., 2018).

    Rows and columns are in sample-major order: row `n * K + k` belongs to output k of sample n.

    Args:
        module: The network, left as it is.
        x1: The first data set: a tensor of inputs, a tuple `(inputs, target)`, a Dataset or a DataLoader (in the order of
            its data set). Targets are not used.
        x2: The second data set. Default: the first one again, with half of the work.
        params: Weights to evaluate at, with the names of `module.named_parameters()`. Default: the module's own.
        predict: Maps `(module, inputs)` to outputs `(B, K)`. Default: `module(inputs)`.
        unpack: Maps one batch of a data set to `(inputs, target)`. Default: batches that are such pairs already.
        method: "structured" combines Gram matrices of layer inputs and output gradients, and multiplies per-sample Jacobians
            only for parameters that no rule covers; "contraction" multiplies those of all parameters, the plain reference.
            The kernel is the same. "auto" is "structured".
        batch_size: Samples in one forward pass.
        memory_limit: Bytes that may be used besides the kernel itself. Default: a quarter of the free memory.
        progress: Whether to show a progress bar.

    Returns:
        The kernel, `(N1 * K, N2 * K)`, in the floating-point type and on the device of the parameters.

    Raises:
        ValueError: If the data, the module or `params` cannot be used; the message says why.
        MemoryError: If the kernel does not fit into memory.

    Example:
        >>> inputs = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> empirical_ntk(torch.nn.Linear(2, 1, bias=False), inputs)
        tensor([[5., 2.],
                [2., 1.]])
    """
    linearization = Linearization(module, predict=predict, params=params)
    rows = Reference(x1, batch_size=batch_size, unpack=unpack)
    columns = None if x2 is None else Reference(x2, batch_size=batch_size, unpack=unpack)
    return compute_kernel(linearization, rows, columns, method=method, memory_limit=memory_limit, progress=progress)


def compute_kernel(
    linearization: Linearization,
    rows: Reference,
    columns: Reference | None = None,
    *,
    method: str = "auto",
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Tensor:
    """`empirical_ntk` of a linearization, `(N1 K, N2 K)`, its products summed in `dtype` and kept on `device`.

    Several processes share the work, and each holds the whole kernel.
    """
    if method not in ("auto", "structured", "contraction"):
        raise ValueError(f'Expected argument `method` to be "auto", "structured" or "contraction" but got {method!r}.')
    num_outputs = linearization.predict(rows.read(0, 1).inputs).shape[1]
    size = len(rows) * len(columns or rows) * num_outputs**2 * (dtype or linearization.dtype).itemsize
    free = processes.free_memory(device or linearization.device)
    if size > free:
        raise MemoryError(
            f"The kernel of {len(rows)} x {len(columns or rows)} samples with {num_outputs} outputs needs {format_bytes(size)} "
            f"but {format_bytes(free)} are free. Use fewer samples."
        )
    if memory_limit is None:
        elsewhere = device is not None and device != linearization.device
        spare = processes.free_memory(linearization.device) if elsewhere else free - size
        memory_limit = int(_DEFAULT_MEMORY_SHARE * spare)
    kernel = contraction_kernel if method == "contraction" else structured_kernel
    return kernel(
        linearization, rows, columns, num_outputs=num_outputs, memory_limit=memory_limit, dtype=dtype, device=device,
        progress=progress, processes=processes,
    )  # fmt: skip
