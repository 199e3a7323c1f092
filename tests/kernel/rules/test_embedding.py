import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.kernel.agreement import assert_agrees, assert_every_method_agrees

TOKENS = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(0))


def test_both_methods(monkeypatch):
    assert_every_method_agrees(monkeypatch, nn.Embedding(6, 3), TOKENS)


def test_one_token_a_sample():
    assert_agrees(nn.Embedding(6, 3), TOKENS[:, 0])


def test_padding_has_no_gradient():
    for padding in (2, -1):
        assert_agrees(nn.Embedding(6, 3, padding_idx=padding), TOKENS)


class Positions(nn.Module):
    """Tokens, and positions which are looked up for all samples at once."""

    def __init__(self, indices, combine, **options):
        super().__init__()
        self.tokens, self.places = nn.Embedding(6, 3), nn.Embedding(7, 3, **options)
        self.register_buffer("all_indices", torch.arange(7))
        self.indices, self.combine = indices, combine

    def forward(self, x):
        return self.combine(self.tokens(x), self.places(self.indices(x, self.all_indices)))


INDICES = {
    "as many as tokens": lambda x, buffer: torch.arange(x.shape[1]),
    "with an axis for samples": lambda x, buffer: buffer[: x.shape[1]].unsqueeze(0),
    "repeated": lambda x, buffer: buffer[: x.shape[1]] // 2,
    "expanded": lambda x, buffer: buffer[: x.shape[1]].expand(x.shape),
    "from the batch": lambda x, buffer: torch.ones_like(x).cumsum(1),
    "written into": lambda x, buffer: write(x),
    "one": lambda x, buffer: buffer[3],
}


def write(x):
    indices = torch.zeros(x.shape[0], x.shape[1], dtype=torch.long)
    indices[:] = x
    return indices


@pytest.mark.parametrize("combine", [torch.add, torch.mul])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("samples", [1, 4, 5])  # 4 is the number of tokens too
def test_positions(indices, combine, samples):
    assert_agrees(Positions(indices, combine), TOKENS[:samples])


def test_positions_with_padding_are_contracted():
    module = Positions(INDICES["as many as tokens"], torch.add, padding_idx=1)
    assert_agrees(module, TOKENS, contracted=["places.weight"])


def test_positions_looked_up_by_keyword():
    class Keywords(Positions):
        def forward(self, x):
            return self.tokens(x) + F.embedding(weight=self.places.weight, input=torch.arange(x.shape[1]))

    assert_agrees(Keywords(None, None), TOKENS)


def test_one_index_a_sample_from_the_batch_is_not_a_position():
    # The batch of consecutive indices looks like positions.
    assert_agrees(nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)), torch.arange(6))


def test_unreproducible_gradients_are_left_to_the_contraction():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Embedding(6, 3, scale_grad_by_freq=True), nn.Embedding(6, 3)

        def forward(self, x):
            return self.second(x)

    assert_agrees(Two(), TOKENS)
