"""Free memory, its size in words, and memory for large matrices."""

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

# Bytes from which a matrix profits from huge pages.
_HUGE_PAGES_FROM = 1 << 26
# What is taken as free where the system does not say.
_ASSUMED = 1 << 32
# Rows mirrored at a time, so that the whole matrix is never copied.
_MIRRORED_ROWS = 512


def available_memory(device: torch.device | str = "cpu") -> int:
    """The number of bytes that can still be allocated.

    It is the free GPU memory, or the least of what machine, cgroup and process limit leave.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return max(0, min([_machine_memory(), *_cgroup_memory(Path("/")), *_process_memory()]))


def _machine_memory() -> int:
    with suppress(FileNotFoundError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if not hasattr(os, "sysconf"):  # Windows
        return _ASSUMED
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_memory(root: Path) -> Iterator[int]:
    """The memory that the cgroups of this process leave.

    They are of version 1 or 2, from its own one up. Files cached by the system do not count.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("" if number == "0" else "memory")
            names = (
                ("memory.max", "memory.current")
                if number == "0"
                else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            )
            # In a container the path may be that of the host, and the container's own cgroup the mount.
            own = mount / path.strip("/")
            for group in [own, *own.parents]:
                with suppress(OSError, ValueError):  # "max" is no number
                    limit, usage = (int((group / name).read_text()) for name in names)
                    statistics = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
                    yield limit - usage + int(cached)
                if group == mount:
                    break


def _process_memory() -> Iterator[int]:
    """What `ulimit -v` leaves."""
    with suppress(ImportError, OSError):
        from resource import RLIM_INFINITY, RLIMIT_AS, getrlimit

        limit, _ = getrlimit(RLIMIT_AS)
        if limit != RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield limit - pages * os.sysconf("SC_PAGE_SIZE")


def empty_matrix(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes an uninitialized matrix `(rows, columns)`.

    It is in huge pages if it is large and on the CPU.

    In pages of 4 KiB, touching 1.3 GB of fresh memory takes as long as the matrix products of a kernel of that size.

    Raises:
        MemoryError: If it cannot be allocated.
    """
    size = rows * columns * dtype.itemsize
    try:
        if device.type != "cpu" or size < _HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(rows, columns, dtype=dtype, device=device)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, RuntimeError) as error:
        raise MemoryError(
            f"A matrix of {rows} x {columns} numbers needs {format_bytes(size)}, which cannot be allocated: {error}. "
            "Use fewer samples."
        ) from error
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
