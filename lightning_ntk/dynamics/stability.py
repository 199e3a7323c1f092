"""Stable learning rates of SGD, where training ends, and growth of modes.

Unstable steps magnify a mode; this says by how much.
"""

import math

from lightning_ntk.dynamics.sgd import SGDSettings


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
        The learning rate. Infinite where nothing bounds it; 0 for a momentum of 1 or more, and for a dampening above 1.
    """
    momentum, decay, gain = settings.momentum, settings.weight_decay, settings.gain
    if momentum >= 1 or gain < 0:
        return 0.0
    amplification = 1 + 2 * momentum if settings.nesterov else gain
    total = amplification * curvature + (1 + momentum if settings.decoupled_weight_decay else amplification) * decay
    return 2 * (1 + momentum) / total if total > 0 else math.inf


def ridge(settings: SGDSettings, factor: float) -> float:
    r"""Computes the ridge :math:`\rho` of the regression where training ends.

    The regression is :math:`a = -(\Theta + \rho I)^{-1} r`.

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


def dominating_settings(settings: SGDSettings, curvature: float) -> tuple[SGDSettings, float]:
    r"""A mode, and settings for it, whose response bounds all others.

    The others have curvature 0 to :math:`\kappa`.

    After an impulse, a mode of curvature :math:`p` moves like the Chebyshev polynomial :math:`\mu^{n/2} U_n(x)` with
    :math:`x = (1 + \mu - \eta p) / (2 \sqrt\mu)`, :math:`\eta` times 1 - dampening. That is largest where :math:`|x|` is, and
    below :math:`|x| = 1` never above its value there. With decay through the gradient, :math:`p` runs from :math:`\gamma` to
    :math:`\gamma + \kappa`, and the largest :math:`|x|` is that of

    .. math:: p = \min\Big(\gamma,\ \frac{2 (1 + \mu)}{\eta} - \gamma - \kappa,\ \frac{(1 - \sqrt\mu)^2}{\eta}\Big),

    below zero where the step is unstable: such a mode grows as the unstable ones swing. Decoupled decay damps all modes
    alike, so that :math:`p` runs from 0 to :math:`\kappa`, and a mode grows below :math:`-(1 - \mu)\gamma` only. The
    response of Nesterov's momentum is not such a polynomial. Its sum over the steps was checked numerically: for decay
    up to a tenth of :math:`\kappa` the bound holds within a third.

    Args:
        settings: The settings of a step.
        curvature: The largest curvature :math:`\kappa`, not negative.

    Returns:
        The settings without decay through the gradient, and the mode's curvature.
    """
    momentum, decay, gain = settings.momentum, settings.weight_decay, settings.gain
    least = 0.0 if settings.decoupled_weight_decay else decay
    own = settings._replace(weight_decay=decay - least)
    if settings.lr == 0 or gain <= 0:
        return own, least + curvature
    rate, kept = settings.lr * gain, 2 - settings.lr * own.weight_decay
    edge = (1 + momentum) * kept / (rate * (1 + 2 * momentum if settings.nesterov else 1.0))
    opposite = edge - (1 - momentum) * own.weight_decay / gain - least - curvature
    return own, min(least, opposite, (1 - math.sqrt(momentum)) ** 2 / rate)
