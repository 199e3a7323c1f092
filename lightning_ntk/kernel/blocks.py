"""Blocks of the kernel from the factors of two blocks of samples."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ntk.kernel.factors import Factors, Gram

# Numbers in the intermediate product of a tile: few enough to stay in a cache, many enough for long matrix products.
_TILE_NUMBERS = 1 << 20
# Numbers in a piece of the Jacobians that are made when they are multiplied.
PIECE_NUMBERS = 1 << 23


def expand(first: Factors, second: Factors, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Makes the missing Jacobians `(N K, P)` of two blocks of samples.

    They come in pieces of at most `numbers` numbers each.
    """
    for left, right in zip(first.unexpanded, second.unexpanded, strict=True):
        used = [
            None if parts[0].is_floating_point() else torch.unique(torch.cat([part.flatten() for part in parts]))
            for parts in zip(*(gram.inputs for gram in (*left, *right)), strict=True)
        ]
        _, groups, _, outputs, size = left[0].gradients.shape
        width = sum(x.shape[3] if kept is None else len(kept) for x, kept in zip(left[0].inputs, used, strict=True))
        samples = max(sum(len(gram.gradients) for gram in grams) for grams in (left, right))
        step = max(1, numbers // (samples * outputs * groups * width))
        for start in range(0, size, step):
            stop = min(start + step, size)
            jacobian = torch.cat([gram.jacobian(start, stop, used) for gram in left])
            yield (
                jacobian,
                jacobian if right is left else torch.cat([gram.jacobian(start, stop, used) for gram in right]),
            )


def add_block(tile: Tensor, first: Factors, second: Factors) -> None:
    """Adds Theta of two blocks of samples to `tile`.

    The tile is `(N1, K, N2, K)` and contiguous. Jacobians that are left to `expand` are not added.
    """
    if first.readout and second.readout:
        widths = [part.matrix.shape[1] for part in (first.readout, second.readout)]
        inner = tile.new_zeros(tile.shape[0], widths[0], tile.shape[2], widths[1])
        add_block(inner, replace(first, readout=None), replace(second, readout=None))
        first.readout.add_outputs(tile, inner, second.readout)
        return
    matrix = tile.flatten(2).flatten(0, 1)
    for left, right in zip(first.jacobians, second.jacobians, strict=True):
        matrix.addmm_(left.flatten(0, 1), right.flatten(0, 1).T)
    for one, other in zip(first.grams, second.grams, strict=True):
        _add_gram_block(tile, one, other)


def _add_gram_block(tile: Tensor, first: Gram, second: Gram) -> None:
    rows, outputs, columns, _ = tile.shape
    if first.gradients.dim() == 2:
        among_outputs = (first.gradients @ second.gradients.T)[:, None, :].expand(-1, columns, -1)
        among_samples = _input_gram(first, second, 0)[:, 0, :, 0]
        _add_hadamard(tile, among_outputs.reshape(1, outputs, -1), among_samples)
        return
    _, groups, positions, _, size = first.gradients.shape
    for group in range(groups):
        inputs = _input_gram(first, second, group)
        if positions == second.gradients.shape[2] == 1:
            left = first.gradients[:, group].reshape(rows * outputs, size)
            right = second.gradients[:, group].reshape(columns * outputs, size)
            _add_hadamard(tile, (left @ right.T).view(rows, outputs, -1), inputs[:, 0, :, 0])
        else:
            _add_positions(tile, inputs, first.gradients[:, group], second.gradients[:, group])


def _input_gram(first: Gram, second: Gram, group: int) -> Tensor:
    """Inner products of inputs, `(N1, T, N2, S)`.

    They are summed over the parameters that share the gradients.
    """
    total: Tensor | None = None
    for left, right in zip(first.inputs, second.inputs, strict=True):
        left, right = left[:, group], right[:, group]
        if left.dim() == 2:
            product = (left[:, :, None, None] == right).to(first.gradients.dtype)
        else:
            product = (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _add_hadamard(tile: Tensor, gradients: Tensor, inputs: Tensor) -> None:
    # One column of the inputs' Gram for each column of the tile: broadcasting over K innermost would not be vectorized.
    inputs = inputs.repeat_interleave(tile.shape[1], dim=1).unsqueeze(1)
    tile.flatten(2).addcmul_(gradients, inputs)


def _add_positions(tile: Tensor, inputs: Tensor, first: Tensor, second: Tensor) -> None:
    """Adds sum_ts inputs[i t, j s] <first[i t k], second[j s l]>.

    The inputs' Gram is applied to the second gradients first, for T S K O operations a pair of samples; the product with
    the first gradients then takes T K^2 O instead of the T S K^2 O of a Gram matrix of all gradients.
    """
    rows, positions, outputs, size = first.shape
    columns = len(second)
    step = max(1, _TILE_NUMBERS // (positions * rows * outputs * size))
    for start in range(0, columns, step):
        block = second[start : start + step]
        width = len(block)
        # (T N1) x S times S x (K O) for each sample of the second block, into (T, N1, N2, K, O).
        mixed = first.new_empty(positions * rows, width, outputs * size)
        weights = inputs[:, :, start : start + width].transpose(0, 1).reshape(positions * rows, width, -1)
        torch.bmm(weights.transpose(0, 1), block.flatten(2), out=mixed.transpose(0, 1))
        mixed = mixed.view(positions, rows, width * outputs, size)
        total = first.new_zeros(rows, outputs, width * outputs)
        for position in range(positions):
            total.baddbmm_(first[:, position], mixed[position].transpose(1, 2))
        tile[:, :, start : start + width] += total.view(rows, outputs, width, outputs)
