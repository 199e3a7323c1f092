"""One test for every plausible mistake that changes the logged distance without looking wrong.

The mistakes are made here, by hand, on a real comparison: each must move the number far beyond the tolerance to which the
package agrees with brute force, so that the other tests would notice it, and the package must not make it.
"""

import pytest
import torch
from torch import nn

from lightning_ntk import Linearization, LinearizedTraining
from lightning_ntk.comparison.scalars import compare_weights
from lightning_ntk.data.reference import Reference
from lightning_ntk.functional.weights import difference
from tests.problems import LinearModel, flatten, make

LR, STEPS = 0.3, 60


def train(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, **options: float) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(inputs), targets).backward()
        optimizer.step()


def relative_distance(trained: torch.Tensor, linearized: torch.Tensor, start: torch.Tensor) -> float:
    return ((trained - linearized).norm() / (trained - start).norm()).item()


def compared(training: LinearizedTraining, steps: int, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    return compare_weights(difference(weights, training.initial_weights), training.displacement(steps))


class Run:
    """A trained network, brute force for its linearization, and what the package logs."""

    def __init__(self, network: str = "mlp", outputs: int = 3, *, module: nn.Module | None = None) -> None:
        self.module, self.inputs, self.targets = make(network, outputs)
        self.module = (self.module if module is None else module).eval()
        self.model = LinearModel(self.module, self.inputs)
        self.training = LinearizedTraining(
            self.module, (self.inputs, self.targets), lr=LR, batch_size=4, progress=False
        )
        train(self.module, self.inputs, self.targets)
        weights = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.trained = flatten(weights).detach()
        self.logged = compared(self.training, STEPS, weights)["relative_weight_distance"]
        self.right = self.distance_to(self.model.train(self.targets, nn.MSELoss(), STEPS, lr=LR))

    def distance_to(self, linearized: torch.Tensor) -> float:
        return relative_distance(self.trained, linearized, self.model.start)

    def check(self, mistaken: torch.Tensor) -> None:
        assert self.logged == pytest.approx(self.right, rel=1e-9)
        assert abs(self.distance_to(mistaken) - self.right) > 0.01


def test_factor_two_of_the_mean_squared_error() -> None:
    run = Run()
    run.check(run.model.train(run.targets, lambda f, y: 0.5 * nn.functional.mse_loss(f, y), STEPS, lr=LR))


def test_products_at_the_trained_weights() -> None:
    run = Run()
    coefficients = run.training.state(STEPS).coefficients.flatten()
    at_trained = LinearModel(run.module, run.inputs).jacobian
    run.check(run.model.start + at_trained.T @ coefficients)


def test_aliased_initial_weights() -> None:
    run = Run()
    assert not torch.equal(flatten(run.training.initial_weights), run.trained)
    assert torch.equal(flatten(run.training.initial_weights), run.model.start)
    for live, name in zip(run.module.parameters(), run.training.initial_weights, strict=True):
        assert run.training.initial_weights[name].data_ptr() != live.data_ptr()


def test_batch_norm_in_train_mode_for_the_passes() -> None:
    run = Run("conv")
    module, inputs, targets = make("conv")
    statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.norm.train()
    module.dropout.eval()
    linearization = Linearization(module)
    linearization.vjp(torch.ones_like(targets), inputs)
    assert module.norm.training
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in module.named_buffers())
    alone = module.eval()(inputs).detach()
    torch.testing.assert_close(linearization.predict(inputs), alone)
    assert (module.train()(inputs) - alone).norm() > 0.01 * alone.norm()
    assert run.logged == pytest.approx(run.right, rel=1e-9)


def test_trained_buffers() -> None:
    module, inputs, _ = make("conv")
    linearization = Linearization(module)
    before = linearization.predict(inputs)
    module.norm(torch.randn(9, 4, 1, 2).double() + 3)  # a step in train mode moves the running statistics
    assert torch.equal(linearization.predict(inputs), before)
    assert (Linearization(module).predict(inputs) - before).norm() > 0.01 * before.norm()


def test_samples_in_another_order_and_rows_of_outputs_first() -> None:
    run = Run()
    coefficients = run.training.state(STEPS).coefficients
    run.check(run.model.start + run.model.jacobian.T @ coefficients.roll(1, 0).flatten())
    run.check(run.model.start + run.model.jacobian.T @ coefficients.T.flatten())


def test_last_batch_dropped() -> None:
    run = Run()
    coefficients = run.training.state(STEPS).coefficients.clone()
    assert [batch.rows.stop for batch in run.training.reference.batches()][-1] == len(run.inputs) == 11
    coefficients[8:] = 0
    run.check(run.model.start + run.model.jacobian.T @ coefficients.flatten())


def test_class_labels_as_numbers() -> None:
    module, inputs, _ = make("mlp")
    labels = torch.arange(11) % 3
    one_hot = LinearizedTraining(module, (inputs, labels), lr=LR, progress=False).targets
    assert torch.equal(one_hot, nn.functional.one_hot(labels, 3).double())
    with pytest.raises(ValueError, match="shape of the outputs"):  # (11, 1) - (11,) would broadcast to (11, 11)
        LinearizedTraining(make("mlp", 1)[0], (inputs, labels), lr=LR, progress=False)


def test_active_dropout() -> None:
    module, inputs, _ = make("conv")
    assert not torch.equal(module(inputs), module(inputs))
    linearization = Linearization(module)
    assert torch.equal(linearization.predict(inputs), linearization.predict(inputs))


def test_every_name_of_a_weight_shares_its_storage_unless_cloned() -> None:
    module = nn.Linear(2, 2)
    for alias in (module.weight.detach(), module.state_dict()["weight"], module.weight.cpu(), module.weight.float()):
        assert alias.data_ptr() == module.weight.data_ptr()
    assert Linearization(module).params["weight"].data_ptr() != module.weight.data_ptr()


def test_silent_untying_of_tied_weights() -> None:
    run = Run("tied")
    assert "second.weight" not in run.training.initial_weights
    assert run.logged == pytest.approx(run.right, rel=1e-9)


def test_distances_without_forming_the_weights_cancel() -> None:
    """The shortcut through J Delta is right in exact arithmetic only; the logged form keeps its digits in float32."""
    module, inputs, targets = make("mlp")
    single, double = module.float(), (inputs.float(), targets.float())
    training = LinearizedTraining(single, double, lr=1e-4, progress=False)
    exact = LinearizedTraining(single, double, lr=1e-4, dtype=torch.float64, progress=False)
    optimizer = torch.optim.SGD(single.parameters(), lr=1e-4)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.mse_loss(single(double[0]), double[1]).backward()
        optimizer.step()
    weights = dict(single.named_parameters())
    right = compared(exact, 40, weights)["weight_distance"]
    logged = compared(training, 40, weights)["weight_distance"]
    displacement = {n: p.detach() - training.initial_weights[n] for n, p in weights.items()}
    a = training.state(40).coefficients.float()
    linearized = training.problem.jacobian.vjp(a.unsqueeze(0))
    pushed = training.problem.jacobian.jvp(displacement).float()
    square = flatten(linearized).float().square().sum() - 2 * (a * pushed).sum() + flatten(displacement).square().sum()
    assert abs(square.clamp_min(0).sqrt().item() - right) > 20 * abs(logged - right)
    assert logged == pytest.approx(right, rel=1e-2)


def test_reading_data_does_not_advance_the_random_state() -> None:
    from torch.utils.data import DataLoader, Subset, TensorDataset

    data = Subset(TensorDataset(torch.randn(5, 2), torch.randn(5, 1)), [0, 2, 4])
    loader = DataLoader(data, shuffle=True, collate_fn=lambda samples: torch.utils.data.default_collate(samples))
    state = torch.get_rng_state()
    list(Reference(loader).batches())
    assert torch.equal(torch.get_rng_state(), state)
    list(loader)
    assert not torch.equal(torch.get_rng_state(), state)
