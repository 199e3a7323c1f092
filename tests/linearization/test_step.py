"""A training step as network and loss, without Lightning: gradients, buffers, random numbers and fallbacks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk.linearization import PairLoss, StepLinearization
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.pair_of_step import NoPairError, pair_of_step
from tests.linearization.test_network import CASES, problem

F = nn.functional


def batch(samples: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 5, dtype=torch.float64), torch.randint(3, (samples,))


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *layers, nn.Tanh(), nn.Linear(6, 3)).double()


def cross_entropy(module: nn.Module):
    return lambda pair: F.cross_entropy(module(pair[0]), pair[1])


def tangent(step: StepLinearization) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {name: 0.3 * torch.randn_like(value) for name, value in step.params.items()}


def close(actual: Any, expected: Any) -> bool:
    return all(torch.allclose(actual[name], value, rtol=1e-11, atol=1e-13) for name, value in expected.items())


def autograd(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_a_step_and_a_pair_are_one_loss() -> None:
    module = network()
    step = StepLinearization(module, cross_entropy(module))
    pair = PairLoss(Linearization(module), nn.CrossEntropyLoss())
    assert close(step.gradient(batch()), pair.gradient(batch()))
    assert close(step.gradient(batch(), tangent(step)), pair.gradient(batch(), tangent(step)))
    moved = {name: value + tangent(step)[name] for name, value in step.params.items()}
    assert close(step.gradient_at(batch(), moved), pair.gradient_at(batch(), moved))
    assert step.linearized_outputs == [("2", (7, 3))]
    assert step.describe() == "Linearizing the outputs of `2`, (7, 3)."


@pytest.mark.parametrize("case", CASES)
def test_weights_that_the_step_overwrites_stay(case: str) -> None:
    module, inputs, targets = problem(case)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pair = PairLoss(Linearization(module), nn.MSELoss())
    step = StepLinearization(module, lambda batch: F.mse_loss(module(batch[0]), batch[1]))
    live = {name: value.clone() for name, value in step.params.items()}
    data, moved = (inputs, targets), tangent(step)
    given = {**live, **{name: value.clone() for name, value in module.named_buffers()}}
    for _ in range(2):
        assert close(step.gradient(data, update=False), pair.gradient(data))
        assert close(step.gradient(data, moved, update=False), pair.gradient(data, moved))
        step.evaluate(data, given, moved)
        assert close(step.gradient_at(data, given), pair.gradient_at(data, given))
        assert step.first_outputs(data).loss == step.evaluate(data, given).loss == step.evaluate(data).loss
    assert all(torch.equal(value, before[name]) for name, value in (module.state_dict() | given).items())
    assert torch.equal(inputs, problem(case)[1])


def test_at_the_initial_weights_the_gradient_is_that_of_the_step_with_its_noise_and_statistics() -> None:
    module, expected = (network(nn.BatchNorm1d(6), nn.Dropout(0.4)) for _ in range(2))
    step = StepLinearization(module, cross_entropy(module))
    data = batch()
    torch.manual_seed(5)
    gradient = step.gradient(data)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(2))
    torch.manual_seed(5)
    assert close(gradient, autograd(expected, cross_entropy(expected)(data)))
    assert close(dict(module.named_buffers()), dict(expected.named_buffers()))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    live = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    step.gradient_at(batch(), live)
    step.first_outputs(batch())
    step.evaluate(batch())
    step.evaluate(batch(), live, tangent(step))
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    assert close(dict(expected.named_buffers()), before)


def test_evaluation_is_in_eval_mode_at_given_weights_and_buffers() -> None:
    module, other = (network(nn.BatchNorm1d(6), nn.Dropout(0.4)) for _ in range(2))
    step = StepLinearization(module, cross_entropy(module))
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.add_(torch.ones((), dtype=tensor.dtype))
    other.eval()
    found = step.evaluate(batch(), {**dict(other.named_parameters()), **dict(other.named_buffers())})
    assert found is not None
    assert found.loss.item() == pytest.approx(cross_entropy(other)(batch()).item(), rel=1e-12)
    (outputs,) = found.outputs
    assert torch.allclose(outputs, other(batch()[0]), rtol=1e-12)
    assert module.training
    linearized = step.evaluate(batch(), None, tangent(step))
    pair = Linearization(module.eval())
    moved = {name: value + tangent(step)[name] for name, value in step.params.items()}
    assert linearized is not None
    assert torch.allclose(linearized.outputs[0], pair(moved, batch()[0]), rtol=1e-10)


class Doubled(torch.autograd.Function):
    """A function without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, inputs):
        return 2 * inputs

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Custom(nn.Module):
    def forward(self, inputs):
        return Doubled.apply(inputs)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 6, batch_first=True)

    def forward(self, inputs):
        return self.cell(inputs[:, None].expand(-1, 3, -1))[0][:, -1]


@pytest.mark.parametrize("layer", [Custom, Recurrent, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))])
def test_networks_without_forward_mode_derivatives_take_another_way(layer) -> None:
    module = network(layer())
    step = StepLinearization(module, cross_entropy(module))
    direction = tangent(step)
    names, parameters = zip(*step.params.items(), strict=True)

    def outputs_at(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), batch()[0])

    # Two reverse passes: J v exactly, without forward mode.
    outputs, pushed = torch.autograd.functional.jvp(outputs_at, parameters, tuple(direction[name] for name in names))
    cotangent = (F.softmax(outputs + pushed, 1) - F.one_hot(batch()[1], 3)) / 7
    _, pulled = torch.autograd.functional.vjp(outputs_at, parameters, cotangent)
    actual = step.gradient(batch(), direction)
    assert actual is not None
    assert close(actual, dict(zip(names, pulled, strict=True)))


def test_regularizers_of_parameters_are_not_linearized() -> None:
    module = network()

    def penalized(pair: Any) -> Tensor:
        return cross_entropy(module)(pair) + sum(p.abs().sum() ** 2 for p in module.parameters())

    step, plain = StepLinearization(module, penalized), StepLinearization(module, cross_entropy(module))
    direction = tangent(step)
    moved = {name: (value + direction[name]).requires_grad_() for name, value in step.params.items()}
    penalty = torch.autograd.grad(sum(p.abs().sum() ** 2 for p in moved.values()), list(moved.values()))
    expected = plain.gradient(batch(), direction)
    assert expected is not None
    assert close(step.gradient(batch(), direction), {n: expected[n] + p for n, p in zip(moved, penalty, strict=True)})


def test_a_ragged_batch_finds_its_own_cut() -> None:
    module = network()

    def one_by_one(pair: Any) -> Tensor:
        losses = [F.cross_entropy(module(x[None]), y[None]) for x, y in zip(*pair, strict=True)]
        return torch.stack(losses).mean()

    step, plain = StepLinearization(module, one_by_one), StepLinearization(module, cross_entropy(module))
    for samples in (4, 3, 4):
        direction = tangent(step)
        assert close(step.gradient(batch(samples), direction), plain.gradient(batch(samples), direction))
        assert len(step.linearized_outputs) == samples


def test_what_changes_from_pass_to_pass_is_refused() -> None:
    module, calls = network(), [0]

    def changing(pair: Any) -> Tensor:
        calls[0] += 1
        outputs = module(pair[0])
        return F.cross_entropy(outputs if calls[0] % 2 else outputs * 2, pair[1])

    with pytest.raises(ValueError, match="takes the same way twice on one batch"):
        StepLinearization(module, changing).gradient(batch())


def test_pairs_are_found_in_steps() -> None:
    module = network()
    found = pair_of_step(StepLinearization(module, cross_entropy(module)), list(batch()))
    assert found.predict is None
    assert repr(found.loss) == "torch.nn.functional.cross_entropy"
    outputs, labels = module(batch()[0]), batch()[1]
    assert torch.equal(found.loss(outputs, labels), F.cross_entropy(outputs, labels))
    with pytest.raises(NoPairError, match="more than one loss function"):
        pair_of_step(StepLinearization(module, lambda pair: 2 * cross_entropy(module)(pair)), list(batch()))


SQUARED = {
    "mean over all": lambda f, y: ((f - F.one_hot(y, f.shape[1])) ** 2).mean(),
    "half a sum": lambda f, y: 0.5 * (F.one_hot(y, f.shape[1]) - f).pow(2).sum(),
    "mean over samples": lambda f, y: (f - F.one_hot(y, f.shape[1])).square().sum(1).mean(),
    "a multiple": lambda f, y: 3 * F.mse_loss(f, F.one_hot(y, f.shape[1]).to(f)),
}


@pytest.mark.parametrize("name", SQUARED)
def test_squared_losses_written_by_hand_are_found(name: str) -> None:
    module = network()
    step = StepLinearization(module, lambda pair: SQUARED[name](module(pair[0]), pair[1]))
    loss = pair_of_step(step, list(batch())).loss
    inputs, labels = batch()
    for rows in (slice(None), slice(3)):
        outputs, targets = module(inputs[rows]), F.one_hot(labels[rows], 3)
        assert torch.allclose(loss(outputs, targets), SQUARED[name](outputs, labels[rows]), rtol=1e-12)
    assert step.linearized_outputs[0][1][0] == len(inputs)


def test_a_squared_loss_of_batches_of_one_size_is_for_the_twin() -> None:
    module = network()

    def rigid(pair):
        return (module(pair[0].view(7, 5)) - F.one_hot(pair[1], 3)).square().mean()

    with pytest.raises(NoPairError, match="neither a mean nor a sum"):
        pair_of_step(StepLinearization(module, rigid), list(batch()))


@pytest.mark.parametrize(
    "other",
    [
        lambda f, y: (f - F.one_hot(y, f.shape[1])).abs().mean(),
        lambda f, y: (f - 2 * F.one_hot(y, f.shape[1])).square().mean(),
        lambda f, y: (f - F.one_hot(y, f.shape[1])).square().mean() + 0.1,
        lambda f, y: (f - F.one_hot(y, f.shape[1])).square().sum() / len(f) ** 2,
        lambda f, y: ((f - F.one_hot(y, f.shape[1])).square() * torch.arange(1, f.shape[1] + 1)).mean(),
    ],
)
def test_other_losses_are_no_squared_distance(other) -> None:
    module = network()
    step = StepLinearization(module, lambda pair: other(module(pair[0]), pair[1]))
    with pytest.raises(NoPairError):
        pair_of_step(step, list(batch()))
    assert step.linearized_outputs[0][1][0] == len(batch()[0])
