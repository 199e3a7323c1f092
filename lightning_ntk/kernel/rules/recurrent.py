"""Runs fused recurrent functions step by step.

The rules then see the products with their weights.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Cell: TypeAlias = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]


def _lstm(inputs: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    hidden, cell = state
    i, f, g, o = (inputs + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(inputs: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    (hidden,) = state
    reset, update, new = inputs.chunk(3, -1)
    hidden_reset, hidden_update, hidden_new = F.linear(hidden, weight, bias).chunk(3, -1)
    update = (update + hidden_update).sigmoid()
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return ((1 - update) * new + update * hidden,)


def _elman(activation: Callable[[Tensor], Tensor]) -> Cell:
    def step(inputs: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return (activation(inputs + F.linear(state[0], weight, bias)),)

    return step


def _unroll_cell(cell: Cell) -> Callable[..., Any]:
    """The step of an `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`."""

    def run(
        inputs: Tensor,
        state: Tensor | tuple[Tensor, ...],
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
    ) -> Any:
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        result = cell(F.linear(inputs, weight_ih, bias_ih), states, weight_hh, bias_hh)
        return result[0] if isinstance(state, Tensor) else result

    return run


def _unroll_sequence(cell: Cell) -> Callable[..., Any]:
    """All layers, directions and steps of an `nn.LSTM`, `nn.GRU` or `nn.RNN`."""

    def run(inputs: Tensor, state: Any, *rest: Any) -> Any:
        if not isinstance(rest[0], list | tuple):
            return NotImplemented  # packed sequences
        weights, has_bias, layers, dropout, train, bidirectional, batch_first = rest
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        if each != (4 if has_bias else 2) or (train and dropout):
            return NotImplemented  # projected hidden states; random outputs
        sequence = inputs.transpose(0, 1) if batch_first else inputs
        last: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            runs = []
            for direction in range(directions):
                index = layer * directions + direction
                weight_ih, weight_hh, *biases = weights[index * each : (index + 1) * each]
                bias_ih, bias_hh = biases or (None, None)
                steps = F.linear(sequence, weight_ih, bias_ih).unbind(0)
                current = tuple(s[index] for s in states)
                outputs = []
                for step in reversed(steps) if direction else steps:
                    current = cell(step, current, weight_hh, bias_hh)
                    outputs.append(current[0])
                runs.append(torch.stack(outputs[::-1] if direction else outputs))
                last.append(current)
            sequence = torch.cat(runs, -1)
        finals = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return (sequence.transpose(0, 1) if batch_first else sequence, *finals)

    return run


UNROLLED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm_cell: _unroll_cell(_lstm),
    torch.gru_cell: _unroll_cell(_gru),
    torch.rnn_tanh_cell: _unroll_cell(_elman(torch.tanh)),
    torch.rnn_relu_cell: _unroll_cell(_elman(torch.relu)),
    torch.lstm: _unroll_sequence(_lstm),
    torch.gru: _unroll_sequence(_gru),
    torch.rnn_tanh: _unroll_sequence(_elman(torch.tanh)),
    torch.rnn_relu: _unroll_sequence(_elman(torch.relu)),
}
"""What a fused function computes, in terms of functions that have rules; NotImplemented for calls not covered."""
