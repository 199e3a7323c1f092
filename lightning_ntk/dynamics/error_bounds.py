r"""Bounds on the error of computed linearized weights.

The errors are those of Lanczos's truncation and of rounding.

Passes that compute :math:`J + \delta J` instead of :math:`J = U S V^\top` change the kernel by
:math:`E = \delta J J^\top + J \delta J^\top`, and rounding of the kernel's entries by an E of its own. To first order, with
the divided differences :math:`D_{ij} = (\phi(\lambda_i) - \phi(\lambda_j)) / (\lambda_i - \lambda_j)` of the filter
(Daleckii & Krein; Higham, *Functions of Matrices*, 2008, section 3.2),

.. math:: \delta w = -\delta J^\top a - J^\top U (D \circ U^\top E U)\, \tilde r - J^\top U \phi(\lambda)\, U^\top \delta r

is the error of the weights :math:`w_0 + J^\top a`, :math:`a = -U \phi \tilde r`. Component i of the middle term in V is
:math:`s_i \sum_j D_{ij} (U^\top E U)_{ij} \tilde r_j`. With :math:`|\delta J v| = \epsilon_f`,
:math:`|\delta J^\top u| = \epsilon_b` and :math:`|E u| = \epsilon_k` for vectors of norm 1, as
`lightning_ntk.solvers.rounding` measures them,

.. math::

    |\delta w| \lesssim \epsilon_b |a|
    + \max_i s_i \big(\epsilon_f |D_i \circ s \circ \tilde r| + (\epsilon_b s_i + \epsilon_k) |D_i \circ \tilde r|\big)
    + \max_i s_i |\phi_i| \, |\delta r|.

Without a kernel, every product has a :math:`\delta J` of its own, and the tangents :math:`J^\top v_l` of the Lanczos vectors
:math:`v_l`, of norms :math:`\sqrt{(T_k)_{ll}}`, do not cancel in the first norm:
:math:`\sqrt{\sum_l (T_k)_{ll} (U (D_i \circ \tilde r))_l^2}`. float64 itself adds a few roundings. The sum is an estimate, for
measured norms are those of a few directions and the order is the first; it is multiplied by `SAFETY`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Filters
from lightning_ntk.solvers.base import ErrorBound, Modes
from lightning_ntk.solvers.lanczos import LanczosModes
from lightning_ntk.solvers.rounding import Rounding
from lightning_ntk.utilities.shapes import Float64, Int

SAFETY = 4.0
"""Factor between the estimate of the rounding and its bound; at most 1.1 was needed in 2000 measurements."""

# Roundings of float64 in a product with J and in one with the kernel, in units of the largest singular value and eigenvalue.
_JACOBIAN_ROUNDINGS = 2
_KERNEL_ROUNDINGS = 0.5
# Rows of the divided differences, at logarithmic ranks of the eigenvalues.
_ROWS = 64


def error_bound(
    modes: Sequence[Modes],
    filters: Filters,
    slopes: Sequence[Float64[Tensor, "_"]],
    truncations: Sequence[float],
    rounding: Rounding,
    norms: Sequence[float] = (),
    *,
    steps: int = 0,
) -> ErrorBound:
    """Bounds the error of weights.

    It sums over the residual and the carried vectors.

    The displacement is that of orthogonal parts: parts in different Krylov spaces cannot be added up by their Ritz values.

    Args:
        modes: The modes of the residual and of every carried vector.
        filters: The filters on these modes.
        slopes: The derivatives of the filters in the eigenvalue, each `(m,)`.
        truncations: The truncation error of each part.
        rounding: The errors of the passes.
        norms: The norms of the carried vectors.
        steps: The steps of a recurrence, each of which rounds the coefficients of the carried vectors.
    """
    # |J^T a|, from the eigenvalues alone.
    sizes = [
        (m.eigenvalues.clamp_min(0).sqrt() * values * m.coordinates).norm().item()
        for m, values in zip(modes, filters.values, strict=True)
    ]
    carried = list(zip(filters.scales, norms, strict=True))
    size = math.hypot(*sizes, *(scale * norm for scale, norm in carried))
    if size == 0:
        return ErrorBound(0.0, 0.0, 0.0)
    total = rounding.weights
    total += steps * torch.finfo(torch.float64).eps * sum((1 + abs(scale)) * norm for scale, norm in carried)
    errors = (rounding.outputs, *(rounding.forward * norm for norm in norms))
    for m, values, derivative, error in zip(modes, filters.values, slopes, errors, strict=True):
        total += _rounding_bound(m, values, derivative, rounding._replace(outputs=error))
    return ErrorBound(sum(truncations), total, size)


def _rounding_bound(modes: Modes, values: Tensor, slopes: Tensor, rounding: Rounding) -> float:
    """Bounds the effect of rounding on one vector's part of the weights.

    `rounding.outputs` is the error of that vector.
    """
    eigenvalues = modes.eigenvalues.clamp_min(0)
    singular, driven = eigenvalues.sqrt(), modes.coordinates
    unit = torch.finfo(torch.float64).eps
    forward = max(rounding.forward, _JACOBIAN_ROUNDINGS * unit * singular[-1].item())
    backward = max(rounding.backward, _JACOBIAN_ROUNDINGS * unit * singular[-1].item())
    entries = rounding.kernel + _KERNEL_ROUNDINGS * unit * eigenvalues[-1].item()
    rows = _logarithmic_ranks(len(eigenvalues))
    differences = divided_differences(eigenvalues, values, slopes, rows)
    pulled = (differences * driven).norm(dim=1)
    if rounding.independent and isinstance(modes, LanczosModes):
        pushed = ((differences * driven) @ modes.rotation.T * modes.diagonal.sqrt()).norm(dim=1)
    else:
        pushed = (differences * (singular * driven)).norm(dim=1)
    own = singular[rows]
    middle = own * (forward * pushed + (backward * own + entries) * pulled)
    first = backward * (values * driven).norm() + rounding.outputs * (singular * values).abs().max()
    bound = SAFETY * (first + middle.max()).item()
    return bound if math.isfinite(bound) else math.inf


def left_out(modes: Modes, cutoff: float, rounding: Rounding) -> float:
    r"""What the cutoff may leave out of the weights at t = infinity.

    An eigenvalue that counts as zero for the passes may be one that float64 would tell from zero. Its mode would move
    the weights by :math:`|\tilde r_i| / s_i`, with the least :math:`s_i` that the errors of the passes allow: infinitely far
    where that is zero. What a Krylov space does not hold, in passes that are not in float64, is not known at all.
    """
    zero = modes.cutoff(torch.float64)
    eigenvalues, singular = modes.eigenvalues, modes.eigenvalues.clamp_min(0).sqrt()
    entries = rounding.kernel + (rounding.forward * singular[-1].item() if rounding.independent else 0.0)
    if cutoff <= zero >= entries:
        return 0.0
    if isinstance(modes, LanczosModes) and modes.next_curvature > 0:
        return math.inf
    doubtful = (eigenvalues <= cutoff) & ((eigenvalues > zero) | torch.tensor(entries > zero))
    least = (singular - SAFETY * rounding.backward).clamp_min(0).square() - SAFETY * entries
    hidden = (modes.coordinates / least.clamp_min(0).sqrt())[doubtful]
    return float(hidden.nan_to_num(0, math.inf, math.inf).norm())


def divided_differences(
    eigenvalues: Float64[Tensor, "m"],
    values: Float64[Tensor, "m"],
    slopes: Float64[Tensor, "m"],
    rows: Int[Tensor, "R"],
) -> Float64[Tensor, "R m"]:
    """Computes |phi_i - phi_j| / |lambda_i - lambda_j| for i in `rows`.

    It uses the mean slope where the values are too close to subtract.
    """
    distance = (eigenvalues[rows].unsqueeze(1) - eigenvalues).abs()
    change = (values[rows].unsqueeze(1) - values).abs()
    mean = (slopes[rows].abs().unsqueeze(1) + slopes.abs()) / 2
    close = (change <= 1e-7 * (values[rows].abs().unsqueeze(1) + values.abs())) | (distance == 0)
    return torch.where(close, mean, change / distance.masked_fill(close, 1))


def _logarithmic_ranks(count: int) -> Tensor:
    """Selects indices into ascending eigenvalues.

    It takes all if there are few. Of many it takes the largest densely and the smaller ones sparsely.
    """
    if count <= _ROWS:
        return torch.arange(count)
    ranks = sorted({round(count ** (i / (_ROWS - 1))) for i in range(_ROWS)})
    return count - torch.tensor(ranks)
