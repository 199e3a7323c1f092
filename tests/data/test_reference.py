"""Data sets in a fixed order, however they come."""

import multiprocessing
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from lightning_ntk import LinearizedTraining, empirical_ntk
from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization import Linearization
from lightning_ntk.linearization.jacobian import StreamedJacobian
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.linearization.verification import check_adjoint
from tests.problems import make

# The same in worker processes, which import this file again from Python 3.14 on.
X, Y = torch.randn(11, 9, generator=torch.Generator().manual_seed(0)).split([6, 3], 1)


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


class Scaled(TensorDataset):
    """Reads its tensors in its own way."""

    def __getitem__(self, index: int):
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target


class ScaledTogether(TensorDataset):
    def __getitems__(self, indices: list[int]):
        return [(2 * self.tensors[0][i], self.tensors[1][i]) for i in indices]


class ScaledSubset(Subset):
    def __getitem__(self, index: int):
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target

    def __getitems__(self, indices: list[int]):
        return [self[i] for i in indices]


@pytest.mark.parametrize(
    "data",
    [
        Scaled(X, Y),
        ScaledTogether(X, Y),
        DataLoader(Scaled(X, Y), batch_size=3),
        Subset(Scaled(X, Y), range(11)),
        ScaledSubset(TensorDataset(X, Y), range(11)),
        Subset(ScaledSubset(TensorDataset(X, Y), range(11)), range(11)),
    ],
    ids=lambda data: type(data).__name__,
)
def test_subclasses_read_their_samples_in_their_own_way(data) -> None:
    (batch,) = Reference(data).batches()
    assert torch.equal(batch.inputs, 2 * X)
    module = nn.Linear(6, 3)
    torch.testing.assert_close(empirical_ntk(module, data), empirical_ntk(module, 2 * X))


def test_a_batch_sampler_says_nothing_about_the_data() -> None:
    loader = DataLoader(Samples(), batch_sampler=[[5, 2], [7]])
    assert torch.equal(Reference(loader).read(0, 11).inputs, X)


def test_ranges_of_rows() -> None:
    for data in ((X, Y), Samples()):
        reference = Reference(data, batch_size=4)
        batches = list(reference.batches(range(2), range(0), range(2, 9), range(9, 11)))
        assert [batch.rows for batch in batches] == [slice(0, 2), slice(2, 6), slice(6, 9), slice(9, 11)]
        assert torch.equal(torch.cat([batch.inputs for batch in batches]), X)
        assert list(reference.batches(range(3, 3))) == []


class Workers(Samples):
    """The target is the process that reads, and what it was told at its start."""

    told = 0

    def __getitem__(self, index: int):
        return X[index], torch.tensor([os.getpid(), self.told])


def tell(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.told = 5 + worker


class Counting(type(multiprocessing.get_context("fork"))):
    """Counts the processes that are started."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def Process(self, *arguments, **options):
        self.started += 1
        return super().Process(*arguments, **options)


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_are_those_of_the_loader(persistent: bool) -> None:
    context = Counting()
    loader = DataLoader(
        Workers(), num_workers=2, worker_init_fn=tell, multiprocessing_context=context, persistent_workers=persistent,
        prefetch_factor=3, timeout=60,
    )  # fmt: skip
    reference, pids = Reference(loader, batch_size=4), []
    for rows in (range(11), range(1, 9), range(11)):
        batches = list(reference.batches(rows))
        assert torch.equal(torch.cat([batch.inputs for batch in batches]), X[rows.start : rows.stop])
        assert {told for batch in batches for told in batch.target[:, 1].tolist()} == {5, 6}
        pids.append({pid for batch in batches for pid in batch.target[:, 0].tolist()})
    assert context.started == (2 if persistent else 6)
    assert (pids[0] == pids[1] == pids[2]) == persistent
    next(iter(reference.batches()))  # given up
    assert [batch.rows for batch in reference.batches()] == [slice(0, 4), slice(4, 8), slice(8, 11)]
    assert reference.read(0, 2).target.tolist() == [[os.getpid(), 0]] * 2


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
        ({"x": X, "y": Y}, "Expected argument `data` .* but got dict"),
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
        check_adjoint(linearization, StreamedJacobian(DataPasses(linearization, Reference(inputs)), outputs), outputs)


@pytest.mark.parametrize("kind", ["tensors", "subset"])
def test_batches_may_be_written_into(kind: str) -> None:
    inputs, targets = torch.ones(5, 2), torch.ones(5)
    data = Subset(TensorDataset(inputs, targets), range(4)) if kind == "subset" else (inputs, targets)
    reference = Reference(data, batch_size=2, unpack=lambda batch: (batch[0].div_(4), batch[1].neg_()))
    for _ in range(2):
        assert all((batch.inputs == 0.25).all() and (batch.target == -1).all() for batch in reference.batches())
    assert (inputs == 1).all()
    assert (targets == 1).all()
