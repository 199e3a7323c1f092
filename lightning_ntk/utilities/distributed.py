"""The processes that share a run.

They divide rows, sum over all, and raise one process's failure in all.
"""

import hashlib
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ntk.utilities.memory import available_memory


@dataclass(frozen=True)
class Processes:
    """The processes that share the passes over a data set.

    They are seen from one of them.

    Every process reads its own rows, and sums over the processes give all of them the same numbers. All processes must make
    the same exchanges in the same order. A process that fails cannot, so every exchange first asks whether any process has
    failed; if one has, all of them raise the error of the lowest failed rank. Errors are caught inside `agreement`.
    """

    rank: int = 0
    size: int = 1
    neighbors: int = 1  # processes on this machine, including this one, which share its memory
    device: torch.device | None = None  # on which tensors are exchanged; others are copied there and back

    @classmethod
    def of_process_group(cls, device: torch.device) -> "Processes":
        """The default process group, which exchanges tensors on `device`; call it on every rank."""
        rank, size = dist.get_rank(), dist.get_world_size()
        hosts: list[str | None] = [None] * size
        dist.all_gather_object(hosts, socket.gethostname())
        return cls(rank, size, hosts.count(hosts[rank]), device)

    def rows(self, total: int) -> range:
        """This process's share of `total` rows.

        Shares are consecutive, in order of rank, and at most one longer than any other.
        """
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces the tensor by its sum over the processes."""
        return self._exchange(tensor, dist.all_reduce)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Replaces the tensor by that of process `source`."""
        return self._exchange(tensor, partial(dist.broadcast, src=source))

    def minimum(self, value: float) -> float:
        """The smallest value over the processes."""
        return value if self.size == 1 else -self._agree(-value)

    def any(self, condition: bool) -> bool:
        """Whether the condition holds in any process."""
        return self.minimum(-float(condition)) < 0

    def free_memory(self, *devices: torch.device | str) -> int:
        """Bytes that every process can still allocate on each of the devices."""
        free = [(device, available_memory(device)) for device in map(torch.device, devices)]
        # Each process has a GPU of its own, but they share main memory.
        own = [size // self.neighbors if device.type == "cpu" else size for device, size in free]
        return int(self.minimum(min(own)))

    def require_same(self, digest: str, what: str) -> None:
        """Raises a ValueError in all processes unless their digests agree.

        The digest may be any text.
        """
        if self.size == 1:
            return
        # Of one length, whatever the digests are.
        own = torch.frombuffer(bytearray(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8)
        if self.any(not torch.equal(self.broadcast_(own.clone()), own)):
            raise ValueError(
                f"Expected the same {what} in all processes but its content or order differs between them. Make it the same "
                "everywhere: draw random splits and samples from a fixed seed."
            )

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Leaves the block without an error in all processes, or in none.

        On failure, all raise the error of the lowest failed rank.

        Only the first process shows warnings.
        """
        if self.size == 1:
            yield
            return
        try:
            with warnings.catch_warnings():
                if self.rank > 0:
                    warnings.simplefilter("ignore")
                yield
        except Exception as error:
            if not hasattr(error, "agreed"):  # else the others raise it too
                self._agree(error=error)
            raise
        self._agree()

    def _agree(self, value: float = -torch.inf, error: Exception | None = None) -> float:
        """The largest value over the processes, in one exchange.

        It raises an error if one of them has failed.
        """
        shared = torch.tensor([error is not None, value], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        if shared[0]:
            self._raise_first(error)
        return shared[1].item()

    def _raise_first(self, own: Exception | None) -> NoReturn:
        # Errors travel as a class and a message. The other processes cannot import a class of a function: its base stands in.
        sent = None if own is None else (next(filter(_is_importable, type(own).__mro__)), str(own))
        errors: list[tuple[type[Exception], str] | None] = [None] * self.size
        dist.all_gather_object(errors, sent)
        rank, kind, message = next((rank, *error) for rank, error in enumerate(errors) if error is not None)
        if own is None or rank != self.rank:
            first = kind.__new__(kind)  # without the constructor, whose arguments are unknown
            first.args = (f"{message} (In process {rank}.)",)
        else:
            first = own
        first.agreed = True  # type: ignore[attr-defined]
        raise first

    def _exchange(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> Tensor:
        if self.size > 1:
            self._agree()
            exchanged = tensor.detach().to(self.device or tensor.device).contiguous()
            collective(exchanged)
            if exchanged.data_ptr() != tensor.data_ptr():
                tensor.copy_(exchanged)
        return tensor


ALONE = Processes()
"""A single process."""


def sum_over(processes: Processes, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the processes of tensors of one type and device, in one exchange."""
    if processes.size == 1:
        return dict(tensors)
    flat = processes.sum_(torch.cat([value.flatten() for value in tensors.values()]))
    parts = torch.split(flat, [value.numel() for value in tensors.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, tensors.items(), strict=True)}


def mean_over(processes: Processes, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the processes, as `sum_over`."""
    if processes.size == 1:
        return dict(tensors)
    return {name: value / processes.size for name, value in sum_over(processes, tensors).items()}


def _is_importable(kind: type) -> bool:
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
