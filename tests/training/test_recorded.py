"""Training on a recorded order of minibatches, without a Trainer."""

import math

import pytest
import torch
from torch import nn

from lightning_ntk import LinearizedTraining
from tests.problems import LinearModel, flatten, make, relative_error

STEPS = 40


def order() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.randperm(11, generator=generator).split(4) for _ in range(STEPS // 3 + 1)]
    return [rows for epoch in epochs for rows in epoch][:STEPS]


def rate(step: int) -> float:
    return 0.2 * 0.5 * (1 + math.cos(step / 10))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"momentum": 0.5, "nesterov": True}])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_and_predictions_are_brute_force(options: dict, loss: nn.Module, micro_batches: int) -> None:
    module, inputs, _ = make("unused")
    labels = torch.arange(11) % 3
    targets = labels if isinstance(loss, nn.CrossEntropyLoss) else nn.functional.one_hot(labels, 3).double()
    batches = [rows if micro_batches == 1 else tuple(rows.chunk(2)) for rows in order()]
    training = LinearizedTraining(
        module, (inputs, targets), lr=rate, loss=loss, batches=batches, progress=False, **options
    )
    model = LinearModel(module, inputs)
    used = torch.cat(
        [torch.full((shape.numel(),), "spare" not in n) for n, shape in zip(model.names, model.shapes, strict=True)]
    )
    weights = model.start.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.1, **options)
    for step, rows in enumerate(order()):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        for part in rows.chunk(micro_batches):
            (loss(model.predict(weights)[part], targets[part]) / micro_batches).backward()
        optimizer.step()
        with torch.no_grad():  # without a gradient an optimizer leaves a parameter alone
            weights[~used] = model.start[~used]
        if step + 1 in (7, STEPS):
            expected = weights.detach()
            assert relative_error(flatten(training.weights(step + 1)), expected, model.start) < 1e-12
            assert relative_error(training.predictions(step + 1), model.predict(expected)) < 1e-12
            assert training.loss(step + 1) == pytest.approx(loss(model.predict(expected), targets).item(), rel=1e-12)
    assert torch.equal(flatten(training.weights(0)), model.start)  # back in time, too
    with pytest.raises(ValueError, match="Expected full-batch training"):
        training.error_bound(STEPS)
    assert training.ntk is not None
    assert training.ntk.shape == (33, 33)


def test_what_a_recorded_run_has_not_is_said() -> None:
    module, inputs, targets = make("mlp")
    training = LinearizedTraining(module, (inputs, targets), lr=0.1, batches=order(), progress=False)
    for t in (STEPS + 1, 1.5, None, -1):
        with pytest.raises(ValueError, match=f"up to {STEPS}, the number of recorded"):
            training.weights(t)
    for ask in (lambda: training.eigenvalues, lambda: training.max_learning_rate, training.follow):
        with pytest.raises(ValueError, match="replays recorded `batches`"):
            ask()


@pytest.mark.parametrize(
    "batch", [torch.tensor([11]), [0, -1], torch.tensor([0.5]), [], torch.ones(11, dtype=torch.bool)]
)
def test_batches_that_are_no_rows_are_refused(batch: object) -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match=r"the batch of step 1 to be rows of the training set, .* from 0 to 10"):
        LinearizedTraining(module, (inputs, targets), lr=0.1, batches=[[0, 1], batch], progress=False)
