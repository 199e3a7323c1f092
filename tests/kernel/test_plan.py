"""Batches that differ from the samples on which the plan was made."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization import Linearization
from tests.kernel.agreement import relative_error

LENGTHS = [3, 2, 3, 5, 4, 6, 2]


class Sequences(Dataset):
    """Sequences of unequal length."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return torch.randn(LENGTHS[index], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(index))


def pad(sequences):
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True)


class Network(nn.Module):
    """Zeros appended to a sequence change nothing, unless `middle` treats long ones differently."""

    def __init__(self, middle=None):
        super().__init__()
        self.first, self.square, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.places = nn.Parameter(torch.randn(8, 4))
        self.middle = middle or (lambda network, hidden, long: network.square(hidden))

    def forward(self, x):
        hidden = (self.first(x) + self.places[: x.shape[1]]).tanh()
        hidden = self.middle(self, hidden, x.shape[1] > 3).tanh()
        return self.last((hidden * x.abs().sum(2, keepdim=True).sign()).sum(1))


@pytest.fixture(autouse=True)
def two_samples_a_pass(monkeypatch):
    monkeypatch.setattr("lightning_ntk.kernel.assembly._PASS_SAMPLES", 2)
    torch.manual_seed(0)


def kernels(network, memory_limit=1 << 32):
    linearization = Linearization(network.double())
    rows = Reference(DataLoader(Sequences(), collate_fn=pad))
    methods = ("structured", "contraction")
    return [compute_kernel(linearization, rows, method=m, memory_limit=memory_limit) for m in methods]


@pytest.mark.filterwarnings("error:.*contraction instead")
@pytest.mark.parametrize("memory_limit", [1, 1 << 32])
def test_sequences_padded_to_the_longest_of_their_batch(memory_limit):
    assert relative_error(*kernels(Network(), memory_limit)) < 1e-10


CHANGES = {
    "without a rule": (
        lambda network, hidden, long: network.square(hidden) * (torch.sin(network.square.bias) if long else 1),
        r"use the parameters \['square\.bias'\] differently",
    ),
    "not at all": (
        lambda network, hidden, long: network.square(hidden) if long else hidden,
        r"use the parameters \['square\.bias', 'square\.weight'\] differently from others",
    ),
    "one by one": (
        lambda network, hidden, long: (
            hidden @ network.square.weight.T + network.square.bias if long else network.square(hidden)
        ),
        "use the parameters differently",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_used_differently_by_some_samples(change):
    middle, message = CHANGES[change]
    with pytest.warns(UserWarning, match=f"{message}.*The whole kernel is computed by contraction instead"):
        structured, contracted = kernels(Network(middle))
    assert relative_error(structured, contracted) < 1e-10
