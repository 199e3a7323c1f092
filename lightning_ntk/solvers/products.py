"""Products of the kernel with vectors, with or without the kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.shapes import Float

# Maps vectors `(T, N K)` to their products with the kernel, in float64.
Product = Callable[[Tensor], Tensor]

# Numbers of a float32 kernel that are widened to float64 at a time: few enough for the processor's cache.
_WIDENED_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


def kernel_product(kernel: Float[Tensor, "rows rows"], processes: Processes = ALONE) -> Product:
    """Products with a dense kernel `(N K, N K)`, shared by the processes.

    Each has some of its rows. They are exact for its numbers, whatever their type.

    A float32 kernel is widened piece by piece and never copied as a whole: products rounded to float32 would cost five
    digits of what Lanczos can give.
    """
    kernel = kernel.detach()
    own = processes.rows(len(kernel))
    part = kernel[own.start : own.stop]
    widened = _WIDENED_AT_ONCE.get(kernel.device.type, 2**18) // kernel.shape[1]
    blocks = torch.split(part, len(kernel) if kernel.dtype == torch.float64 else max(1, widened))

    def product(vectors: Tensor) -> Tensor:
        products = torch.cat([vectors @ block.to(vectors.dtype).T for block in blocks], dim=1)
        if processes.size == 1:
            return products
        joined = vectors.new_zeros(len(vectors), len(kernel))
        joined[:, own.start : own.stop] = products
        return processes.sum_(joined)

    return product


def jacobian_product(
    pull_back: Callable[[Tensor], Tensors], push_forward: Callable[[Tensors], Tensor], shape: torch.Size
) -> Product:
    """Products J (J^T v) without a kernel.

    They take one pass of vector-Jacobian products, and one of Jacobian-vector products per vector.

    `pull_back` maps cotangents `(T, N, K)` to J^T u, and `push_forward` a tangent v to J v, of the shape (N, K).
    """

    def product(vectors: Tensor) -> Tensor:
        with preserved_rng():
            pulled = pull_back(vectors.reshape(-1, *shape))
            pushed = [push_forward({n: value[i] for n, value in pulled.items()}) for i in range(len(vectors))]
        return torch.stack(pushed).flatten(1).to(vectors)

    return product
