"""The empirical neural tangent kernel between two data sets."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Reference, Unpack
from lightning_ntk.kernel.assembly import assemble
from lightning_ntk.kernel.plan import PlanChangedError
from lightning_ntk.kernel.planning import make_plan, verify
from lightning_ntk.linearization.linearization import Linearization, Predict
from lightning_ntk.linearization.verification import check_samples
from lightning_ntk.utilities.contexts import full_precision, preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.memory import format_bytes
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.user_warnings import warn_user
from lightning_ntk.utilities.validation import require_choice, require_instance, require_integer, require_number

Method: TypeAlias = Literal["auto", "structured", "contraction"]

# Share of the free memory that the factors and Jacobians of the blocks at work may take.
_DEFAULT_MEMORY_SHARE = 0.25


@preserved_rng()
def empirical_ntk(
    module: nn.Module,
    x1: Data,
    x2: Data | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    method: Method = "auto",
    batch_size: int = 256,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "rows columns"]:
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
    if memory_limit is not None:
        require_integer("memory_limit", memory_limit, least=1)
    linearization = Linearization(module, predict=predict, params=params)
    rows = Reference(x1, batch_size=batch_size, unpack=unpack)
    columns = None if x2 is None else Reference(x2, batch_size=batch_size, unpack=unpack)
    for data in (rows, columns):
        if data is not None:
            check_samples(linearization, data)
    return compute_kernel(linearization, rows, columns, method=method, memory_limit=memory_limit, progress=progress)


class Operations(NamedTuple):
    """Floating-point operations, two for a multiply-add of a long matrix product.

    Attributes:
        kernel: The kernel, from the passes to its last product.
        forward: One forward pass over its data.
    """

    kernel: float
    forward: float


class PlannedKernel:
    r"""A kernel :math:`J(x_1) D J(x_2)^\top` that knows what it costs before it is computed.

    Args:
        linearization: The network.
        rows: The first data set.
        columns: The second one. Default: the first one again, with half of the work.
        method: As for `empirical_ntk`.
        lr_scales: The diagonal matrix D: a factor for each parameter, by name, for learning rates that differ. Parameters
            without one have 1; 0 leaves a parameter out, without any work for it.

    Raises:
        ValueError: If an argument cannot be used, or if the outputs depend on no parameter that is left.

    Example:
        >>> linearization = Linearization(torch.nn.Linear(3, 2))
        >>> planned = PlannedKernel(linearization, Reference(torch.ones(10, 3)), lr_scales={"bias": 0.0})
        >>> planned.operations.forward  # two per weight and sample
        120.0
        >>> planned.compute()[0, :2]
        tensor([3., 0.])
    """

    def __init__(
        self,
        linearization: Linearization,
        rows: Reference,
        columns: Reference | None = None,
        *,
        method: Method = "auto",
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        require_choice("method", method, Method)
        scales = complete_scales(lr_scales or {}, linearization.params)
        roots = {name: math.sqrt(scale) for name, scale in scales.items() if scale}
        linearization = linearization.restricted(list(roots))
        self._plan = make_plan(linearization, rows, columns, structured=method != "contraction", roots=roots)

    @property
    def operations(self) -> Operations:
        """Floating-point operations of the kernel, and of a forward pass over its data."""
        samples, pairs = self._plan.size
        return Operations(2 * self._plan.cost.total(samples, pairs), 2 * samples * self._plan.cost.forward)

    def compute(
        self,
        *,
        memory_limit: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        progress: bool = False,
        processes: Processes = ALONE,
    ) -> Float[Tensor, "rows columns"]:
        """The kernel `(N1 K, N2 K)`.

        Args:
            memory_limit: As for `empirical_ntk`.
            dtype: Type in which the products are summed. Default: that of the passes.
            device: Where the kernel is kept. Default: with the passes.
            progress: Whether to show a progress bar.
            processes: The processes that share the work; each one holds the whole kernel in the end.

        Raises:
            MemoryError: If the kernel does not fit into memory.

        Warns:
            UserWarning: If a rule disagrees with plain autograd; its parameters are then contracted.
        """
        with full_precision(self._plan.linearization.device.type):
            return self._compute(memory_limit, dtype, device, progress, processes)

    def _compute(
        self,
        memory_limit: int | None,
        dtype: torch.dtype | None,
        device: torch.device | None,
        progress: bool,
        processes: Processes,
    ) -> Tensor:
        plan, linearization = self._plan, self._plan.linearization
        dtype, device = dtype or linearization.dtype, device or linearization.device
        rows, columns = len(plan.rows), len(plan.columns or plan.rows)
        size = rows * columns * plan.outputs**2 * dtype.itemsize
        free = processes.free_memory(device)
        if size > free:
            raise MemoryError(
                f"The kernel of {rows} x {columns} samples with {plan.outputs} outputs needs {format_bytes(size)} "
                f"but {format_bytes(free)} are free. Use fewer samples."
            )
        if memory_limit is None:
            spare = free - size if device == linearization.device else processes.free_memory(linearization.device)
            memory_limit = int(_DEFAULT_MEMORY_SHARE * spare)
        assembled = partial(
            assemble, memory_limit=memory_limit, dtype=dtype, device=device, progress=progress, processes=processes
        )
        try:
            with processes.agreement():
                return _finite(assembled(verify(plan)), plan.outputs)
        except PlanChangedError as reason:
            warn_user(f"{reason} The whole kernel is computed by contraction instead.")
        with processes.agreement():
            return _finite(assembled(plan.contract(linearization.params)), plan.outputs)

    def __repr__(self) -> str:
        columns = self._plan.rows if self._plan.columns is None else self._plan.columns
        return represent(self, f"{len(self._plan.rows)} by {len(columns)} samples", f"{self.operations}")


def compute_kernel(
    linearization: Linearization,
    rows: Reference,
    columns: Reference | None = None,
    *,
    method: Method = "auto",
    lr_scales: Mapping[str, float] | None = None,
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Float[Tensor, "rows columns"]:
    r"""The kernel :math:`J(x_1) D J(x_2)^\top` of a linearization, `(N1 K, N2 K)`.

    The arguments are those of `PlannedKernel` and of its method `compute`.

    Example:
        >>> linearization, data = Linearization(torch.nn.Linear(2, 1)), Reference(torch.eye(2))
        >>> compute_kernel(linearization, data, lr_scales={"bias": 0.5})
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """
    planned = PlannedKernel(linearization, rows, columns, method=method, lr_scales=lr_scales)
    return planned.compute(
        memory_limit=memory_limit, dtype=dtype, device=device, progress=progress, processes=processes
    )


def _finite(kernel: Tensor, outputs: int) -> Tensor:
    """Returns the kernel; a ValueError if a Jacobian is not finite.

    This shows in each of its products.
    """
    if kernel.is_meta:  # there are no numbers
        return kernel
    for name, products in (("first", kernel[:, 0]), ("second", kernel[0])):
        if not products.isfinite().all():
            sample = int(products.isfinite().int().argmin()) // outputs
            raise ValueError(
                f"Expected finite Jacobians but that of sample {sample} of the {name} data set, or its product with another, "
                "has NaN or infinity. Check inputs and weights."
            )
    return kernel


def count_operations(linearization: Linearization, reference: Reference) -> Operations:
    """Counts the operations of a data set's kernel, without computing it.

    The count is that of the kernel's plan.
    """
    return PlannedKernel(linearization, reference).operations


def complete_scales(given: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Completes `lr_scales` with 1 for parameters that are not given.

    Raises a ValueError for scales that cannot be used.
    """
    scales = dict.fromkeys(names, 1.0)
    require_instance("lr_scales", given, Mapping, "a dict of numbers by parameter")
    if unknown := sorted(given.keys() - scales.keys()):
        raise ValueError(
            f"Expected argument `lr_scales` to name trainable parameters, {sorted(scales)}, but got {unknown}."
        )
    for name, scale in given.items():
        require_number("lr_scales", scale, "a dict of numbers by parameter")
        if not 0 <= scale < math.inf:
            raise ValueError(f"Expected argument `lr_scales` to be finite and at least 0 but got {scale} for {name!r}.")
        scales[name] = float(scale)
    if not any(scales.values()):
        raise ValueError("Expected argument `lr_scales` to leave a parameter to train but all multiples are 0.")
    return scales
