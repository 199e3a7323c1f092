"""Which learning rates of SGD are stable, and by how much others magnify a mode in a step."""

import math

import torch

from lightning_ntk.dynamics.sgd import LinearSGD, SGDSettings


def max_learning_rate(settings: SGDSettings, curvature: float) -> float:
    r"""The largest stable learning rate for modes of curvature 0 to :math:`\kappa = c\lambda_\text{max}`.

    .. math:: \frac{2 (1 + \mu)}{(1 - \tau) (\kappa + \gamma)}, \quad \frac{2 (1 + \mu)}{(1 + 2 \mu) (\kappa + \gamma)}

    for momentum :math:`\mu` with dampening :math:`\tau` (none on plain gradient descent, where torch ignores it), and for
    Nesterov's; :math:`\gamma` is the decay rate. Where the decay is decoupled, it counts as :math:`(1 + \mu)\gamma` beside the
    :math:`(1 - \tau)\kappa` or :math:`(1 + 2\mu)\kappa` of the loss. From the characteristic polynomial of a step at -1.

    Args:
        settings: Those of a step; its learning rate is not used.
        curvature: :math:`\kappa`, not negative.

    Returns:
        The learning rate, infinite where nothing bounds it; 0 for a maximized loss, unless decay holds it back.
    """
    momentum, decay = settings.momentum, settings.weight_decay
    gain = 1 - settings.dampening if momentum else 1.0
    amplification = 1 + 2 * momentum if settings.nesterov else gain
    if settings.maximize:
        held = decay * (1 - momentum) if settings.decoupled_weight_decay else decay * gain
        if gain * curvature > 0 and held <= gain * curvature:
            return 0.0
        curvature = 0.0
    total = amplification * curvature + (1 + momentum if settings.decoupled_weight_decay else amplification) * decay
    return 2 * (1 + momentum) / total if total > 0 else math.inf


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
    gain = 1 - settings.dampening if settings.momentum else 1.0
    limit = max_learning_rate(settings, curvature)
    swings = (1 - math.sqrt(settings.momentum)) ** 2 / (settings.lr * max(gain, 1e-300))
    return max(0.0, min(decay, swings, (limit / settings.lr - 1) * (decay + curvature)))
