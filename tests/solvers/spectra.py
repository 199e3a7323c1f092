"""Kernels with known spectra, J = Q sqrt(lambda), and Lanczos on them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_ntk.solvers.base import Modes
from lightning_ntk.solvers.lanczos import LanczosModes, LanczosProcess, extend
from lightning_ntk.solvers.products import Product, kernel_product

DTYPE = torch.float64


class Case:
    """A kernel with a known spectrum, J = Q sqrt(lambda) and a residual."""

    def __init__(self, eigenvalues: Tensor, residual: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = len(eigenvalues)
        rotation = torch.linalg.qr(torch.randn(size, size, dtype=DTYPE, generator=generator))[0]
        self.jacobian = rotation * eigenvalues.sqrt()
        self.kernel = self.jacobian @ self.jacobian.T
        self.residual = rotation @ residual

    def weights(self, modes: Modes, filtered: Tensor) -> Tensor:
        return self.jacobian.T @ modes.coefficients(filtered)

    def modes(self, products: int) -> LanczosModes:
        return advance(LanczosProcess(self.residual), kernel_product(self.kernel), products).modes()


def advance(lanczos: LanczosProcess, product: Product, products: int) -> LanczosProcess:
    for _ in range(products):
        extend([lanczos], product)
    return lanczos


def decaying(size: int = 60, decades: float = 6.0) -> Case:
    generator = torch.Generator().manual_seed(1)
    eigenvalues = torch.logspace(0, -decades, size, dtype=DTYPE)
    return Case(eigenvalues, torch.randn(size, dtype=DTYPE, generator=generator))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Spectra with decay, exact zeros, duplicates and clusters; residuals dense, sparse or aligned with few modes."""
    size = draw(st.integers(2, 60))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    decades = draw(st.floats(0.0, 9.0))
    eigenvalues = torch.logspace(0, -decades, size, dtype=DTYPE)
    kind = draw(st.sampled_from(["decay", "zeros", "duplicates", "clusters", "outlier"]))
    if kind == "zeros":
        eigenvalues[size // 2 :] = 0
    elif kind == "duplicates":
        eigenvalues = eigenvalues[:: max(1, size // 4)].repeat_interleave(max(1, size // 4))[:size]
    elif kind == "clusters":
        eigenvalues = eigenvalues[torch.arange(size) // 5 * 5] * (1 + 1e-9 * torch.arange(size))
    elif kind == "outlier":
        eigenvalues[0] = 100
    residual = torch.randn(len(eigenvalues), dtype=DTYPE, generator=generator)
    residual = residual * draw(st.sampled_from([1e-6, 1.0, 1e5]))
    alignment = draw(st.sampled_from(["dense", "sparse", "decaying"]))
    if alignment == "sparse":
        residual = residual * (torch.rand(len(eigenvalues), generator=generator) < 0.3)
        residual[-1] += 1e-3
    elif alignment == "decaying":
        residual = residual * (eigenvalues + 1e-6)
    return Case(eigenvalues, residual, seed)
