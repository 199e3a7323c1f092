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
    true = torch.stack([f(k) for k in (kernel, around) for f in (torch.trace, lambda k: k.square().sum())])
    ranks = [true[0] ** 2 / true[1], true[2] ** 2 / true[3]]
    expected = [*true.tolist(), *torch.stack(ranks).tolist()]
    held, widths = torch.zeros(6), torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        images = (torch.randn(8, len(kernel), generator=generator).double() @ kernel).reshape(8, SAMPLES, OUTPUTS)
        vectors = probe_vectors(images, 24, generator)
        flat = vectors.vectors.flatten(1)
        gram = flat @ kernel @ flat.T
        both = vectors.moments(gram), vectors.centered_moments(gram)
        intervals = [
            interval(values, known)
            for own in both
            for values, known in ((own.trace, own.known_trace), (own.square, own.known_square))
        ]
        intervals += [interval(own.trace**2 / own.square) for own in both]
        for i, (value, low, high) in enumerate(intervals):
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
        found.append(torch.stack([value[0] for pair in moments for value in pair[:2]]))
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
        for all_of_them, without in zip(moments[:2], other[:2], strict=True):
            assert all_of_them[1 + left].item() == pytest.approx(without[0].item(), rel=1e-12)


def test_heavy_tails_widen_the_interval() -> None:
    """The interval of a remainder ends at what is known, and one far value of many has fewer degrees of freedom."""
    even = torch.tensor([0.0, *(0.01, -0.01) * 12], dtype=torch.float64).exp()
    far = torch.zeros(25, dtype=torch.float64)
    far[1] = -0.01 * 24 / 23**0.5
    spread = [logs[1:].std(correction=0).item() for logs in (even.log(), far)]
    assert spread == pytest.approx([0.01, 0.01])
    widths = [found.high - found.low for found in map(interval, (even, far.exp()))]
    assert widths[1] > 1.5 * widths[0]
    value, low, high = interval(even * 1e-3 + 5, known=5.0)
    assert 5 < low < value < high < 5.002


def test_quantiles_and_bad_arguments() -> None:
    tables = {2: 4.303, 3: 3.182, 9: 2.262, 23: 2.069, 1000: 1.962}
    assert {n: student_quantile(n) for n in tables} == pytest.approx(tables, rel=8e-3)
    with pytest.raises(ValueError, match="at least 3 random vectors"):
        probe_vectors(torch.ones(1, 4, 2), 2, torch.Generator())
