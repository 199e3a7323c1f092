r"""How far weights from Ritz values are from the linearized ones: rigorous bounds, and the rounding on top of them.

Lanczos leaves :math:`\Theta a_k + r` with a part :math:`\beta_k |r| y_k v_{k+1}` outside its space, where
:math:`y_k(s) = e_k^\top \phi_s(T_k) e_1`. That defect drives the error of the weights, and since
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
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import (
    Filters,
    gradient_descent_filter,
    gradient_flow_filter,
    minimum_norm_filter,
)
from lightning_ntk.dynamics.sgd import LinearSGD, SGDSettings
from lightning_ntk.dynamics.stability import credited_decay, growth
from lightning_ntk.solvers.base import ErrorBound, Modes
from lightning_ntk.solvers.lanczos import LanczosModes

# Giant and baby steps of the explicit sum over gradient-descent steps: 2^22 steps in one matrix product.
_STEPS_AT_ONCE = 2048
# The basis sees neither what rounding does outside of it nor an error of J itself: 1/7 to 1/30 of the effect of float32
# passes on the weights of real networks.
_ROUNDING_SAFETY = 64.0


def gradient_flow_bound(modes: LanczosModes, time: float, ridge: float = 0.0) -> ErrorBound:
    """The bound for gradient flow.

    Args:
        modes: Ritz pairs.
        time: eta * t, the sum of the rates of all steps.
        ridge: Decay rate over the loss factor, which shifts the eigenvalues.
    """
    shifted = _shifted(modes, ridge)
    filtered = gradient_flow_filter(shifted.eigenvalues, time)
    accumulated = _accumulated_filter(shifted.eigenvalues, filtered, time)
    defect = abs((modes.coordinates * modes.coupling * accumulated).sum().item())
    truncation = math.sqrt(modes.next_curvature) * (defect + _cancellation(modes, accumulated, time))
    return ErrorBound(truncation, _rounding(modes, filtered, time), displacement(modes, filtered))


def gradient_descent_bound(modes: LanczosModes, rate: float, steps: float, ridge: float = 0.0) -> ErrorBound:
    """The bound for gradient descent, at any rate; it grows like the weights themselves where they diverge.

    Args:
        modes: Ritz pairs.
        rate: eta, the learning rate times the loss factor.
        steps: t, the number of optimizer steps.
        ridge: Decay rate over the loss factor, which shifts the eigenvalues.
    """
    shifted = _shifted(modes, ridge)
    filtered = gradient_descent_filter(shifted.eigenvalues, rate, steps)
    magnified = max(1.0, rate * shifted.largest_eigenvalue - 1)
    size = displacement(modes, filtered)
    rounding = _rounding(modes, filtered, rate * steps, rate)
    if steps <= len(modes.eigenvalues) or modes.next_curvature == 0:
        return ErrorBound(0.0, rounding, size)
    accumulated = _accumulated_filter(shifted.eigenvalues, filtered, rate * steps, steps).abs()
    if magnified == 1 and rate * shifted.largest_diagonal <= 1:
        defect = abs((modes.coordinates * modes.coupling * accumulated).sum().item())
    else:
        defect = _sum_over_steps(shifted, rate, int(steps), magnified)
    truncation = math.sqrt(modes.next_curvature) * (defect + _cancellation(modes, accumulated, rate * steps))
    return ErrorBound(truncation, rounding, size)


def ridge_bound(modes: LanczosModes, ridge: float) -> ErrorBound:
    r"""The bound for t = infinity with decay, on kernel ridge regression, :math:`a = -(\Theta + \rho I)^{-1} r`.

    The defect :math:`\beta_k |r| y_k v_{k+1}` reaches the weights through :math:`J^\top (\Theta + \rho I)^{-1}`, of norm at most
    :math:`1 / (2 \sqrt\rho)`, and :math:`\sqrt{\alpha_{k+1}} / \rho` on :math:`v_{k+1}`.

    Args:
        modes: Ritz pairs.
        ridge: :math:`\rho`, positive.
    """
    filtered = 1 / (modes.eigenvalues.clamp_min(0) + ridge)
    gain = min(1 / (2 * math.sqrt(ridge)), math.sqrt(modes.next_curvature) / ridge)
    defect = abs((modes.coordinates * modes.coupling * filtered).sum().item())
    truncation = gain * (defect + _cancellation(modes, filtered, 1 / ridge))
    return ErrorBound(truncation, _rounding(modes, filtered, math.inf), displacement(modes, filtered))


def minimum_norm_bound(modes: LanczosModes, cutoff: float) -> ErrorBound:
    r"""The bound for t = infinity, on the minimum-norm solution in the eigenvectors above the cutoff c.

    A Ritz pair is an eigenpair up to its coupling :math:`\kappa_i`: on an eigenvector of eigenvalue :math:`\lambda`,
    :math:`|z_i| = |\kappa_i| |v_{k+1}| / |\lambda - \theta_i|`. Eigenvectors above the cutoff see the defect
    :math:`|r| \beta_k y_k` and the Ritz vectors that were dropped, divided by :math:`\sqrt\lambda \ge \sqrt c`; those below
    see the Ritz vectors that were kept. The smallest eigenvalue above c is not known, which makes this bound much larger
    than the error until the Krylov space is nearly invariant.

    Args:
        modes: Ritz pairs.
        cutoff: Largest eigenvalue that counts as zero.
    """
    filtered = minimum_norm_filter(modes.eigenvalues, cutoff)
    kept = modes.eigenvalues > cutoff
    distance = (modes.eigenvalues.clamp_min(0) - cutoff).abs()
    weighted = (modes.coordinates * modes.coupling).abs() / distance
    root = math.sqrt(cutoff)
    above = abs((modes.coordinates * modes.coupling * filtered).sum().item()) + weighted[~kept].sum().item()
    below = (weighted * filtered)[kept].sum().item()
    exact = modes.next_curvature == 0
    truncation = 0.0 if exact else _ratio(above, root) + root * below
    return ErrorBound(truncation, _rounding(modes, filtered, math.inf), displacement(modes, filtered))


class RunningBound:
    r"""The bound for SGD with settings that change from step to step, carried along with the filters.

    The defect of a Ritz space acts on the weights as a gradient of its own, so that it drives the recurrence that drives
    the weights. Its effect n steps later is :math:`\eta\,h_n(\lambda)`; with momentum :math:`\mu` at stable rates,
    :math:`|h_n(\lambda)| \le h_n(0) = (1 - \mu^n) / (1 - \mu)`, because the response is the Chebyshev polynomial
    :math:`\mu^{(n-1)/2} U_{n-1}((1 + \mu - \eta\lambda) / (2 \sqrt\mu))`, which is largest at the ends of the stable range. The
    same optimizer on one number without curvature, driven by the defect's absolute value, is therefore a bound: rigorous for
    constant settings, and for any learning rates without momentum. Learning rates that change while there is momentum make
    it an estimate, because products of different steps are no polynomial of one kind; so does Nesterov's momentum, for which
    :math:`|h_n(\lambda)| \le h_n(0)` was found numerically only. Weight decay counts as far as `credited_decay` allows.
    Unstable steps are magnified by their spectral radius.

    Args:
        modes: Ritz pairs of the residual and of every carried vector.
        factor: c, the measured factor of the loss.
        norms: Norms of the carried vectors.
    """

    def __init__(self, modes: Sequence[LanczosModes], factor: float, norms: Sequence[float] = ()) -> None:
        self._modes = modes
        self._factor = factor
        self._norms = norms
        self._weights = [m.coordinates * m.coupling for m in modes]
        self._curvature = factor * max(m.largest_eigenvalue for m in modes)
        self._errors = torch.zeros(len(modes), dtype=torch.float64)
        self._time = torch.zeros(1, dtype=torch.float64)
        self._accumulated = [torch.zeros_like(m.eigenvalues) for m in modes]
        self._sgd = LinearSGD([self._errors, self._time, *self._accumulated])
        self._drives = [1.0] + [0.0] * len(norms)
        self._growth = 1.0
        self._largest_rate = 0.0
        self._momentum = 0.0
        self._steps = 0

    def step(self, filters: Filters, settings: SGDSettings) -> None:
        """One step with these settings, from the filters before it."""
        magnified = growth(settings, self._curvature)
        self._growth *= magnified
        # In units of the growth, which leaves the momentum buffers of this recurrence alone.
        drive = -self._factor / self._growth
        defects = torch.stack([torch.dot(w, f) for w, f in zip(self._weights, filters.values, strict=True)]).abs()
        gradients = [drive * defects, torch.full_like(self._time, -self._factor)]
        gradients += [drive * values.abs() for values in filters.values]
        decay = 0.0 if magnified > 1 else credited_decay(settings, self._curvature)
        self._sgd.step(gradients, settings._replace(maximize=False, weight_decay=decay))
        self._drives = [max(d, abs(s)) for d, s in zip(self._drives, (1.0, *filters.scales), strict=True)]
        gain = settings.gain
        self._largest_rate = max(self._largest_rate, settings.lr * self._factor * gain)
        self._momentum = max(self._momentum, settings.momentum)
        self._steps += 1

    def result(self, filters: Filters) -> ErrorBound:
        """The bound after all steps so far, with the filters after them."""
        if not math.isfinite(self._growth):
            return ErrorBound(math.inf, math.inf, math.inf)
        time = self._time.item()
        parts = []
        for index, (modes, values) in enumerate(zip(self._modes, filters.values, strict=True)):
            truncation, drive = 0.0, self._drives[index]
            if self._steps > len(modes.eigenvalues):
                cancellation = _cancellation(modes, self._accumulated[index], time)
                error = self._growth * (self._errors[index].item() + cancellation)
                truncation = math.sqrt(modes.next_curvature) * error
            rounding = 0.0
            if drive > 0:
                rounding = drive * _rounding(modes, values / drive, time, self._largest_rate, self._momentum)
            parts.append(ErrorBound(truncation, rounding, displacement(modes, values)))
        return combined_bound(parts, [abs(s) * norm for s, norm in zip(filters.scales, self._norms, strict=True)])


def combined_bound(parts: Sequence[ErrorBound], lengths: Sequence[float] = ()) -> ErrorBound:
    """The bound on a sum of parts, with exact ones of these lengths among them.

    The displacement is that of orthogonal parts: parts in different Krylov spaces cannot be added up by their Ritz values.
    """
    size = math.hypot(*(part.displacement for part in parts), *lengths)
    return ErrorBound(sum(part.truncation for part in parts), sum(part.rounding for part in parts), size)


def displacement(modes: Modes, filtered: Tensor) -> float:
    """|w_k - w0| = |J^T a|, from the Ritz values alone."""
    return float((modes.eigenvalues.clamp_min(0).sqrt() * filtered * modes.coordinates).norm())


def _accumulated_filter(eigenvalues: Tensor, filtered: Tensor, time: float, steps: float = math.inf) -> Tensor:
    r""":math:`\Psi_t(\lambda) = (\eta t - \phi_t(\lambda)) / \lambda`, the sum or (steps = inf) integral of the filter.

    Where :math:`\eta t\lambda < 1` the difference cancels; there the binomial series
    :math:`\eta^2 \sum_j \binom{t}{j+2} (-\eta\lambda)^j` takes its place.
    """
    eigenvalues = eigenvalues.clamp_min(0)
    product = eigenvalues * time
    term = torch.full_like(product, time * time / 2 * (1 - 1 / steps))
    series = term
    small = product.clamp_max(1)
    for j in range(20):
        term = -term * small * ((1 - (j + 2) / steps) / (j + 3))
        series = series + term
    return torch.where(product < 1, series, (time - filtered) / torch.where(product < 1, 1, eigenvalues))


def _sum_over_steps(modes: LanczosModes, rate: float, steps: int, growth: float) -> float:
    r"""The explicit :math:`\eta \beta_k |r| \sum_s g^{t-1-s} |y_k(s)|`, where y_k changes its sign.

    From :math:`\phi_{a+b} = \phi_a + (1 - \eta\lambda)^a \phi_b`: a matrix product for four million steps at a time.
    """
    weights = modes.coordinates * modes.coupling
    factors = 1 - rate * modes.eigenvalues.clamp_min(0)
    block = min(_STEPS_AT_ONCE, math.isqrt(steps) + 1)
    exponents = torch.arange(block + 1, dtype=torch.float64).unsqueeze(1)
    powers = factors**exponents
    inner = rate * torch.cat([torch.zeros_like(powers[:1]), powers[:-1].cumsum(0)])
    giant_powers = powers[-1] ** exponents[:-1]
    giant = inner[-1] * torch.cat([torch.zeros_like(giant_powers[:1]), giant_powers[:-1].cumsum(0)])
    total, start = 0.0, 0
    while start < steps:
        offset = gradient_descent_filter(modes.eigenvalues, rate, start)
        decayed = factors**start
        base = (offset + decayed * giant) @ weights
        values = (base.unsqueeze(1) + (decayed * giant_powers * weights) @ inner[:-1].T).flatten()[: steps - start]
        remaining = steps - 1 - start - torch.arange(len(values), dtype=torch.float64)
        total += (values.abs().log() + math.log(growth) * remaining).exp().sum().item()
        start += block * block
    return float(rate * total)


def _cancellation(modes: LanczosModes, accumulated: Tensor, time: float) -> float:
    """What float64 may lose in the sum over Ritz values, whose terms are larger than it."""
    eps = torch.finfo(torch.float64).eps
    values = modes.eigenvalues.clamp_min(0)
    terms = (modes.coordinates * modes.coupling).abs() + eps * modes.coupling.norm() * modes.coordinates.abs()
    sensitivity = 1 + values[-1] * torch.clamp(1 / values.clamp_min(1e-300), max=time)
    return eps * len(values) * float((terms * accumulated.abs() * sensitivity).sum())


def _rounding(modes: LanczosModes, filtered: Tensor, time: float, rate: float = 0.0, momentum: float = 0.0) -> float:
    r"""The effect of rounded products, to first order: an estimate.

    An error E of the kernel changes :math:`\phi(T_k)` by :math:`U (G \circ D) U^\top`, with :math:`G = U^\top E U` and the
    divided differences :math:`|D_{ij}| \le \min(d_i \max_s |\phi_s(\theta_j)|, \eta t \max(|\phi_i|, |\phi_j|))` of the
    filter. Here :math:`d_i = \eta \sum_s |1 - \eta\theta_i|^s`, which is the filter itself up to :math:`\eta\theta_i = 1`; with
    momentum, modes beyond :math:`(1 - \sqrt\mu)^2` oscillate and lose :math:`1 - \sqrt\mu` a step.
    """
    values = modes.eigenvalues.clamp_min(0)
    largest, propagated = filtered.abs(), filtered.abs()
    if time < math.inf:
        largest = torch.maximum(largest, torch.clamp(1 / values.clamp_min(1e-300), max=time))
        root = math.sqrt(momentum)
        center = 1 + momentum - rate * values  # twice the cosine of the step's oscillation, times the root
        sine = (1 - (center / max(2 * root, 1e-300)).square()).clamp_min((1 - root) ** 2).sqrt()
        swinging = rate / max((1 - root), 1e-300) / sine.clamp_min(1e-300)
        alternating = rate / (2 * (1 + momentum) - rate * values).clamp_min(1e-300)
        undamped = torch.where(center.abs() < 2 * root, swinging, alternating).clamp_max(time)
        propagated = torch.where(center < 2 * root, torch.maximum(largest, undamped), largest)
    # Only the minimum-norm filter is zero anywhere, and it jumps there.
    dropped = (largest == 0).to(largest)
    divided = torch.outer(propagated, largest) + torch.outer(propagated**2, dropped)
    if time < math.inf:
        divided = torch.minimum(divided, time * torch.maximum(largest.unsqueeze(1), largest))
    change = (modes.rounding * divided) @ modes.coordinates
    # float64's own: of every product, of the coefficients, large in the kernel's null space, and of the residual's.
    roots, coefficients = values.sqrt(), (largest * modes.coordinates).norm()
    unit = values[-1] * (roots * propagated).max() * coefficients
    unit = unit + values[-1] * (roots * propagated**2).max() * (dropped * modes.coordinates).norm()
    unit = unit + roots[-1] * coefficients + (roots * largest).max() * modes.coordinates.norm()
    return _ROUNDING_SAFETY * float((roots * change).norm() + torch.finfo(torch.float64).eps * unit)


def _shifted(modes: LanczosModes, ridge: float) -> LanczosModes:
    if ridge == 0:
        return modes
    return replace(
        modes, eigenvalues=modes.eigenvalues.clamp_min(0) + ridge, largest_diagonal=modes.largest_diagonal + ridge
    )


def _ratio(numerator: float, denominator: float) -> float:
    if denominator > 0:
        return numerator / denominator
    return 0.0 if numerator == 0 else math.inf
