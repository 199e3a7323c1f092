r"""What Lanczos leaves out of the weights: rigorous bounds.

Lanczos leaves :math:`\Theta a_k + r` with a part :math:`\beta_k |r| y_k v_{k+1}` outside its space, where
:math:`y_k(s) = e_k^\top \phi_s(T_k) e_1`. This defect drives the error of the weights, and since
:math:`|J^\top (I - \eta\Theta)^n v| \le |J^\top v|` as long as :math:`\eta\lambda \le 2`,

.. math:: |w_k(t) - w_\text{lin}(t)| \le \beta_k |r| \sqrt{\alpha_{k+1}} \; \eta \sum_{s<t} |y_k(s)|

for gradient descent: the error obeys :math:`e_{s+1} = (I - \eta\Theta) e_s - \eta\beta_k |r| y_k(s) v_{k+1}`. Gradient flow
has the integral :math:`\int_0^{\eta t} |y_k| ds` (Saad, 1992; Hochbruck & Lubich, 1997; Druskin & Knizhnerman, 1989). At
rates with :math:`\eta\lambda_\text{max} > 2` a step magnifies earlier errors by :math:`\eta\lambda_\text{max} - 1`.

Two facts make this cheap. First, :math:`y_k(s) = 0` for s < k in gradient descent: after k products, k steps are exact.
Second, :math:`y_k` keeps its sign, so that the sum of absolute values is the absolute value of the sum,
:math:`|e_k^\top \Psi_t(T_k) e_1|` with :math:`\Psi_t(\lambda) = (\eta t - \phi_t(\lambda)) / \lambda`. For with
:math:`S = \text{diag}(1, -1, 1, \ldots)` the matrix :math:`-S T_k S` is nowhere negative off its diagonal, hence
:math:`S e^{-sT_k} S` nowhere at all; nor is :math:`S (I - \eta T_k)^s S` as long as :math:`\eta\alpha_j \le 1` for all j. At
larger rates the steps are summed one by one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Filters, gradient_descent_filter, gradient_flow_filter, minimum_norm_filter
from lightning_ntk.dynamics.sgd import LinearSGD, SGDSettings
from lightning_ntk.dynamics.stability import dominating_settings
from lightning_ntk.solvers.lanczos import LanczosModes

# Giant and baby steps of the explicit sum over gradient-descent steps: 2^22 steps in one matrix product.
_STEPS_AT_ONCE = 2048


def gradient_flow_truncation(modes: LanczosModes, time: float, ridge: float = 0.0) -> float:
    """The truncation error of gradient flow.

    Args:
        modes: Ritz pairs.
        time: The sum of the rates of all steps, eta * t.
        ridge: The shift of the eigenvalues by decay.
    """
    eigenvalues = modes.eigenvalues.clamp_min(0) + ridge
    accumulated = _accumulated_filter(eigenvalues, gradient_flow_filter(eigenvalues, time), time)
    return math.sqrt(modes.next_curvature) * _defect(modes, accumulated)


def gradient_descent_truncation(modes: LanczosModes, rate: float, steps: float, ridge: float = 0.0) -> float:
    """Bounds the truncation error of gradient descent at any rate.

    It grows like the weights themselves where they diverge.

    Args:
        modes: Ritz pairs.
        rate: The learning rate times the loss factor, eta.
        steps: The number t of optimizer steps.
        ridge: The shift of the eigenvalues by decay.
    """
    if steps <= len(modes.eigenvalues) or modes.next_curvature == 0:
        return 0.0
    eigenvalues = modes.eigenvalues.clamp_min(0) + ridge
    magnified = max(1.0, rate * (modes.largest_eigenvalue + ridge) - 1)
    if magnified == 1 and rate * (modes.diagonal.max().item() + ridge) <= 1:
        filtered = gradient_descent_filter(eigenvalues, rate, steps)
        defect = _defect(modes, _accumulated_filter(eigenvalues, filtered, rate * steps, steps))
    else:
        defect = _sum_over_steps(modes, eigenvalues, rate, int(steps), magnified)
    return math.sqrt(modes.next_curvature) * defect


def ridge_truncation(modes: LanczosModes, ridge: float) -> float:
    r"""Bounds the truncation error at t = infinity with decay.

    The limit is kernel ridge regression :math:`a = -(\Theta + \rho I)^{-1} r`.

    The defect :math:`\beta_k |r| y_k v_{k+1}` reaches the weights through :math:`J^\top (\Theta + \rho I)^{-1}`, of norm at most
    :math:`1 / (2 \sqrt\rho)`, and :math:`\sqrt{\alpha_{k+1}} / \rho` on :math:`v_{k+1}`.

    Args:
        modes: Ritz pairs.
        ridge: The shift :math:`\rho` of the eigenvalues, positive.
    """
    gain = min(1 / (2 * math.sqrt(ridge)), math.sqrt(modes.next_curvature) / ridge)
    return gain * _defect(modes, 1 / (modes.eigenvalues.clamp_min(0) + ridge))


def minimum_norm_truncation(modes: LanczosModes, cutoff: float) -> float:
    r"""Bounds the truncation error at t = infinity without decay.

    The limit is the minimum-norm solution in the eigenvectors above the cutoff c.

    A Ritz pair is an eigenpair up to its coupling :math:`\kappa_i`: on an eigenvector of eigenvalue :math:`\lambda`,
    :math:`|z_i| = |\kappa_i| |v_{k+1}| / |\lambda - \theta_i|`. Eigenvectors above the cutoff see the defect
    :math:`|r| \beta_k y_k` and the Ritz vectors that were dropped, divided by :math:`\sqrt\lambda \ge \sqrt c`; those below
    see the Ritz vectors that were kept. The smallest eigenvalue above c is not known, which makes this bound much larger
    than the error until the Krylov space is nearly invariant.

    Args:
        modes: Ritz pairs.
        cutoff: The largest eigenvalue that counts as zero.
    """
    if modes.next_curvature == 0:
        return 0.0
    filtered = minimum_norm_filter(modes.eigenvalues, cutoff)
    kept = modes.eigenvalues > cutoff
    distance = (modes.eigenvalues.clamp_min(0) - cutoff).abs()
    weighted = (modes.coordinates * modes.coupling).abs() / distance
    above = _defect(modes, filtered) + weighted[~kept].sum().item()
    below = (weighted * filtered)[kept].sum().item()
    root = math.sqrt(cutoff)
    return (above / root if root > 0 else math.inf) + root * below


class RunningTruncation:
    r"""The truncation error of SGD whose settings change between steps.

    It is carried along with the filters.

    The defect of a Krylov space acts on the weights as a gradient of its own, so that it drives the recurrence that drives
    the weights. The same optimizer on one number, whose response dominates that of all modes, driven by the defect's
    absolute value, is therefore a bound (`lightning_ntk.dynamics.stability.dominating_settings`): rigorous for constant settings,
    and for any learning rates without momentum. Learning rates that change while there is momentum make it an estimate,
    because products of different steps are not polynomials of one kind. So does Nesterov's momentum.

    Args:
        modes: Ritz pairs of the residual and of every carried vector.
        factor: The measured factor c of the loss.
    """

    def __init__(self, modes: Sequence[LanczosModes], factor: float) -> None:
        self._modes = modes
        self._factor = factor
        self._weights = [m.coordinates * m.coupling for m in modes]
        self._curvature = factor * max(m.largest_eigenvalue for m in modes)
        self._errors = torch.zeros(len(modes), dtype=torch.float64)
        self._sgd = LinearSGD([self._errors])
        self._steps = 0

    def step(self, filters: Filters, settings: SGDSettings) -> None:
        """One step with these settings, from the filters before it."""
        defects = torch.stack([torch.dot(w, f) for w, f in zip(self._weights, filters.values, strict=True)]).abs()
        dominating, curvature = dominating_settings(settings, self._curvature)
        self._sgd.step([curvature * self._errors - self._factor * defects], dominating)
        self._steps += 1

    @property
    def truncations(self) -> list[float]:
        """The error of each part after the steps so far."""
        return [
            0.0 if self._steps <= len(m.eigenvalues) else math.sqrt(m.next_curvature) * error
            for m, error in zip(self._modes, self._errors.nan_to_num(math.inf).tolist(), strict=True)
        ]


def _defect(modes: LanczosModes, accumulated: Tensor) -> float:
    """|r| beta_k |e_k^T f(T_k) e_1| for a function f, given on the Ritz values."""
    return abs((modes.coordinates * modes.coupling * accumulated).sum().item())


def _accumulated_filter(eigenvalues: Tensor, filtered: Tensor, time: float, steps: float = math.inf) -> Tensor:
    r"""Computes :math:`\Psi_t(\lambda) = (\eta t - \phi_t(\lambda)) / \lambda`.

    This is the sum or (steps = inf) integral of the filter.

    Where :math:`\eta t\lambda < 1` the difference cancels; there the binomial series
    :math:`\eta^2 \sum_j \binom{t}{j+2} (-\eta\lambda)^j` takes its place.
    """
    product = eigenvalues * time
    term = torch.full_like(product, time * time / 2 * (1 - 1 / steps))
    series = term
    small = product.clamp_max(1)
    for j in range(20):
        term = -term * small * ((1 - (j + 2) / steps) / (j + 3))
        series = series + term
    return torch.where(product < 1, series, (time - filtered) / torch.where(product < 1, 1, eigenvalues))


def _sum_over_steps(modes: LanczosModes, eigenvalues: Tensor, rate: float, steps: int, growth: float) -> float:
    r"""The explicit :math:`\eta \beta_k |r| \sum_s g^{t-1-s} |y_k(s)|`, where y_k changes its sign.

    From :math:`\phi_{a+b} = \phi_a + (1 - \eta\lambda)^a \phi_b`: a matrix product for four million steps at a time.
    """
    weights = modes.coordinates * modes.coupling
    factors = 1 - rate * eigenvalues
    block = min(_STEPS_AT_ONCE, math.isqrt(steps) + 1)
    exponents = torch.arange(block + 1, dtype=torch.float64).unsqueeze(1)
    powers = factors**exponents
    inner = rate * torch.cat([torch.zeros_like(powers[:1]), powers[:-1].cumsum(0)])
    giant_powers = powers[-1] ** exponents[:-1]
    giant = inner[-1] * torch.cat([torch.zeros_like(giant_powers[:1]), giant_powers[:-1].cumsum(0)])
    total, start = 0.0, 0
    while start < steps:
        offset = gradient_descent_filter(eigenvalues, rate, start)
        decayed = factors**start
        base = (offset + decayed * giant) @ weights
        values = (base.unsqueeze(1) + (decayed * giant_powers * weights) @ inner[:-1].T).flatten()[: steps - start]
        remaining = steps - 1 - start - torch.arange(len(values), dtype=torch.float64)
        total += (values.abs().log() + math.log(growth) * remaining).exp().sum().item()
        start += block * block
    return float(rate * total)
