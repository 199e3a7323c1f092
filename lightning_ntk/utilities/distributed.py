"""The processes that share a run: whose rows are whose, sums over all of them, and failures of one that end in all."""

import pickle
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ntk.utilities.memory import available_memory


@dataclass(frozen=True)
class Processes:
    r"""One of the processes among which passes over a data set are divided, or the only one.

    Every process reads its own rows, and sums put the parts together, so that all hold the same numbers. All processes must
    come to the same sums in the same order. A process that fails cannot, so every exchange is preceded by one bit, whether
    anybody has failed since the last one: an error inside of `agreement` is raised by all processes, wherever they are.

    Args:
        rank: Number of this process.
        size: How many there are.
        neighbors: Processes on this machine, this one included, which share its memory.
        device: Where tensors are exchanged; others are copied there and back.
    """

    rank: int = 0
    size: int = 1
    neighbors: int = 1
    device: torch.device | None = None

    @classmethod
    def of_process_group(cls, device: torch.device) -> "Processes":
        """Those of the default process group; all of its processes must ask.

        Args:
            device: One on which the group can exchange tensors.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        hosts: list[str | None] = [None] * size
        dist.all_gather_object(hosts, socket.gethostname())
        return cls(rank, size, hosts.count(hosts[rank]), device)

    def rows(self, total: int) -> range:
        """The share of `total` rows that is this process's: contiguous, in order, and none more than one longer."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place; of one, the tensor itself."""
        if self.size > 1:
            self._require_no_failure()
            with self._exchangeable(tensor) as exchanged:
                dist.all_reduce(exchanged)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of process `source`, in place; of one process, the tensor itself."""
        if self.size > 1:
            self._require_no_failure()
            with self._exchangeable(tensor) as exchanged:
                dist.broadcast(exchanged, source)
        return tensor

    def minimum(self, value: float) -> float:
        """The smallest of the values that the processes give."""
        if self.size == 1:
            return value
        self._require_no_failure()
        smallest = self._number(value)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.item()

    def any(self, condition: bool) -> bool:
        """Whether the condition holds in any process."""
        return self.minimum(-float(condition)) < 0

    def free_memory(self, *devices: torch.device | str) -> int:
        """Bytes that each process can still allocate on any of these devices, the least of all."""
        free = [(device, available_memory(device)) for device in map(torch.device, devices)]
        # Each process has a GPU of its own, but they share main memory.
        own = [size // self.neighbors if device.type == "cpu" else size for device, size in free]
        return int(self.minimum(min(own)))

    def require_same(self, digest: str, what: str) -> None:
        """Raises a ValueError in all processes if they have different digests, in hexadecimal, of what should be the same."""
        own = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
        if self.any(not torch.equal(self.broadcast_(own.clone()), own)):
            raise ValueError(
                f"Expected the same {what} in all processes but its content or order differs between them. Make it the same "
                "everywhere: draw random splits and samples from a fixed seed."
            )

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """All processes leave the block without an error, or all with that of the first process that has one.

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
            if getattr(error, "agreed", False):  # the others know
                raise
            self._require_no_failure(error)
        else:
            self._require_no_failure()

    def _require_no_failure(self, error: Exception | None = None) -> None:
        failed = self._number(float(error is not None))
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if not failed.item():
            return
        errors: list[tuple[bytes, str] | None] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else _describe(error))
        first = next(rank for rank, description in enumerate(errors) if description is not None)
        if error is None or first != self.rank:
            description = errors[first]
            assert description is not None
            raise _rebuild(*description, first) from error
        error.agreed = True  # type: ignore[attr-defined]
        raise error

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    @contextmanager
    def _exchangeable(self, tensor: Tensor) -> Iterator[Tensor]:
        device = tensor.device if self.device is None else self.device
        exchanged = tensor.detach().to(device).contiguous()
        yield exchanged
        if exchanged.data_ptr() != tensor.data_ptr():
            tensor.copy_(exchanged)


ALONE = Processes()
"""The only process."""


def sum_over(processes: Processes, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over the processes of tensors of one type and device, in one exchange; of one process, the tensors."""
    if processes.size == 1:
        return dict(tensors)
    flat = processes.sum_(torch.cat([value.flatten() for value in tensors.values()]))
    parts = torch.split(flat, [value.numel() for value in tensors.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, tensors.items(), strict=True)}


def mean_over(processes: Processes, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means over the processes, as `sum_over`."""
    if processes.size == 1:
        return dict(tensors)
    return {name: value / processes.size for name, value in sum_over(processes, tensors).items()}


def _describe(error: Exception) -> tuple[bytes, str]:
    try:
        kind = pickle.dumps(type(error))
    except (pickle.PicklingError, AttributeError):  # a class of a function
        kind = pickle.dumps(RuntimeError)
    return kind, str(error)


def _rebuild(kind: bytes, message: str, rank: int) -> Exception:
    """An error of another process, of its class, made without its constructor, whose arguments are not known."""
    error_class: type[Exception] = pickle.loads(kind)
    error = error_class.__new__(error_class)
    error.args = (f"{message} (In process {rank}.)",)
    error.agreed = True  # type: ignore[attr-defined]
    return error
