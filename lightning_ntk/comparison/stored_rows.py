"""Decides whether a twin stores the Jacobian of its training set."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization.batch_loss import BatchLoss
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.pair_of_step import Pair
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.memory import format_bytes

# Share of the free memory that the stored rows may take.
_JACOBIAN_SHARE = 0.25
# The two products of a twin along passes, in forward passes; a pass over one sample alone, in the passes of a batch for each of
# its samples; and a number of J that is read, in operations.
_STREAMED_PASSES = 5.0
_ALONE = 1.5
_MEMORY_BOUND = 10.0


class StoredSizes(NamedTuple):
    """What it depends on whether a twin stores the Jacobian of its training set.

    Attributes:
        samples: N.
        outputs: K.
        parameters: P.
        itemsize: Bytes of a number.
        batch: Samples of a batch.
        operations: Floating-point operations of a forward pass over one sample.
    """

    samples: int
    outputs: int
    parameters: int
    itemsize: int
    batch: int = 1
    operations: float = float("inf")

    @classmethod
    def least(cls, loss: BatchLoss, samples: int) -> "StoredSizes":
        """A lower bound without a pass: the rows of a single output."""
        parameters = sum(value.numel() for value in loss.params.values())
        return cls(samples, 1, parameters, _dtype_of(loss).itemsize)

    @classmethod
    @preserved_rng()
    def of(cls, loss: BatchLoss, pair: Pair, reference: Reference) -> "StoredSizes":
        """Measures the sizes for a loss by one pass over the first batch."""
        linearization = Linearization(loss.module, predict=pair.predict, dtype=_dtype_of(loss))
        inputs = reference.read(0, reference.batch_size).inputs
        with FlopCounterMode(display=False) as counter:
            outputs = linearization.predict(inputs)
        each = counter.get_total_flops() / len(outputs)
        least = cls.least(loss, len(reference))
        return least._replace(outputs=outputs.shape[1], batch=reference.batch_size, operations=each)


def require_worth(sizes: StoredSizes, batches: float | None, free: float) -> None:
    """Requires that storing the Jacobian is affordable, and cheaper than passes.

    It takes at most a quarter of the free memory; and making it, one forward and K backward passes over every sample alone, and
    reading b K of its rows three times in every batch cost less than two products along passes.

    Args:
        sizes: The sizes of the problem.
        batches: Batches of the run; None if their number is unknown.
        free: Free memory in bytes.

    Raises:
        ValueError: If it is not; the message is a phrase that says why.

    Example:
        >>> adapters = StoredSizes(samples=500, outputs=2, parameters=75_000, itemsize=4, batch=16, operations=1.4e9)
        >>> require_worth(adapters, batches=300, free=8e9)
        >>> require_worth(adapters, batches=30, free=8e9)
        Traceback (most recent call last):
            ...
        ValueError: rows of the Jacobian cost more than they save in 30 batches
    """
    size = float(sizes.samples) * sizes.outputs * sizes.parameters * sizes.itemsize
    if size > _JACOBIAN_SHARE * free:
        raise ValueError(
            f"rows of the Jacobian take {format_bytes(size)}, more than a quarter of {format_bytes(free)} of free memory"
        )
    if batches is None:
        raise ValueError(
            "the run has no known number of steps, for which rows of the Jacobian would be worth their cost"
        )
    made = _ALONE * sizes.samples * (1 + 2 * sizes.outputs) * sizes.operations
    read = 3 * _MEMORY_BOUND * sizes.batch * sizes.outputs * sizes.parameters
    if made + batches * read > batches * _STREAMED_PASSES * sizes.batch * sizes.operations:
        raise ValueError(f"rows of the Jacobian cost more than they save in {batches:.0f} batches")


def _dtype_of(loss: BatchLoss) -> torch.dtype:
    first = next(iter(loss.params.values()))
    return first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
