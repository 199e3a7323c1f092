"""What a progress bar is told adds up to what it was told at first."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization import Linearization
from lightning_ntk.utilities.progress import track_operations


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


NETWORK = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))


@pytest.mark.parametrize("method", ["structured", "contraction"])
@pytest.mark.parametrize("columns", [None, 5, 301])
@pytest.mark.parametrize("memory_limit", [1, 30_000, 1 << 32])
def test_operations_add_up_to_the_total(monkeypatch, method, columns, memory_limit):
    totals, steps = [], []

    @contextmanager
    def spy(description, *, total, enabled):
        totals.append(total)
        yield steps.append

    monkeypatch.setattr("lightning_ntk.kernel.assembly.track_operations", spy)
    samples = 203
    if memory_limit == 1:  # sample by sample
        samples, columns = 7, columns and columns % 10
    other = None if columns is None else Reference(randn(columns, 1, 4))
    compute_kernel(
        Linearization(NETWORK), Reference(randn(samples, 1, 4)), other, method=method, memory_limit=memory_limit
    )
    assert sum(steps) == pytest.approx(totals[0])
    assert all(step > 0 for step in steps)
    assert len(steps) > 1


def test_less_memory_means_more_operations(monkeypatch):
    totals = []

    @contextmanager
    def spy(description, *, total, enabled):
        totals.append(total)
        yield lambda operations: None

    monkeypatch.setattr("lightning_ntk.kernel.assembly.track_operations", spy)
    for memory_limit in (1, 1 << 32):
        compute_kernel(Linearization(NETWORK), Reference(randn(20, 1, 4)), memory_limit=memory_limit)
    assert totals[0] > totals[1]


def test_the_bar_shows_the_share_of_the_operations(monkeypatch, capsys):
    monkeypatch.setattr("lightning_ntk.utilities.progress.DELAY_SECONDS", 0)
    with track_operations("some work", total=4e12) as advance:
        advance(1e12)
    shown = capsys.readouterr().err
    assert "some work" in shown
    with track_operations("some work", total=4e12, enabled=False) as advance:
        advance(1e12)
    assert capsys.readouterr().err == ""
