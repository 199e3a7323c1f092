"""Which learning rates of SGD are stable, where training ends, and how much unstable steps magnify a mode."""

import math

import torch

from lightning_ntk.dynamics.sgd import LinearSGD, SGDSettings


def max_learning_rate(settings: SGDSettings, curvature: float) -> float:
    r"""The largest stable learning rate for modes of curvature 0 to :math:`\kappa = c\lambda_\text{max}`.

    .. math:: \frac{2 (1 + \mu)}{(1 - \tau) (\kappa + \gamma)}, \quad \frac{2 (1 + \mu)}{(1 + 2 \mu) (\kappa + \gamma)}

    for momentum :math:`\mu` with dampening :math:`\tau` (which plain gradient descent ignores), and for Nesterov's momentum;
    :math:`\gamma` is the decay rate. Decoupled decay counts as :math:`(1 + \mu)\gamma` beside the loss's
    :math:`(1 - \tau)\kappa` or :math:`(1 + 2\mu)\kappa`. From the characteristic polynomial of a step at -1.

    Args:
        settings: The settings of a step; its learning rate is not used.
        curvature: The largest curvature :math:`\kappa`, not negative.

    Returns:
        The learning rate. Infinite where nothing bounds it. 0 for a momentum of 1 or more, and for a loss that is maximized
        (dampening above 1 does that too) unless decay holds it back.
    """
    momentum, decay = settings.momentum, settings.weight_decay
    gain = settings.gain
    if momentum >= 1 or gain < 0:
        return 0.0
    amplification = 1 + 2 * momentum if settings.nesterov else gain
    if settings.maximize:
        held = decay * (1 - momentum) if settings.decoupled_weight_decay else decay * gain
        if gain * curvature > 0 and held <= gain * curvature:
            return 0.0
        curvature = 0.0
    total = amplification * curvature + (1 + momentum if settings.decoupled_weight_decay else amplification) * decay
    return 2 * (1 + momentum) / total if total > 0 else math.inf


def ridge(settings: SGDSettings, factor: float) -> float:
    r"""The ridge :math:`\rho` of the regression on which training ends, :math:`a = -(\Theta + \rho I)^{-1} r`.

    .. math:: \rho = \frac{\gamma}{c}, \qquad \rho = \frac{(1 - \mu)\,\gamma}{(1 - \tau)\,c}

    for decay :math:`\gamma` through the gradient and for decoupled decay, which the momentum buffer does not accumulate:
    a gradient moves the weights by :math:`\eta (1 - \tau) / (1 - \mu)` in all, decay by :math:`\eta\gamma`.

    Args:
        settings: The settings of a step; its learning rate is not used.
        factor: The measured factor c of the loss.
    """
    if not settings.decoupled_weight_decay:
        return settings.weight_decay / factor
    decay = (1 - settings.momentum) * settings.weight_decay
    return decay / (settings.gain * factor) if settings.gain != 0 else math.inf


def growth(settings: SGDSettings, curvature: float) -> float:
    """By how much a step magnifies the modes of curvature 0 to `curvature` at most: 1 for stable settings.

    It is the spectral radius of the step of the largest curvature, on its weight and momentum buffer.
    """
    if settings.lr <= max_learning_rate(settings, curvature):
        return 1.0
    values, buffers = (torch.tensor(row, dtype=torch.float64) for row in ([1.0, 0.0], [0.0, 1.0]))
    step = LinearSGD([values], [buffers])
    step.step([curvature * values], settings)
    if settings.momentum == 0:
        return max(1.0, float(values[0].abs()))
    (moved,) = step.buffers
    assert moved is not None
    return max(1.0, float(torch.linalg.eigvals(torch.stack([values, moved])).abs().max()))


def credited_decay(settings: SGDSettings, curvature: float) -> float:
    r"""The decay rate with which no mode of curvature 0 to `curvature` responds more than one without curvature does.

    A mode of rate :math:`\kappa + \gamma` responds to an impulse like the Chebyshev polynomial
    :math:`\mu^{(n-1)/2} U_{n-1}(x)`, :math:`x = (1 + \mu - \eta(\kappa + \gamma)) / (2 \sqrt\mu)`, which is largest where
    :math:`|x|` is, outside of [-1, 1]. Decay beyond :math:`(1 - \sqrt\mu)^2 / \eta`, or beyond the distance from the
    stable limit, is therefore not counted.
    """
    decay = settings.weight_decay
    if settings.lr == 0 or decay == 0:
        return decay
    limit = max_learning_rate(settings, curvature)
    swings = (1 - math.sqrt(settings.momentum)) ** 2 / (settings.lr * max(settings.gain, 1e-300))
    return max(0.0, min(decay, swings, (limit / settings.lr - 1) * (decay + curvature)))
