"""Stable learning rates, and the growth of a mode at others, against the recurrence itself."""

import math

import pytest
import torch
from torch import Tensor

from lightning_ntk.dynamics.sgd import LinearSGD, ModalSGD, SGDSettings
from lightning_ntk.dynamics.stability import credited_decay, growth, max_learning_rate

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
    assert growth(settings._replace(lr=0.999 * limit), curvature) == 1
    above = growth(settings._replace(lr=1.1 * limit), curvature)
    steps = ModalSGD([torch.tensor([curvature], dtype=torch.float64)], 1.0)
    sizes = []
    for _ in range(300):
        steps.step(settings._replace(lr=1.1 * limit))
        sizes.append(steps.filters.values[0].abs().item())
    assert (sizes[-1] / sizes[-101]) ** 0.01 == pytest.approx(above, rel=1e-3)


def test_nothing_bounds_the_rate_of_what_never_moves() -> None:
    assert max_learning_rate(SGDSettings(0.0), 0.0) == math.inf
    assert max_learning_rate(SGDSettings(0.0, momentum=0.5, dampening=1.0), 3.0) == math.inf
    held = SGDSettings(0.0, weight_decay=2.0, maximize=True)
    assert max_learning_rate(held, 1.0) == 1.0
    assert max_learning_rate(held, 3.0) == 0.0
    assert max_learning_rate(SGDSettings(0.0, momentum=1.0), 1.0) == 0.0
    assert growth(SGDSettings(0.1, maximize=True), 3.0) == pytest.approx(1.3)


@pytest.mark.parametrize("settings", STEP_SETTINGS, ids=str)
@pytest.mark.parametrize("fraction", [0.003, 0.05, 0.4, 0.9, 0.999])
def test_no_mode_responds_more_than_one_without_curvature(settings: SGDSettings, fraction: float) -> None:
    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    curvatures = torch.linspace(0, 1, 201, dtype=torch.float64)
    settings = settings._replace(lr=fraction * max_learning_rate(settings, 1.0))
    # With buffers, so that dampening acts on the impulse.
    modes, bound = LinearSGD([zeros(201)], [zeros(201)]), LinearSGD([zeros(1)], [zeros(1)])
    credited = settings._replace(weight_decay=credited_decay(settings, 1.0))
    for step in range(150):
        impulse = 1.0 if step == 0 else 0.0
        modes.step([curvatures * modes.values[0] - impulse], settings)
        bound.step([zeros(1) - impulse], credited)
        allowed = bound.values[0].item() * (1.1 if settings.nesterov and settings.weight_decay else 1 + 1e-9)
        assert modes.values[0].abs().max().item() <= allowed + 1e-14
