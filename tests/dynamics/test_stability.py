"""Stable learning rates, and the mode that dominates all others, against the recurrence itself."""

import math

import pytest
import torch
from torch import Tensor

from lightning_ntk.dynamics.sgd import LinearSGD, ModalSGD, SGDSettings
from lightning_ntk.dynamics.stability import dominating_settings, max_learning_rate

STEP_SETTINGS = [
    SGDSettings(0.0),
    SGDSettings(0.0, weight_decay=0.7),
    SGDSettings(0.0, weight_decay=0.7, decoupled_weight_decay=True),
    SGDSettings(0.0, momentum=0.9),
    SGDSettings(0.0, momentum=0.9, dampening=0.4, weight_decay=0.7),
    SGDSettings(0.0, momentum=0.9, dampening=0.4, weight_decay=0.7, decoupled_weight_decay=True),
    SGDSettings(0.0, momentum=0.9, nesterov=True),
    SGDSettings(0.0, momentum=0.9, nesterov=True, weight_decay=0.7),
    SGDSettings(0.0, momentum=0.9, nesterov=True, weight_decay=0.7, decoupled_weight_decay=True),
]


@pytest.mark.parametrize("settings", STEP_SETTINGS, ids=str)
def test_the_maximal_learning_rate_separates_decay_from_growth(settings: SGDSettings) -> None:
    curvature = 1.7
    limit = max_learning_rate(settings, curvature)
    filters = []
    for factor in (0.999, 1.001):
        online = ModalSGD([torch.tensor([curvature], dtype=torch.float64)], 1.0)
        for _ in range(8000):
            online.step(settings._replace(lr=factor * limit))
        filters.append(online.filters.values[0].abs().item())
    assert filters[0] < 2 / curvature
    assert not filters[1] < 1e3  # or NaN, beyond floating-point numbers


def test_nothing_bounds_the_rate_of_what_never_moves() -> None:
    assert max_learning_rate(SGDSettings(0.0), 0.0) == math.inf
    assert max_learning_rate(SGDSettings(0.0, momentum=0.5, dampening=1.0), 3.0) == math.inf
    assert max_learning_rate(SGDSettings(0.0, momentum=1.0), 1.0) == 0.0
    assert max_learning_rate(SGDSettings(0.0, momentum=0.5, dampening=1.5), 1.0) == 0.0


def responses(settings: SGDSettings, curvatures: Tensor, steps: int) -> Tensor:
    """Of modes of these curvatures, after an impulse on the weights: `(steps, m)`, in absolute values."""
    # With buffers, so that dampening acts on the impulse.
    zeros = torch.zeros_like(curvatures)
    sgd, values = LinearSGD([zeros.clone()], [zeros]), []
    for step in range(steps):
        sgd.step([curvatures * sgd.values[0] - (0.0 if step else 1.0)], settings)
        values.append(sgd.values[0].abs().clone())
    return torch.stack(values)


@pytest.mark.parametrize("fraction", [0.003, 0.05, 0.4, 0.9, 0.999, 1.01, 1.3])
@pytest.mark.parametrize("settings", STEP_SETTINGS, ids=str)
def test_no_mode_responds_more_than_the_dominating_one(settings: SGDSettings, fraction: float) -> None:
    if settings.nesterov and settings.weight_decay:
        settings = settings._replace(weight_decay=0.1)
    settings = settings._replace(lr=fraction * max_learning_rate(settings, 1.0))
    dominating, curvature = dominating_settings(settings, 1.0)
    modes = responses(settings, torch.linspace(0, 1, 201, dtype=torch.float64), 150)
    bound = responses(dominating, torch.tensor([curvature], dtype=torch.float64), 150)
    if settings.nesterov:
        assert (modes.cumsum(0).amax(1) <= 1.05 * bound.cumsum(0)[:, 0]).all()
    else:
        assert (modes.amax(1) <= (1 + 1e-9) * bound[:, 0] + 1e-14).all()


@pytest.mark.parametrize("settings", [s for s in STEP_SETTINGS if not s.nesterov and not s.weight_decay], ids=str)
def test_the_dominating_mode_grows_as_the_unstable_one(settings: SGDSettings) -> None:
    settings = settings._replace(lr=1.1 * max_learning_rate(settings, 1.7))
    dominating, curvature = dominating_settings(settings, 1.7)
    sizes = []
    for own, rate in ((settings, 1.7), (dominating, curvature)):
        sgd = LinearSGD([torch.ones(1, dtype=torch.float64)])
        for _ in range(300):
            sgd.step([rate * sgd.values[0]], own)
        sizes.append(sgd.values[0].abs().log().item() / 300)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
