import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.kernel.agreement import assert_agrees, assert_every_method_agrees


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=15, deadline=None)
@given(
    samples=st.integers(1, 5),
    positions=st.lists(st.integers(1, 4), max_size=2),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
)
def test_any_number_of_positions(samples, positions, size, bias):
    assert_agrees(nn.Linear(*size, bias=bias), randn(samples, *positions, size[0]))


@pytest.mark.parametrize("positions", [(), (5,)])
def test_both_methods(monkeypatch, positions):
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert_every_method_agrees(monkeypatch, network, randn(4, *positions, 3))


def test_last_layer_gives_the_outputs_themselves():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert_agrees(network, randn(5, 3), predict=None, others=randn(7, 3))


def test_single_flat_output():
    assert_agrees(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), randn(5, 3), predict=None)


def test_layer_called_several_times():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    assert_agrees(Twice(), randn(4, 3))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_samples_on_another_axis(axis):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x.movedim(0, axis)).movedim(axis, 0)

    assert_agrees(Moved(), randn(3, 3, 3, 2))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_samples_and_positions_flattened_together(order):
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            rows = x.permute(*order, 2)
            return self.layer(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).permute(*order, 2)

    assert_agrees(Flattened(), randn(4, 4, 2))


def test_frozen_weight_contributes_nothing():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network[0].weight.requires_grad_(False)
    assert_agrees(network, randn(4, 3))


def test_parameters_in_matrix_products():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(3, 4))
            self.second = nn.Parameter(torch.randn(4, 2))
            self.bias = nn.Parameter(torch.randn(2))

        def forward(self, x):
            return torch.addmm(self.bias, (x @ self.first).tanh(), self.second)

    assert_agrees(Products(), randn(4, 3))


def test_bilinear():
    assert_agrees(nn.Bilinear(2, 3, 4), (randn(4, 2), randn(4, 3)))


def test_operation_in_place_on_the_output():
    assert_agrees(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), randn(4, 3))
