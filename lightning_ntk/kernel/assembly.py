"""Assembles the kernel from factors, tile by tile.

Memory decides the number of passes.
"""

from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.blocks import PIECE_NUMBERS, add_block, expand
from lightning_ntk.kernel.collection import collect
from lightning_ntk.kernel.costs import Cost
from lightning_ntk.kernel.factors import Factors, cat_factors
from lightning_ntk.kernel.plan import Plan
from lightning_ntk.utilities.distributed import Processes
from lightning_ntk.utilities.memory import empty_matrix, mirror_upper_
from lightning_ntk.utilities.progress import track_operations

# Samples in one pass and memory for it, at most, whatever memory allows: larger batches are not faster.
_PASS_SAMPLES, _PASS_BYTES = 256, 1 << 27
# Rows and columns of the kernel in one tile, which stays in a CPU's cache from one Hadamard product to the next.
_TILE_ROWS, _TILE_COLUMNS = 512, 2560
# Strips of a symmetric kernel, at least: the squares on its diagonal are computed whole.
_STRIPS = 8


class Tile(NamedTuple):
    """A part of the kernel, by samples.

    Attributes:
        first: Samples of the first data set whose factors are held together.
        second: The same of the second data set.
        rows: The tile's samples in `first`.
        columns: Its samples in `second`.
    """

    first: range
    second: range
    rows: range
    columns: range

    @property
    def pairs(self) -> int:
        """Pairs of samples."""
        return len(self.rows) * len(self.columns)

    def narrow(self, left: Factors, right: Factors) -> tuple[Factors, Factors]:
        """The tile's part of the factors of its blocks."""
        return (
            left.narrow(self.rows.start - self.first.start, self.rows.stop - self.first.start),
            right.narrow(self.columns.start - self.second.start, self.columns.stop - self.second.start),
        )

    def place(self, outputs: int) -> tuple[slice, slice]:
        """Rows and columns of the kernel."""
        rows, columns = (slice(part.start * outputs, part.stop * outputs) for part in (self.rows, self.columns))
        return rows, columns


def assemble(
    plan: Plan, *, memory_limit: int, dtype: torch.dtype, device: torch.device, progress: bool, processes: Processes
) -> Tensor:
    """Computes the kernel `(N1 K, N2 K)` of a plan.

    That of one data set is computed above its diagonal and mirrored.

    Where the factors do not fit into `memory_limit`, those of two blocks of samples are held at a time and made again when
    they are needed again. The arguments are those of `PlannedKernel.compute`.
    """
    outputs, symmetric = plan.outputs, plan.columns is None
    columns = plan.columns or plan.rows
    cost = plan.cost
    tiles = _tiles(plan, memory_limit - memory_limit // 4, dtype)
    owners = _owners(tiles, processes)
    work: dict[range, dict[range, list[Tile]]] = {}
    for owner, tile in zip(owners, tiles, strict=True):
        if owner == processes.rank:
            work.setdefault(tile.first, {}).setdefault(tile.second, []).append(tile)
    kernel = empty_matrix(len(plan.rows) * outputs, len(columns) * outputs, dtype=dtype, device=device)
    # Memory that is used again is in the cache.
    scratch = kernel.new_empty(max(tile.pairs for tile in tiles) * outputs**2, device=plan.linearization.device)
    pass_bytes = max(cost.pass_bytes, plan.pass_bytes, 1)
    pass_size = max(1, min(min(memory_limit // 4, _PASS_BYTES) // pass_bytes, _PASS_SAMPLES))
    piece = max(1, min(memory_limit // 8 // dtype.itemsize, PIECE_NUMBERS))

    def factors(data: Reference, block: range) -> Factors:
        parts = []
        for part in _divide(block, pass_size):
            parts.append(collect(plan, data.read(part.start, part.stop).inputs).to(dtype))
            advance(cost.total(len(part), 0))
        return cat_factors(parts)

    def write(tile: Tile, matrix: Tensor) -> None:
        rows, columns = tile.place(outputs)
        kernel[rows, columns] = matrix
        if symmetric:  # now, as the tile is in the cache
            kernel[columns, rows] = matrix.T

    def multiply(tiles: list[Tile], left: Factors, right: Factors) -> None:
        """The Jacobians that are not kept, a piece at a time for all tiles."""
        for tile in tiles:
            kernel[tile.place(outputs)] = 0
        for one, other in expand(left, right, piece):
            for tile in tiles:
                rows = slice(*((edge - tile.first.start) * outputs for edge in (tile.rows.start, tile.rows.stop)))
                columns = slice(
                    *((edge - tile.second.start) * outputs for edge in (tile.columns.start, tile.columns.stop))
                )
                kernel[tile.place(outputs)] += (one[rows] @ other[columns].T).to(device)

    def fill(tiles: list[Tile], left: Factors, right: Factors) -> None:
        if left.unexpanded:
            multiply(tiles, left, right)
        for tile in tiles:
            shape = len(tile.rows), outputs, len(tile.columns), outputs
            block = scratch[: tile.pairs * outputs**2].view(shape)
            if left.unexpanded:
                block.flatten(2).flatten(0, 1).copy_(kernel[tile.place(outputs)])
            else:
                block.zero_()
            add_block(block, *tile.narrow(left, right))
            matrix = block.flatten(2).flatten(0, 1)
            if symmetric and tile.rows.start == tile.columns.start:
                mirror_upper_(matrix[:, : len(matrix)])
            write(tile, matrix)
            advance(cost.total(0, tile.pairs))

    size = f"{len(plan.rows)} samples" if symmetric else f"{len(plan.rows)} and {len(columns)} samples"
    with track_operations(f"kernel of {size}", total=_operations(work, cost, symmetric), enabled=progress) as advance:
        for first, blocks in work.items():
            left = factors(plan.rows, first)
            for second, beside in blocks.items():
                fill(beside, left, left if symmetric and second == first else factors(columns, second))
            del left  # before the next one is made
    if processes.size > 1:
        for owner, tile in zip(owners, tiles, strict=True):
            write(tile, processes.broadcast_(kernel[tile.place(outputs)].clone(), owner))
    return kernel


def _tiles(plan: Plan, factor_bytes: int, dtype: torch.dtype) -> list[Tile]:
    """The tiles, block by block of factors.

    A symmetric kernel has those on and right of the diagonal.
    """
    symmetric = plan.columns is None
    rows, columns = len(plan.rows), len(plan.columns or plan.rows)
    each = plan.cost.factor_bytes * dtype.itemsize // plan.linearization.dtype.itemsize
    # All samples, twice while they are joined; or two blocks, and a third while it is joined.
    samples = rows if symmetric else rows + columns
    size = max(rows, columns) if 2 * samples * each <= factor_bytes else max(1, factor_bytes // (3 * each))
    height = max(1, min(_TILE_ROWS // plan.outputs, -(-rows // _STRIPS) if symmetric else rows))
    width = max(1, _TILE_COLUMNS // plan.outputs)
    return [
        Tile(first, second, strip, part)
        for first, second in product(_divide(range(rows), size), _divide(range(columns), size))
        if not symmetric or first.start <= second.start
        for strip in _divide(first, height)
        for part in _divide(range(max(second.start, strip.start) if symmetric else second.start, second.stop), width)
    ]


def _owners(tiles: list[Tile], processes: Processes) -> list[int]:
    """Assigns each tile to a process.

    Each process gets consecutive tiles, which need few blocks of factors, of about equal area.
    """
    done = list(accumulate(tile.pairs for tile in tiles))
    return [(2 * end - tile.pairs) * processes.size // (2 * done[-1]) for tile, end in zip(tiles, done, strict=True)]


def _operations(work: dict[range, dict[range, list[Tile]]], cost: Cost, symmetric: bool) -> float:
    """Multiply-adds for these tiles, and for their factors as often as they are made."""
    made = pairs = 0
    for first, blocks in work.items():
        made += len(first) + sum(len(second) for second in blocks if not symmetric or second != first)
        pairs += sum(tile.pairs for tiles in blocks.values() for tile in tiles)
    return cost.total(made, pairs)


def _divide(samples: range, size: int) -> list[range]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
