"""Trace and norm of a kernel from few vectors: exact where the basis is complete, else with intervals that hold."""

import pytest
import torch
from torch import Tensor

from lightning_ntk.functional import interval, kernel_moments, probe_vectors
from lightning_ntk.functional.trace import student_quantile
from tests.problems import LinearModel, make

SAMPLES, OUTPUTS = 33, 5


@pytest.fixture(scope="module")
def kernel() -> Tensor:
    module, inputs, _ = make("mlp", outputs=OUTPUTS, samples=SAMPLES)
    jacobian = LinearModel(module, inputs).jacobian
    return jacobian @ jacobian.T


def centered(kernel: Tensor) -> Tensor:
    centering = torch.kron(torch.eye(SAMPLES) - 1 / SAMPLES, torch.eye(OUTPUTS)).double()
    return centering @ kernel @ centering


def test_intervals_hold_in_at_least_93_percent_of_500_trials(kernel: Tensor) -> None:
    """With a sketch of eight images and 24 random vectors, as many as the panel has."""
    around = centered(kernel)
    true = torch.stack([f(k) for k in (kernel, around) for f in (torch.trace, torch.Tensor.norm)])
    ranks = [true[0] ** 2 / true[1] ** 2, true[2] ** 2 / true[3] ** 2]
    expected = [*true.tolist(), *torch.stack(ranks).tolist()]
    held, widths = torch.zeros(6), torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        images = (torch.randn(8, len(kernel), generator=generator).double() @ kernel).reshape(8, SAMPLES, OUTPUTS)
        vectors = probe_vectors(images, 24, generator)
        flat = vectors.vectors.flatten(1)
        gram = flat @ kernel @ flat.T
        own, other = vectors.moments(gram), vectors.centered_moments(gram)
        numbers = [own.trace, own.square.sqrt(), other.trace, other.square.sqrt()]
        numbers += [own.trace**2 / own.square, other.trace**2 / other.square]
        for i, values in enumerate(numbers):
            value, low, high = interval(values)
            held[i] += low <= expected[i] <= high
            widths[i] += (high - low) / value / 1000
    assert (held / 500 >= 0.93).all(), held / 500
    assert (widths < 0.35).all(), widths


def test_estimates_have_no_bias(kernel: Tensor) -> None:
    """The mean of many trials is the true number, within four standard errors."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2000):
        images = (torch.randn(2, len(kernel), generator=generator).double() @ kernel).reshape(2, SAMPLES, OUTPUTS)
        vectors = probe_vectors(images, 4, generator)
        flat = vectors.vectors.flatten(1)
        moments = [m(flat @ kernel @ flat.T) for m in (vectors.moments, vectors.centered_moments)]
        found.append(torch.stack([value[0] for pair in moments for value in pair]))
    around, values = centered(kernel), torch.stack(found)
    expected = torch.stack([kernel.trace(), kernel.square().sum(), around.trace(), around.square().sum()])
    assert ((values.mean(0) - expected).abs() < 4 * values.std(0) / 2000**0.5).all()


def test_leaving_a_vector_out_is_estimating_without_it(kernel: Tensor) -> None:
    vectors = torch.randn(9, len(kernel), generator=torch.Generator().manual_seed(2)).double()
    gram = vectors @ kernel @ vectors.T
    moments = kernel_moments(gram, 3)
    for left in range(6):
        kept = [i for i in range(9) if i != 3 + left]
        other = kernel_moments(gram[kept][:, kept], 3)
        for all_of_them, without in zip(moments, other, strict=True):
            assert all_of_them[1 + left].item() == pytest.approx(without[0].item(), rel=1e-12)


def test_quantiles_and_bad_arguments() -> None:
    tables = {2: 4.303, 3: 3.182, 9: 2.262, 23: 2.069, 1000: 1.962}
    assert {n: student_quantile(n) for n in tables} == pytest.approx(tables, rel=8e-3)
    with pytest.raises(ValueError, match="at least 3 random vectors"):
        probe_vectors(torch.ones(1, 4, 2), 2, torch.Generator())
