r"""Trace and Frobenius norm of a kernel, estimated from a few vectors.

The kernel is :math:`\Theta = J J^\top`; estimates have 95 % intervals.

Hutch++ (Meyer, Musco, Musco & Woodruff, 2021) is exact on a space that holds the large eigenvalues and estimates the rest with
random vectors. Here the vectors are pulled back once, :math:`g_i = J^\top v_i`, and their Gram matrix, of all parameters or of
one layer, holds trace and norm of the kernel, or of that layer's kernel.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.utilities.representation import represent_fields
from lightning_ntk.utilities.shapes import Float, Float64

# The 97.5 % quantile of the normal distribution.
_QUANTILE = 1.959963984540054
# Directions that are this small beside the largest are rounding.
_ROUNDING = 1e-10
_LEAST_VECTORS = 3


class Estimate(NamedTuple):
    """A number and its 95 % interval.

    The interval of an exact number is the number itself.
    """

    value: float
    low: float
    high: float

    def scalars(self, name: str) -> dict[str, float]:
        """The three numbers as `name`, `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


class KernelMoments(NamedTuple):
    """Estimates of a kernel's trace and squared Frobenius norm.

    The first estimate uses all random vectors; each other one leaves out one vector.

    Attributes:
        trace: 1 + m estimates in float64: from all m random vectors, then without the first, the second, ...
        square: The squared Frobenius norm, likewise.
        known_trace: The part of the trace that needs no estimate: that of the basis.
        known_square: The part of the squared norm, likewise.
    """

    trace: Float64[Tensor, "estimates"]
    square: Float64[Tensor, "estimates"]
    known_trace: float
    known_square: float

    def __repr__(self) -> str:
        return represent_fields(self, self._fields)


class ProbeVectors(NamedTuple):
    """Vectors on which a kernel is probed.

    They are an orthonormal basis of a small space, and random vectors orthogonal to it.

    Attributes:
        vectors: `(R, N, K)`, in this order: those of the space with mean zero over the samples, those of it that are constant
            over the samples, the centered parts of the random vectors, and their constant parts, which may be missing.
        centered: The number of the first kind.
        constant: The number of the second kind.
        random: m, the number of random vectors; 0 where the basis is complete, so that nothing is estimated.
    """

    vectors: Float64[Tensor, "R N K"]
    centered: int
    constant: int
    random: int

    def moments(self, gram: Float[Tensor, "R R"]) -> KernelMoments:
        r"""Trace and norm of :math:`\Theta`.

        Args:
            gram: :math:`v_i^\top \Theta v_j`, `(R, R)` in float64 on the CPU.
        """
        known, split = self.centered + self.constant, self.centered + self.constant + self.random
        if len(gram) > split:  # the constant parts of the random vectors
            total = gram[:, known:split] + gram[:, split:]
            both = torch.cat([gram[:, :known], total], dim=1)
            gram = torch.cat([both[:known], both[known:split] + both[split:]])
        return kernel_moments(gram, known)

    def centered_moments(self, gram: Float[Tensor, "R R"]) -> KernelMoments:
        r"""Estimates trace and norm of the centered kernel (Cortes et al., 2012).

        The kernel :math:`H \Theta H` is centered over the samples.
        """
        start = self.centered + self.constant
        kept = [*range(self.centered), *range(start, start + self.random)]
        return kernel_moments(gram[kept][:, kept], self.centered)

    def __repr__(self) -> str:
        return represent_fields(self, self._fields)


def probe_vectors(images: Float[Tensor, "T N K"], random: int, generator: torch.Generator) -> ProbeVectors:
    r"""Chooses the vectors on which to probe a kernel.

    Args:
        images: Images of some vectors under the kernel, `(T, N, K)`: they span the space on which the estimates are exact.
            Products that Lanczos has made anyway serve as well as the random sketch of Hutch++ (Chen & Hallman, 2023).
        random: The number of random vectors, at least 3.
        generator: Draws their signs, on the CPU.

    Raises:
        ValueError: If there are fewer than 3 random vectors, without which there is no interval.
    """
    if random < _LEAST_VECTORS:
        raise ValueError(f"Expected at least {_LEAST_VECTORS} random vectors but got {random}.")
    images = images.double().cpu()
    samples, outputs = images.shape[1:]
    means = images.mean(1)
    constant, centered = _basis(means), _basis((images - means.unsqueeze(1)).flatten(1))
    if len(constant) + len(centered) + random >= samples * outputs:
        # The columns of a Householder matrix whose first is constant.
        square, _ = torch.linalg.qr(torch.cat([torch.ones(samples, 1), torch.eye(samples)[:, 1:]], 1).double())
        units = torch.eye(outputs, dtype=torch.float64)
        complete = torch.einsum("nm,kl->mlnk", square, units).flatten(0, 1)
        return ProbeVectors(torch.cat([complete[outputs:], complete[:outputs]]), (samples - 1) * outputs, outputs, 0)
    signs = torch.randint(0, 2, (random, samples, outputs), generator=generator).double() * 2 - 1
    level = signs.mean(1)
    around = (signs - level.unsqueeze(1)).flatten(1)
    around = around - (around @ centered.T) @ centered
    parts = [centered.reshape(-1, samples, outputs), _lifted(constant, samples) / math.sqrt(samples)]
    parts.append(around.reshape(-1, samples, outputs))
    if len(constant) < outputs:
        parts.append(_lifted(level - (level @ constant.T) @ constant, samples))
    return ProbeVectors(torch.cat(parts), len(centered), len(constant), random)


def kernel_moments(gram: Float[Tensor, "R R"], known: int) -> KernelMoments:
    r"""Estimates a kernel's trace and squared norm from a Gram matrix.

    The Gram matrix is that of pulled-back vectors. The norm is the Frobenius norm.

    With Q an orthonormal basis and z random vectors with :math:`E z z^\top = I - Q Q^\top`,

    .. math::
        \operatorname{tr} \Theta &= \operatorname{tr} Q^\top \Theta Q + E\, z^\top \Theta z \\
        \|\Theta\|^2 &= \|Q^\top \Theta Q\|^2 + 2 E \|Q^\top \Theta z\|^2 + E (z^\top \Theta z')^2,

    where the last mean is over pairs of different vectors. Both are unbiased.

    Args:
        gram: :math:`v_i^\top \Theta v_j`, `(R, R)`: the basis first, the random vectors after it.
        known: The number of vectors of the basis.

    Example:
        >>> moments = kernel_moments(torch.diag(torch.tensor([2.0, 1.0])), known=2)
        >>> moments.trace, moments.square  # of a complete basis
        (tensor([3.], dtype=torch.float64), tensor([5.], dtype=torch.float64))
        >>> moments.known_trace, moments.known_square
        (3.0, 5.0)
    """
    gram = gram.double()
    inner, cross, rest = gram[:known, :known], gram[:known, known:], gram[known:, known:]
    trace, square, count = inner.trace(), inner.square().sum(), len(rest)
    known_parts = trace.item(), square.item()
    if count == 0:
        return KernelMoments(trace.reshape(1), square.reshape(1), *known_parts)
    diagonal, crossed = rest.diagonal(), cross.square().sum(0)
    pairs = (rest - torch.diag(diagonal)).square().sum(0)
    weights = torch.cat([torch.ones(1, count), 1 - torch.eye(count)]).double()  # one row for each set of vectors
    left = weights.sum(1)
    # A pair is counted from both ends: leaving one vector out takes away its pairs twice.
    paired = pairs.sum() - 2 * (1 - weights) @ pairs
    return KernelMoments(
        trace + weights @ diagonal / left,
        square + 2 * weights @ crossed / left + paired / (left * (left - 1)),
        *known_parts,
    )


def interval(values: Float[Tensor, "estimates"], known: float = 0.0) -> Estimate:
    r"""Computes a 95 % interval of a positive quantity by the jackknife.

    The interval is symmetric in the logarithm of what is estimated, since estimates of squares are skewed. Student's t has
    fewer degrees of freedom where the m values without a vector have heavy tails: with their excess kurtosis
    :math:`\kappa`, a variance of m values is as certain as one of :math:`2 / (2 / (m - 1) + \kappa / m)` degrees.

    Args:
        values: 1 + m estimates: the quantity from all m random vectors, then without each one; the quantity alone if it is exact.
        known: The part of the quantity that is not estimated.
    """
    value, count = values[0].item(), len(values) - 1
    if count == 0 or value <= known:
        return Estimate(value, value, value)
    logs = (values - known).clamp_min(torch.finfo(values.dtype).tiny).log()[1:]
    squares = (logs - logs.mean()).square()
    if not (variance := squares.mean().item()):
        return Estimate(value, value, value)
    kurtosis = max(squares.square().mean().item() / variance**2 - 3, 0.0)
    degrees = max(2 / (2 / (count - 1) + kurtosis / count), 2.0)
    factor = math.exp(student_quantile(degrees) * math.sqrt(variance * (count - 1)))
    return Estimate(value, known + (value - known) / factor, known + (value - known) * factor)


def student_quantile(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, two degrees of freedom or more.

    See Abramowitz & Stegun (1964, 26.7.5).

    Example:
        >>> round(student_quantile(15), 3)
        2.131
    """
    z, n = _QUANTILE, degrees
    terms = [
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    ]
    return z + math.fsum(term / n**power for power, term in enumerate(terms, 1))


def gram_matrices(pulled: Mapping[str, Float[Tensor, "R ..."]]) -> dict[str, Float64[Tensor, "R R"]]:
    """Computes the Gram matrices `(R, R)` of vectors `(R, *shape)`, by parameter.

    They are in float64 on the CPU.
    """
    flat = {name: values.flatten(1).double() for name, values in pulled.items()}
    return {name: (values @ values.T).cpu() for name, values in flat.items()}


def _basis(rows: Tensor) -> Tensor:
    """An orthonormal basis `(r, D)` of the span of rows `(T, D)`."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = sizes > _ROUNDING * sizes.max().clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.masked_select(basis, kept.unsqueeze(1)).reshape(-1, rows.shape[1])


def _lifted(levels: Tensor, samples: int) -> Tensor:
    """Vectors `(T, N, K)` that are the same for all samples."""
    return levels.unsqueeze(1).expand(-1, samples, -1)
