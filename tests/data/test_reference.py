"""Data sets in a fixed order, however they come."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from lightning_ntk import LinearizedTraining
from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization import Linearization
from lightning_ntk.linearization.jacobian import StreamedJacobian
from lightning_ntk.linearization.verification import check_adjoint
from tests.problems import make

X, Y = torch.randn(11, 6), torch.randn(11, 3)


class Samples(Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int):
        return X[index], Y[index]


def double_inputs(samples):
    inputs, targets = torch.utils.data.default_collate(samples)
    return 2 * inputs, targets


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        Samples(),
        TensorDataset(X, Y),
        list(zip(X, Y, strict=True)),
        Subset(Subset(TensorDataset(X.flip(0), Y.flip(0)), range(10, -1, -1)), range(11)),
        Subset(Samples(), range(11)),
        DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, drop_last=True),
        DataLoader(Samples(), sampler=WeightedRandomSampler([1.0] * 11, 5)),
        DataLoader(Samples(), batch_size=3, shuffle=True, num_workers=2),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_source_gives_all_samples_in_order(data) -> None:
    state = torch.get_rng_state()
    for _ in range(2):
        batches = list(Reference(data, batch_size=4).batches())
        assert [batch.rows for batch in batches] == [slice(0, 4), slice(4, 8), slice(8, 11)]
        assert torch.equal(torch.cat([batch.inputs for batch in batches]), X)
        assert torch.equal(torch.cat([batch.target for batch in batches]), Y)
    assert torch.equal(Reference(data).read(5, 99).inputs, X[5:])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_collate_function_of_a_loader_is_used() -> None:
    for data in (TensorDataset(X, Y), Samples()):
        (batch,) = Reference(DataLoader(data, collate_fn=double_inputs)).batches()
        assert torch.equal(batch.inputs, 2 * X)


def test_inputs_alone_and_nested_inputs() -> None:
    assert Reference(X).read(0, 2).target is None
    batch = Reference(((X, {"more": X}), Y)).read(3, 5)
    assert torch.equal(batch.inputs[1]["more"], X[3:5])


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Augmented(Samples):
    def __getitem__(self, index: int):
        return X[index] + torch.randn(6), Y[index]


class Shuffling(Samples):
    def __getitem__(self, index: int):
        return super().__getitem__(int(torch.randint(11, ())))


class DriftingWorkers(Samples):
    """Worker processes give other samples than the main process."""

    def __getitem__(self, index: int):
        shift = 0 if torch.utils.data.get_worker_info() is None else 1
        return X[(index + shift) % 11], Y[index]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "Stream can only be iterated"),
        (DataLoader(Stream()), "Stream can only be iterated"),
        (DataLoader(Samples(), batch_size=None), "batch_size=None"),
        (Samples, "Expected argument `data`"),
        ([], "empty"),
        ([{"x": X[0], "y": Y[0]}], r"a dict with the keys \['x', 'y'\]. Give `unpack"),
        (Augmented(), "random augmentation or shuffling"),
        (Shuffling(), "random augmentation or shuffling"),
        (DataLoader(DriftingWorkers(), num_workers=1), "worker processes"),
    ],
)
def test_data_without_a_fixed_order_is_refused_with_its_cause(data, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LinearizedTraining(make("mlp")[0].float(), data, lr=0.1, progress=False)


def test_dropout_left_on_is_found() -> None:
    def predict(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return module(nn.functional.dropout(inputs))  # training=True is the default

    with pytest.raises(ValueError, match="forward draws random numbers"):
        LinearizedTraining(make("mlp")[0].float(), (X, Y), lr=0.1, predict=predict, progress=False)


def test_coupled_samples_are_found() -> None:
    def predict(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return module(inputs - inputs.mean(0))

    with pytest.raises(ValueError, match="samples are coupled"):
        LinearizedTraining(make("mlp")[0].float(), (X, Y), lr=0.1, predict=predict, progress=False)


def test_data_that_changes_after_the_capture_is_found() -> None:
    inputs = X.clone()
    training = LinearizedTraining(make("mlp")[0].float(), (inputs, Y), lr=0.1, batch_size=4, progress=False)
    training.weights(3)
    inputs.copy_(inputs.roll(1, 0))
    with pytest.raises(RuntimeError, match="changed its content or order"):
        training.weights(4)


def test_a_wrong_derivative_is_found() -> None:
    class Straight(torch.autograd.Function):
        """Rounds, with the gradient of the identity in reverse mode and of its double in forward mode."""

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent

    module, inputs, _ = make("mlp")
    linearization = Linearization(module, predict=lambda m, x: Straight.apply(m(x)))
    outputs = linearization.predict(inputs)
    with pytest.raises(RuntimeError, match="wrong derivative"):
        check_adjoint(linearization, StreamedJacobian(linearization, Reference(inputs), outputs), outputs)
