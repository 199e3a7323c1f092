import pytest
import torch
from torch import nn

from tests.kernel.agreement import assert_agrees


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Sequence(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.batch_first = options.get("batch_first", False)
        self.layer = kind(2, 3, **options)

    def forward(self, x):
        result, state = self.layer(x if self.batch_first else x.transpose(0, 1))
        hidden = state[0] if isinstance(state, tuple) else state
        return torch.cat(
            [
                result if self.batch_first else result.transpose(0, 1),
                hidden.transpose(0, 1).repeat(1, 1, result.shape[2] // 3),
            ],
            1,
        )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["plain", "batch first", "deep and bidirectional", "no bias"],
)
def test_sequences(kind, options):
    assert_agrees(Sequence(kind, **options), randn(4, 5, 2))


def test_relu():
    assert_agrees(Sequence(nn.RNN, nonlinearity="relu"), randn(4, 5, 2))


def test_projected_states_are_contracted():
    names = [f"layer.{name}" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")]

    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(2, 3, proj_size=2, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    assert_agrees(Projected(), randn(3, 4, 2), contracted=names)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(2, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state[0] if isinstance(state, tuple) else state

    assert_agrees(Steps(), randn(4, 3, 2))
