"""A data set as batches in a fixed order, whatever it came as."""

from collections.abc import Callable, Iterator, Sequence, Sized
from copy import copy
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data import default_collate as _default_collate

Data: TypeAlias = Dataset[Any] | DataLoader[Any] | Tensor | tuple[Any, Tensor]
Unpack: TypeAlias = Callable[[Any], tuple[Any, Tensor | None]]


class NoFixedOrderError(ValueError):
    """The data cannot be read again and again in one order with one content."""


class Batch(NamedTuple):
    """Consecutive samples of a reference: their rows, inputs and target."""

    rows: slice
    inputs: Any
    target: Tensor | None


class Reference:
    """Reads a data set in its own order, in batches of a fixed size, the last one possibly smaller.

    Args:
        data: A map-style `Dataset`; a `DataLoader`, of which the data set, the collate function and the number of workers
            are used and never the sampler; a tuple `(inputs, target)`, where `inputs` is a tensor or a tuple or dict of
            tensors; or a single tensor of inputs.
        batch_size: Samples in a batch.
        unpack: Maps one batch of the data set to `(inputs, target)`. Default: batches that are such pairs already.

    Raises:
        ValueError: If the data is empty or has no fixed order.
        TypeError: If `data` is none of the above.
    """

    def __init__(self, data: Data, *, batch_size: int = 256, unpack: Unpack | None = None) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be a positive integer but got {batch_size!r}.")
        self.batch_size = batch_size
        self._unpack = unpack or unpack_pair
        self._tensors: Any = None
        self._indices: Tensor | None = None
        if isinstance(data, Tensor) or (isinstance(data, tuple) and len(data) == 2):
            self._tensors = data
        elif isinstance(data, DataLoader):
            self._read_dataset(data.dataset, data.collate_fn, data.num_workers, ready_made=data.batch_size is None)
        elif _is_map_style(data):
            self._read_dataset(data, _default_collate, 0)
        else:
            raise TypeError(
                "Expected argument `data` to be a Dataset, a DataLoader, a tuple (inputs, target) or a tensor "
                f"but got {type(data).__name__}."
            )
        self.num_samples = self._count()
        if self.num_samples == 0:
            raise ValueError("Expected argument `data` to hold at least one sample but it is empty.")

    def _read_dataset(
        self, dataset: Any, collate: Callable[[Any], Any], workers: int, *, ready_made: bool = False
    ) -> None:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise NoFixedOrderError(
                f"Expected a data set in a fixed order but {type(dataset).__name__} can only be iterated. "
                "Give a map-style data set, with __getitem__ and __len__, as the reference."
            )
        if ready_made:
            raise NoFixedOrderError(
                "Expected a DataLoader that batches samples but got one with batch_size=None, whose data set makes the "
                "batches itself. Give a data set of single samples as the reference."
            )
        tensors, indices = _tensors_of(dataset)
        if tensors is not None and collate is _default_collate:
            # Slices of the tensors are what the collate function would give, thousands of Python calls later.
            self._tensors, self._indices = tensors, indices
        else:
            self._dataset, self._collate, self._workers = dataset, collate, workers

    def _count(self) -> int:
        if self._indices is not None:
            return len(self._indices)
        if self._tensors is None:
            return len(self._dataset)
        sizes = {leaf.shape[0] if leaf.dim() else None for leaf in _tensor_leaves(self._tensors)}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(
                f"Expected tensors with the same number of samples but their first dimensions are {sizes}."
            )
        return next(iter(sizes)) or 0

    def __len__(self) -> int:
        return self.num_samples

    def batches(self, rows: range | None = None) -> Iterator[Batch]:
        """All batches in order, or those of consecutive rows. The global random state is not touched by the reading itself."""
        rows = range(self.num_samples) if rows is None else rows
        if rows:
            yield from self._iterate(rows, self._workers if self._tensors is None else 0)

    def read(self, start: int, stop: int) -> Batch:
        """The samples `start` to `stop` as one batch."""
        stop = min(stop, self.num_samples)
        (batch,) = self._iterate(range(start, stop), 0, batch_size=stop - start)
        return batch

    def _iterate(self, rows: range, workers: int, batch_size: int | None = None) -> Iterator[Batch]:
        size = batch_size or self.batch_size
        starts = range(rows.start, rows.stop, size)
        raw: Any
        if self._tensors is not None:
            raw = (self._slice(slice(start, min(start + size, rows.stop))) for start in starts)
        else:
            # Its own generator: a DataLoader draws its workers' seed from the global one otherwise.
            raw = DataLoader(
                cast("Dataset[Any]", self._dataset),
                batch_size=size,
                sampler=rows,
                collate_fn=self._collate,
                num_workers=workers,
                generator=torch.Generator(),
            )
        for start, batch in zip(starts, raw, strict=True):
            inputs, target = self._unpack(batch)
            count = min(size, rows.stop - start)
            for leaf in _tensor_leaves((inputs, target)):
                if leaf.dim() == 0 or leaf.shape[0] != count:
                    raise ValueError(
                        f"Expected {count} samples in a batch but a tensor of shape {tuple(leaf.shape)} came. "
                        "The first dimension of inputs and targets must be the sample."
                    )
            yield Batch(slice(start, start + count), inputs, target)

    def _slice(self, rows: slice) -> Any:
        index = rows if self._indices is None else self._indices[rows]
        return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], self._tensors)

    def subset(self, rows: Sequence[int]) -> "Reference":
        """The samples `rows` alone, in that order, read as they are here.

        Raises:
            ValueError: If there are none, or if a row is not among the samples.
        """
        if not rows or not all(0 <= row < self.num_samples for row in rows):
            raise ValueError(f"Expected rows from 0 to {self.num_samples - 1} but got {list(rows)}.")
        other = copy(self)
        other.num_samples = len(rows)
        if self._tensors is not None:
            index = torch.as_tensor(list(rows), dtype=torch.long)
            other._indices = index if self._indices is None else self._indices[index]
        else:
            other._dataset = Subset(cast("Dataset[Any]", self._dataset), rows)
        return other

    @property
    def num_batches(self) -> int:
        """Batches in one pass."""
        return self.count_batches(range(self.num_samples))

    def count_batches(self, rows: range) -> int:
        """Batches of consecutive rows."""
        return -(-len(rows) // self.batch_size)


def seen_samples(loader: DataLoader[Any], batches: float) -> int | None:
    """How many samples of its data set a DataLoader gives in epochs of a number of batches; None if it has no known size.

    All of them, unless the order is fixed and the epoch ends early: `drop_last` and limits leave out the same ones every time.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return None
    in_order = isinstance(loader.sampler, SequentialSampler) and type(loader.batch_sampler) is BatchSampler
    if not in_order or loader.batch_size is None:
        return len(dataset)
    return int(min(len(dataset), batches * loader.batch_size))


def unpack_pair(batch: Any) -> tuple[Any, Tensor | None]:
    """The default `unpack`: batches `(inputs, target)`, or inputs alone.

    Raises:
        ValueError: If the batch is anything else, a dict for example.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    got = f"a dict with the keys {sorted(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
    raise ValueError(
        f"Expected batches that are pairs (inputs, target) but got {got}. "
        'Give `unpack=lambda batch: (inputs, target)`, for example `lambda batch: (batch["x"], batch["y"])`.'
    )


def _tensors_of(dataset: Any) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
    """The tensors of a TensorDataset, and the rows that (nested) subsets take of it."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors, None
    if type(dataset) is Subset:
        tensors, indices = _tensors_of(dataset.dataset)
        if tensors is not None:
            own = torch.as_tensor(list(dataset.indices), dtype=torch.long)
            return tensors, own if indices is None else indices[own]
    return None, None


def _is_map_style(data: Any) -> bool:
    # Any sequence of samples is a data set to a DataLoader too, a list for example.
    if isinstance(data, type):
        return False
    return isinstance(data, Dataset) or (
        hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, tuple)
    )


def _tensor_leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
