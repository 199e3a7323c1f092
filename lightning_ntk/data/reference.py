"""A data set as batches in a fixed order."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

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
    default_collate,
)

from lightning_ntk.data.batches import tensors_in
from lightning_ntk.utilities.errors import explained
from lightning_ntk.utilities.validation import require_callable, require_integer, require_values

Data: TypeAlias = Dataset[Any] | DataLoader[Any] | Tensor | tuple[Any, Tensor]
Unpack: TypeAlias = Callable[[Any], tuple[Any, Tensor | None]]

# Options of the user's DataLoader that are kept: all but those of order and batches.
_LOADER_OPTIONS = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip
# Those that a DataLoader without workers takes too.
_IN_PROCESS = ("collate_fn", "pin_memory")


class NoFixedOrderError(ValueError):
    """The data cannot be read repeatedly in one order with one content."""


class Batch(NamedTuple):
    """Consecutive samples of a reference: their rows, inputs and target."""

    rows: slice
    inputs: Any
    target: Tensor | None


@dataclass(frozen=True)
class _Tensors:
    """Samples in tensors, read as slices.

    The default collate function would take thousands of Python calls for them.
    """

    tree: Any
    indices: Tensor | None = None

    def __len__(self) -> int:
        if self.indices is not None:
            return len(self.indices)
        sizes = {leaf.shape[0] if leaf.dim() else None for leaf in _tensor_leaves(self.tree)}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(
                f"Expected tensors with the same number of samples but their first dimensions are {sizes}."
            )
        return sizes.pop() or 0

    def read(self, parts: Sequence[range], *, workers: bool = True) -> Iterator[Any]:
        for part in parts:
            # Selected rows are a copy, as a DataLoader makes it: `unpack` and transfers may write into a batch.
            index = (
                torch.arange(part.start, part.stop) if self.indices is None else self.indices[part.start : part.stop]
            )
            yield pytree.tree_map_only(Tensor, operator.itemgetter(index), self.tree)

    def subset(self, rows: Sequence[int]) -> "_Tensors":
        index = torch.as_tensor(list(rows), dtype=torch.long)
        return _Tensors(self.tree, index if self.indices is None else self.indices[index])


class _Samples:
    """Samples of a data set, read by a DataLoader with the user's options."""

    def __init__(self, dataset: Any, options: dict[str, Any]) -> None:
        self._dataset, self._options = dataset, options
        self._kept: tuple[DataLoader[Any], list[list[int]]] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, parts: Sequence[range], *, workers: bool = True) -> Iterator[Any]:
        order = [list(part) for part in parts]
        if workers and self._kept is not None:
            loader, kept_order = self._kept
            kept_order[:] = order
            return iter(loader)
        options = {name: value for name, value in self._options.items() if workers or name in _IN_PROCESS}
        # With its own generator: a DataLoader draws the seed of its workers from the global one otherwise.
        loader = DataLoader(self._dataset, batch_sampler=order, generator=torch.Generator(), **options)
        if loader.persistent_workers:
            self._kept = loader, order
        return iter(loader)

    def subset(self, rows: Sequence[int]) -> "_Samples":
        return _Samples(Subset(self._dataset, rows), self._options)


class Reference:
    """Reads a data set in its own order, in batches.

    They have a fixed size; the last one may be smaller.

    Args:
        data: A map-style `Dataset`; a `DataLoader`, whose sampler and batch size are ignored; a tuple `(inputs, target)`, where
            `inputs` is a tensor or a tuple or dict of tensors; or a single tensor of inputs. The workers of a loader with
            `persistent_workers=True` live as long as the reference, others for one pass.
        batch_size: Samples per batch.
        unpack: Maps one batch to `(inputs, target)`. Default: batches are such pairs already.
        transfer: Maps a batch of the data set to one that training sees, on its device. Default: they are the same.

    Raises:
        ValueError: If the data is empty or has no fixed order.
        TypeError: If `data` is none of the above.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int = 256,
        unpack: Unpack | None = None,
        transfer: Callable[[Any], Any] | None = None,
    ) -> None:
        require_integer("batch_size", batch_size, least=1)
        require_callable("unpack", unpack)
        self.batch_size = batch_size
        self.unpack = unpack or unpack_pair
        self._transfer = transfer
        self._source = _source_of(data)
        self._rows: Sequence[int] = range(len(self))  # in the data set that was given
        if len(self) == 0:
            raise ValueError("Expected argument `data` to hold at least one sample but it is empty.")

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, *ranges: range) -> Iterator[Batch]:
        """Batches of all samples in order, or of some ranges of rows.

        No batch crosses the end of a range.

        Reading leaves the global random state alone, unless the data set itself draws from it.
        """
        size = self.batch_size
        parts = [
            part[start : start + size] for part in ranges or (range(len(self)),) for start in range(0, len(part), size)
        ]
        if parts:
            yield from self._unpacked(parts)

    def read(self, start: int, stop: int) -> Batch:
        """The samples `start` to `stop` as one batch, read in this process."""
        part = range(start, min(stop, len(self)))
        return next(self._unpacked([part], workers=False))

    def subset(self, rows: Sequence[int]) -> "Reference":
        """The samples `rows` alone, in that order, read as they are here."""
        if not rows or not all(0 <= row < len(self) for row in rows):
            raise ValueError(f"Expected rows from 0 to {len(self) - 1} but got {list(rows)}.")
        other = copy(self)
        other._source = self._source.subset(rows)
        other._rows = [self._rows[row] for row in rows]
        return other

    def whole(self) -> Iterator[tuple[slice, Any]]:
        """Rows and batches of all samples in order, not unpacked.

        Batches may be made of anything.
        """
        size = self.batch_size
        parts = [range(len(self))[start : start + size] for start in range(0, len(self), size)]
        for part, batch in self._transferred(parts):
            yield slice(part.start, part.stop), batch

    def _transferred(self, parts: Sequence[range], *, workers: bool = True) -> Iterator[tuple[range, Any]]:
        with self._reading(parts[0]):
            raw = self._source.read(parts, workers=workers)
        for part in parts:
            with self._reading(part):
                batch = next(raw)
                batch = batch if self._transfer is None else self._transfer(batch)
            yield part, batch
        next(raw, None)  # so that worker processes end

    def _unpacked(self, parts: Sequence[range], *, workers: bool = True) -> Iterator[Batch]:
        for part, batch in self._transferred(parts, workers=workers):
            with self._reading(part):
                pair: Any = self.unpack(batch)
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor | None):
                got = [type(part).__name__ for part in pair] if isinstance(pair, tuple | list) else type(pair).__name__
                raise ValueError(
                    f"Expected `unpack` to return a pair (inputs, target), with a tensor as target, but got {got}."
                )
            inputs, target = pair
            if not tensors_in(inputs):
                raise ValueError(f"Expected inputs that hold tensors but got {inputs!r:.200}.")
            for name, tree in (("inputs", inputs), ("targets", target)):
                for leaf in _tensor_leaves(tree):
                    require_values(name, leaf)
                    if leaf.dim() == 0 or leaf.shape[0] != len(part):
                        raise ValueError(
                            f"Expected {len(part)} samples in a batch but {name} of shape {tuple(leaf.shape)} came. "
                            "The first dimension of inputs and targets must be the sample."
                        )
            yield Batch(slice(part.start, part.stop), inputs, target)

    def _reading(self, part: range) -> AbstractContextManager[None]:
        def what() -> str:
            rows = self._rows[part.start : part.stop]
            named = f"{rows[0]} to {rows[-1]}" if isinstance(rows, range) else ", ".join(map(str, rows[:8]))
            return f"Reading the samples {named} of the data set"

        return explained(what, "Check the data set, its length and its collate function.")


def seen_samples(loader: DataLoader[Any], batches: float) -> int | None:
    """How many samples a DataLoader gives in epochs of `batches` batches.

    None if the size of its data set is unknown.

    All of them, unless the order is fixed and the epoch ends early: `drop_last` and limits then leave out the same samples
    every time.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return None
    in_order = isinstance(loader.sampler, SequentialSampler) and type(loader.batch_sampler) is BatchSampler
    if not in_order or loader.batch_size is None:
        return len(dataset)
    return int(min(len(dataset), batches * loader.batch_size))


def evenly_spaced_rows(total: int, samples: int) -> list[int]:
    """Some of `total` rows, evenly spaced, with the first one; all if there are no more."""
    samples = min(samples, total)
    return [total * index // samples for index in range(samples)]


def evenly_spaced(data: Data, samples: int | None) -> Data:
    """Some samples of a data set, evenly spaced, with the first one.

    A data set with no more samples is returned itself.
    """
    total = len(_source_of(data))
    if samples is None or total <= samples:
        return data
    rows = evenly_spaced_rows(total, samples)
    if isinstance(data, DataLoader):
        options = {name: getattr(data, name) for name in _LOADER_OPTIONS}
        return DataLoader(Subset(data.dataset, rows), data.batch_size, **options)
    if isinstance(data, Tensor) or (isinstance(data, tuple) and len(data) == 2):
        return pytree.tree_map_only(Tensor, operator.itemgetter(rows), data)  # type: ignore[no-any-return]
    return Subset(data, rows)


def unpack_pair(batch: Any) -> tuple[Any, Tensor | None]:
    """The default `unpack`: batches `(inputs, target)`, or inputs alone."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    got, example = f"a {type(batch).__name__}", '(batch["x"], batch["y"])'
    if isinstance(batch, Mapping):
        got = f"a {type(batch).__name__} with the keys {sorted(map(str, batch))}"
    elif isinstance(batch, tuple | list):
        got, example = f"{got} of {len(batch)}", "batch[:2]" if len(batch) > 2 else "(batch[0], batch[1])"
    raise ValueError(
        f"Expected batches that are pairs (inputs, target) but got {got}. "
        f"Give `unpack=lambda batch: (inputs, target)`, for example `lambda batch: {example}`."
    )


def _source_of(data: Any) -> _Tensors | _Samples:
    if isinstance(data, Tensor) or (isinstance(data, tuple) and len(data) == 2):
        for name, part in zip(("inputs", "targets"), (data,) if isinstance(data, Tensor) else data, strict=False):
            if not _tensor_leaves(part):
                raise TypeError(f"Expected {name} in tensors but got {type(part).__name__}. Use torch.as_tensor.")
            for leaf in _tensor_leaves(part):
                require_values(name, leaf)
        return _Tensors(data)
    loader, dataset = (data, data.dataset) if isinstance(data, DataLoader) else (None, data)
    # Any sequence of samples is a data set to a DataLoader too, a list for example.
    indexed = hasattr(dataset, "__getitem__") and not isinstance(dataset, tuple | dict | str | bytes)
    if isinstance(dataset, type) or not (indexed or isinstance(dataset, Dataset)):
        raise TypeError(
            "Expected argument `data` to be a Dataset, a DataLoader, a tuple (inputs, target) or a tensor "
            f"but got {type(data).__name__}."
        )
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise NoFixedOrderError(
            f"Expected a data set in a fixed order but {type(dataset).__name__} can only be iterated. "
            "Give a map-style data set, with __getitem__ and __len__, as the reference."
        )
    try:
        with explained(lambda: "Asking the data set for its length", "Check its `__len__`."):
            len(dataset)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"Expected a data set with a length but {type(dataset).__name__} has none: {error}.") from error
    if loader is not None and loader.batch_sampler is None:
        raise NoFixedOrderError(
            "Expected a DataLoader that batches samples but got one with batch_size=None, whose data set makes the "
            "batches itself. Give a data set of single samples as the reference."
        )
    options = {} if loader is None else {name: getattr(loader, name) for name in _LOADER_OPTIONS}
    tensors = _tensors_of(dataset) if options.get("collate_fn", default_collate) is default_collate else None
    return _Samples(dataset, options) if tensors is None else tensors


def _tensors_of(dataset: Any) -> _Tensors | None:
    """The tensors of a TensorDataset or of nested subsets of one.

    A subclass may read its samples in another way.
    """
    if type(dataset) is TensorDataset:
        return _Tensors(dataset.tensors)
    inner = _tensors_of(dataset.dataset) if type(dataset) is Subset else None
    return None if inner is None else inner.subset(dataset.indices)


def _tensor_leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
