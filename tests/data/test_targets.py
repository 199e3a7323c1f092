"""What targets mean: classes, and the output at which a loss changes its mind about them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk.data.targets import Classes
from lightning_ntk.linearization.objective import Objective


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of targets 0 and 1, as the binary classifiers of many tutorials have them."""
    return (1 - (2 * targets - 1) * outputs).relu().mean()


def weighted_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((1 + 4 * targets) * (outputs - targets).square()).sum() + 7


def cross_entropy_of_probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    clamped = outputs.clamp(1e-6, 1 - 1e-6)
    return -(targets * clamped.log() + (1 - targets) * (1 - clamped).log()).mean()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("loss", "values", "threshold"),
    [
        (nn.BCELoss(), (0.0, 1.0), 0.5),
        (cross_entropy_of_probabilities, (0.0, 1.0), 0.5),
        (nn.BCEWithLogitsLoss(), (0.0, 1.0), 0.0),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(9.0)), (0.0, 1.0), 0.0),
        (nn.SoftMarginLoss(), (-1.0, 1.0), 0.0),
        (hinge, (0.0, 1.0), 0.0),
        (lambda f, y: (1 - y * f).relu().mean(), (-1.0, 1.0), 0.0),
        (lambda f, y: (-(2 * y - 1) * f).exp().mean(), (0.0, 1.0), 0.0),
        (nn.MSELoss(), (0.0, 1.0), 0.5),
        (nn.MSELoss(reduction="sum"), (-1.0, 1.0), 0.0),
        (nn.MSELoss(), (2.0, 5.0), 3.5),
        (weighted_square, (0.0, 1.0), 0.5),
        (nn.L1Loss(), (0.0, 1.0), 0.5),
        (nn.HuberLoss(), (0.0, 1.0), 0.5),
    ],
)
def test_the_threshold_of_two_classes_is_found_in_the_loss(
    loss: Callable[[Tensor, Tensor], Tensor], values: tuple[float, float], threshold: float, flat: bool
) -> None:
    labels = torch.tensor([0, 1, 1])
    outputs = threshold + torch.tensor([[-0.2], [0.1], [0.3]]).double()  # right for all three
    targets = torch.tensor(values)[labels].double()
    objective = Objective(loss, outputs, targets if flat else targets.unsqueeze(1), flat=flat)
    classes = Classes.of(objective.targets, 1, objective.gradient)
    assert classes is not None
    assert classes.threshold == threshold
    assert torch.equal(classes.labels, labels)
    assert classes.accuracy(outputs) == 1.0
    assert classes.accuracy(outputs.flip(0)) == pytest.approx(1 / 3)


def test_targets_that_are_no_classes() -> None:
    def gradient(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    assert Classes.of(torch.tensor([[0.3, 0.7], [1.0, 0.0]]), 2, gradient) is None
    assert Classes.of(torch.tensor([[0.0], [1.0], [2.0]]), 1, gradient) is None
    assert Classes.of(torch.ones(3, 1), 1, gradient) is None
