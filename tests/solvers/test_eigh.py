"""The complete eigendecomposition, with signs that do not depend on the machine."""

import torch

from lightning_ntk.solvers.base import ErrorBound, Solved
from lightning_ntk.solvers.eigh import CompleteModes, eigh_modes


def test_modes_reproduce_kernel_and_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    factor, first, second = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (5, 1, 1))
    kernel = factor.T @ factor
    modes, other = eigh_modes(kernel, first[0], second[0])
    torch.testing.assert_close(modes.basis * modes.eigenvalues @ modes.basis.T, kernel)
    torch.testing.assert_close(modes.expand(modes.coordinates), first[0])
    torch.testing.assert_close(other.expand(other.coordinates), second[0])
    assert other.basis is modes.basis


def test_the_residual_has_no_negative_coordinate() -> None:
    kernel = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    residual = torch.tensor([-1.0, 0.0, 2.0, -3.0], dtype=torch.float64)
    modes, other = eigh_modes(kernel, residual, torch.ones(4))
    assert modes.coordinates.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert other.coordinates.tolist() == [-1.0, 1.0, 1.0, -1.0]
    assert modes.basis.tolist() == torch.diag(torch.tensor([-1.0, 1.0, 1.0, -1.0])).tolist()


def test_complete_modes_answer_at_once() -> None:
    solver = CompleteModes(torch.eye(4), [torch.ones(2, 2)])
    calls = []
    solved = Solved(None, lambda: ErrorBound(0.0, 1.0, 2.0))
    assert solver.refine(lambda modes: calls.append(modes) or solved) is solved
    assert (len(calls), solver.largest_eigenvalue) == (1, 1.0)
    assert (solved.products, solved.stopped, solved.bound.relative) == (0, "complete", 0.5)
