import pytest
import torch
from torch import nn

from tests.kernel.agreement import assert_agrees, assert_every_method_agrees


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class SelfAttention(nn.Module):
    def __init__(self, batch_first, **options):
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        result = self.attention(x, x, x, need_weights=False)[0]
        return result if self.batch_first else result.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_self_attention(batch_first, bias, length):
    assert_agrees(SelfAttention(batch_first, bias=bias), randn(3, length, 4))


def test_both_methods(monkeypatch):
    assert_every_method_agrees(monkeypatch, SelfAttention(True), randn(4, 3, 4))


def test_extra_keys_are_contracted():
    names = ["attention.bias_k", "attention.bias_v"]
    assert_agrees(SelfAttention(True, add_bias_kv=True), randn(3, 4, 4), contracted=names)


class CrossAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x, y, z=None):
        return self.attention(x, y, y if z is None else z)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("separate", [True, False])  # one product for keys and values, or two
def test_cross_attention(bias, separate):
    inputs = randn(3, 4, 4), randn(3, 5, 4), 2 * randn(3, 5, 4)
    assert_agrees(CrossAttention(bias=bias), inputs if separate else inputs[:2])


def test_cross_attention_with_keys_of_another_size():
    assert_agrees(CrossAttention(kdim=3, vdim=2), (randn(3, 4, 4), randn(3, 5, 3), randn(3, 5, 2)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer(norm_first):
    layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True, norm_first=norm_first)
    assert_agrees(layer, (randn(4, 3, 4), randn(4, 5, 4)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(norm_first):
    layer = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True, norm_first=norm_first)
    assert_agrees(layer, randn(4, 3, 4))
