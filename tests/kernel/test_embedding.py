import torch
from torch import nn

from tests.kernel.agreement import assert_agrees, assert_every_method_agrees

TOKENS = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(0))


def test_both_methods(monkeypatch):
    assert_every_method_agrees(monkeypatch, nn.Embedding(6, 3), TOKENS)


def test_one_token_a_sample():
    assert_agrees(nn.Embedding(6, 3), TOKENS[:, 0])


def test_padding_has_no_gradient():
    for padding in (2, -1):
        assert_agrees(nn.Embedding(6, 3, padding_idx=padding), TOKENS)


def test_embedding_without_samples_is_contracted():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(6, 3), nn.Embedding(4, 3)

        def forward(self, x):
            return self.tokens(x) * self.places(torch.arange(4))

    assert_agrees(Positions(), TOKENS, contracted=["places.weight"])


def test_unreproducible_gradients_are_left_to_the_contraction():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Embedding(6, 3, scale_grad_by_freq=True), nn.Embedding(6, 3)

        def forward(self, x):
            return self.second(x)

    assert_agrees(Two(), TOKENS)
