import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.kernel.agreement import assert_agrees, assert_every_method_agrees


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@settings(max_examples=20, deadline=None)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    bias=st.booleans(),
)
def test_convolution(axes, kernel, stride, padding, dilation, groups, bias):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    assert_agrees(CONVOLUTIONS[axes](2, 4, kernel, **options), randn(3, 2, *[6, 5, 5][:axes]))


@settings(max_examples=20, deadline=None)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    longer=st.booleans(),
)
def test_transposed_convolution(axes, kernel, stride, padding, dilation, groups, longer):
    extra = int(longer and max(stride, dilation) > 1)
    options = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation, "groups": groups}
    assert_agrees(TRANSPOSED[axes](2, 4, kernel, **options), randn(3, 2, *[4, 3, 3][:axes]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["same", "valid", (1, 0)])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_padding(padding, mode):
    assert_agrees(nn.Conv2d(2, 3, (2, 3), padding=padding, padding_mode=mode), randn(3, 2, 4, 5))


@pytest.mark.parametrize("groups", [1, 2])
def test_both_methods(monkeypatch, groups):
    network = nn.Sequential(nn.Conv1d(2, 4, 3, groups=groups), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2, groups=groups))
    assert_every_method_agrees(monkeypatch, network, randn(4, 2, 6))


def test_frames_folded_into_the_samples():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    assert_agrees(Frames(), randn(3, 4, 1, 4, 4))
