"""Free memory, its size in words, and memory for large matrices."""

import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

# Bytes from which a matrix profits from huge pages.
_HUGE_PAGES_FROM = 1 << 26
# Rows mirrored at a time, so that the whole matrix is never copied.
_MIRRORED_ROWS = 512


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated: free GPU memory, or the machine's available RAM."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    with suppress(FileNotFoundError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def empty_matrix(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized matrix `(rows, columns)`, in huge pages if it is large and on the CPU.

    In pages of 4 KiB, touching 1.3 GB of fresh memory takes as long as the matrix products of a kernel of that size.
    """
    size = rows * columns * dtype.itemsize
    if device.type != "cpu" or size < _HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # advice only: a system without huge pages declines it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)


def mirror_upper_(matrix: Tensor) -> Tensor:
    """Copies the upper triangle of a square matrix into the lower one.

    Some BLAS libraries return a product X X^T that is not symmetric to the last bit.
    """
    for start in range(0, len(matrix), _MIRRORED_ROWS):
        stop = min(start + _MIRRORED_ROWS, len(matrix))
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def format_bytes(size: float) -> str:
    """A size in bytes in binary units.

    >>> format_bytes(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
