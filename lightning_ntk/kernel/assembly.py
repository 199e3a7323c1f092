"""The kernel from per-layer factors, assembled tile by tile.

Rules: layers.py. Which parameters they cover, and their verification: plan.py.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.factors import Factors, add_block, cat_factors
from lightning_ntk.kernel.per_sample import contraction_kernel
from lightning_ntk.kernel.plan import Plan, PlanChangedError, collect, make_plan
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.memory import empty_matrix, mirror_upper_
from lightning_ntk.utilities.progress import track_operations

# Samples in one pass, at most, whatever memory allows: larger batches are not faster.
_PASS_SAMPLES = 256
# Rows and columns of the kernel in one tile, which stays in a CPU's cache from one Hadamard product to the next.
_TILE_ROWS, _TILE_COLUMNS = 512, 2560
# Strips of a symmetric kernel, at least: the squares on its diagonal are computed whole.
_STRIPS = 8


class Tile(NamedTuple):
    """The samples of a tile: `rows` from the first data set, `columns` from the second."""

    rows: range
    columns: range

    @property
    def pairs(self) -> int:
        """Pairs of samples."""
        return len(self.rows) * len(self.columns)


def structured_kernel(
    linearization: Linearization,
    rows: Reference,
    columns: Reference | None,
    *,
    num_outputs: int,
    memory_limit: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Tensor:
    """The kernel between two data sets, or of one with itself (half of it computed, the other half mirrored).

    Parameters that a rule covers enter through the factors of their layer, all others through per-sample Jacobians.

    Args:
        linearization: The network.
        rows: The first data set, N1 samples.
        columns: The second one, N2 samples, or None for the first one again.
        num_outputs: K.
        memory_limit: Bytes for the factors. Where they do not fit, those of two blocks of samples are held at a time and
            made again when they are needed again.
        dtype: Type in which the products are summed. Default: that of the passes.
        device: Where the kernel is kept, tile by tile as it is made. Default: with the passes.
        progress: Whether to show a progress bar.
        processes: The processes that share the tiles; each one holds the whole kernel in the end.

    Returns:
        The kernel `(N1 K, N2 K)`, in `dtype`.

    Warns:
        UserWarning: If a rule disagrees with plain autograd; its parameters are then contracted.
    """
    try:
        with processes.agreement():
            plan = make_plan(linearization, rows, columns)
            return _assemble(
                linearization, rows, columns, plan, num_outputs, memory_limit, dtype or linearization.dtype,
                device or linearization.device, progress, processes,
            )  # fmt: skip
    except PlanChangedError as reason:
        warnings.warn(f"{reason} The whole kernel is computed by contraction instead.", stacklevel=3)
    return contraction_kernel(
        linearization,
        rows,
        columns,
        num_outputs=num_outputs,
        memory_limit=memory_limit,
        dtype=dtype,
        device=device,
        progress=progress,
        processes=processes,
    )


def _assemble(
    linearization: Linearization,
    rows: Reference,
    columns: Reference | None,
    plan: Plan,
    num_outputs: int,
    memory_limit: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    processes: Processes,
) -> Tensor:
    symmetric = columns is None
    columns = rows if columns is None else columns
    kernel = empty_matrix(len(rows) * num_outputs, len(columns) * num_outputs, dtype=dtype, device=device)
    pass_size = max(1, min(memory_limit // 4 // max(plan.pass_bytes, 1), _PASS_SAMPLES))
    factor_bytes = plan.factor_bytes * dtype.itemsize // linearization.dtype.itemsize
    size = _block_size(len(rows), len(columns), symmetric, factor_bytes, memory_limit - memory_limit // 4)
    pairs = [
        (first, second)
        for first in _ranges(0, len(rows), size)
        for second in _ranges(0, len(columns), size)
        if not symmetric or first.start <= second.start
    ]
    tile_rows = max(1, _TILE_ROWS // num_outputs)
    if symmetric:
        tile_rows = min(tile_rows, -(-len(rows) // _STRIPS))
    tile_columns = max(1, _TILE_COLUMNS // num_outputs)
    grids = [_tiles(first, second, symmetric, tile_rows, tile_columns) for first, second in pairs]
    shares = _shares(grids, processes.size)

    def factors(data: Reference, block: range) -> Factors:
        parts = []
        for part in _ranges(block.start, block.stop, pass_size):
            parts.append(collect(linearization, data.read(part.start, part.stop).inputs, plan).to(dtype))
            advance(plan.cost.total(samples=len(part), pairs=0))
        return cat_factors(parts)

    # With several blocks the processes do not come to the same one at the same time.
    divided = symmetric and len(pairs) == 1 and 1 < processes.size <= len(rows)

    def left_factors(block: range) -> Factors:
        if not divided:
            return factors(rows, block)
        return _gather(factors(rows, processes.rows(len(rows))), processes, len(rows)) or factors(rows, block)

    def blocks() -> Iterator[tuple[Tile, Factors, Factors]]:
        held: tuple[range, Factors] | None = None
        for (first, second), share in zip(pairs, shares, strict=True):
            grid = [tile for owner, tile in share if owner == processes.rank]
            if not grid and not divided:
                continue
            if held is None or held[0] != first:
                held = None  # freed before the next block is made
                held = (first, left_factors(first))
            left = held[1]
            right = left if symmetric and first == second else factors(columns, second)
            for tile in grid:
                i, j = tile.rows.start - first.start, tile.columns.start - second.start
                yield tile, left.narrow(i, i + len(tile.rows)), right.narrow(j, j + len(tile.columns))

    # Memory that is used again is in the cache.
    scratch = torch.empty(tile_rows * tile_columns * num_outputs**2, dtype=dtype, device=linearization.device)
    own = [[tile for owner, tile in share if owner == processes.rank] for share in shares]
    total = _total_operations(plan, list(zip(pairs, own, strict=True)), symmetric)
    if divided:
        total -= plan.cost.total(samples=len(rows) - len(processes.rows(len(rows))), pairs=0)
    with track_operations("structured kernel", total=total, enabled=progress) as advance:
        for tile, left, right in blocks():
            block = _block(scratch, tile, num_outputs).zero_()
            add_block(block, left, right)
            _write(kernel, block, tile, symmetric)
            advance(plan.cost.total(samples=0, pairs=tile.pairs))
    if processes.size > 1:
        _exchange(kernel, chain.from_iterable(shares), scratch, num_outputs, symmetric, processes)
    if symmetric:
        for rows_of_strip in {tile.rows for grid in grids for tile in grid}:
            strip = slice(rows_of_strip.start * num_outputs, rows_of_strip.stop * num_outputs)
            mirror_upper_(kernel[strip, strip])
    return kernel


def _total_operations(plan: Plan, grids: list[tuple[tuple[range, range], list[Tile]]], symmetric: bool) -> float:
    """Multiply-adds for the tiles of this process, and for making the factors as often as they are made."""
    samples, held = 0, None
    for (first, second), grid in grids:
        if grid:
            samples += (len(first) if first != held else 0) + (0 if symmetric and first == second else len(second))
            held = first
    return plan.cost.total(samples, sum(tile.pairs for _, grid in grids for tile in grid))


def _shares(grids: list[list[Tile]], owners: int) -> list[list[tuple[int, Tile]]]:
    """The tiles with the process that computes each: consecutive ones, for few blocks of factors, of equal areas in all."""
    whole = sum(len(tile.rows) * len(tile.columns) for grid in grids for tile in grid)
    done = 0
    shares = []
    for grid in grids:
        share = []
        for tile in grid:
            rest = tile
            while rest.columns:
                owner = done * owners // whole
                # Where the share of the owner ends within a tile, the tile is divided.
                wanted = -(-(whole * (owner + 1) // owners - done) // len(rest.rows))
                count = min(len(rest.columns), max(1, wanted))
                share.append((owner, Tile(rest.rows, rest.columns[:count])))
                rest = Tile(rest.rows, rest.columns[count:])
                done += count * len(rest.rows)
        shares.append(share)
    return shares


def _gather(own: Factors, processes: Processes, samples: int) -> Factors | None:
    """The factors of all samples from those of every process's share; None if sequences differ in length between these."""
    tensors = [tensor for tensor, by_sample in own.tensors() if by_sample]
    shapes = torch.tensor([size for tensor in tensors for size in tensor.shape[1:]])
    if processes.any(not torch.equal(processes.broadcast_(shapes.clone()), shapes)):
        return None
    gathered = []
    for tensor in tensors:
        whole = tensor.new_empty(samples, *tensor.shape[1:])
        for source in range(processes.size):
            rows = replace(processes, rank=source).rows(samples)
            if source == processes.rank:
                whole[rows.start : rows.stop] = tensor
            processes.broadcast_(whole[rows.start : rows.stop], source)
        gathered.append(whole)
    return own.with_tensors(gathered)


def _exchange(
    kernel: Tensor,
    tiles: Iterable[tuple[int, Tile]],
    scratch: Tensor,
    outputs: int,
    symmetric: bool,
    processes: Processes,
) -> None:
    """Gives every process the tiles of all others: half of what a sum of whole symmetric kernels would send."""
    for owner, tile in tiles:
        block = _block(scratch, tile, outputs)
        if owner == processes.rank:
            block.flatten(2).flatten(0, 1).copy_(kernel[_slices(tile, outputs)])
        processes.broadcast_(block, owner)
        if owner != processes.rank:
            _write(kernel, block, tile, symmetric)


def _block(scratch: Tensor, tile: Tile, outputs: int) -> Tensor:
    shape = (len(tile.rows), outputs, len(tile.columns), outputs)
    return scratch[: len(tile.rows) * len(tile.columns) * outputs**2].view(shape)


def _slices(tile: Tile, outputs: int) -> tuple[slice, slice]:
    rows = slice(tile.rows.start * outputs, tile.rows.stop * outputs)
    return rows, slice(tile.columns.start * outputs, tile.columns.stop * outputs)


def _block_size(rows: int, columns: int, symmetric: bool, factor_bytes: int, limit: int) -> int:
    """Samples whose factors are held at a time: all of them, or blocks of which two fit."""
    samples = rows if symmetric else rows + columns
    if 2 * samples * factor_bytes <= limit:  # twice while they are joined
        return max(rows, columns)
    return max(1, limit // (3 * max(factor_bytes, 1)))


def _ranges(start: int, stop: int, size: int) -> list[range]:
    return [range(at, min(at + size, stop)) for at in range(start, stop, size)]


def _tiles(first: range, second: range, symmetric: bool, rows: int, columns: int) -> list[Tile]:
    """The tiles of a block; of a symmetric kernel those on and right of the diagonal."""
    return [
        Tile(strip, part)
        for strip in _ranges(first.start, first.stop, rows)
        for part in _ranges(max(second.start, strip.start) if symmetric else second.start, second.stop, columns)
    ]


def _write(kernel: Tensor, block: Tensor, tile: Tile, symmetric: bool) -> None:
    outputs = block.shape[1]
    matrix = block.flatten(2).flatten(0, 1)
    rows, columns = _slices(tile, outputs)
    kernel[rows, columns] = matrix
    if symmetric and columns.stop > rows.stop:
        mirrored = slice(max(columns.start, rows.stop), columns.stop)
        kernel[mirrored, rows] = matrix[:, mirrored.start - columns.start :].T
