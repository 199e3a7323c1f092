"""Finds the samples of a training batch in a data set by content."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.batches import tensors_in
from lightning_ntk.data.reference import Batch
from lightning_ntk.utilities.shapes import Int, Shaped

Layout: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # path of a leaf -> type and shape of one sample

_DIGEST_BYTES = 16


class UnknownSamplesError(ValueError):
    """A batch holds samples that are not in the reference set."""


class SampleIndex:
    """Finds samples of a data set by their inputs and targets.

    Their order does not matter.

    A sample is known by a 128-bit BLAKE2b digest of its tensors; two of a million different samples share theirs with a
    probability below 1e-26. Equal values are equal samples: -0.0 is 0.0, and floating-point values of another type than
    the data set's are converted if that loses nothing (`precision="64-true"` makes such batches). Parts without tensors
    are not compared. A sample that repeats an earlier one is found as that one, whose kernel rows are the same.

    Where inputs have an integer `attention_mask` `(B, T)`, tokens that it leaves out are padding, not content: collate
    functions that pad to the longest sample of a batch give a sample another padding each time.

    Example:
        >>> inputs = torch.tensor([[1.0], [2.0], [3.0]])
        >>> index = SampleIndex([Batch(slice(0, 3), inputs, None)])
        >>> index.rows(inputs[[2, 0]], None)
        tensor([2, 0])
    """

    def __init__(self, batches: Iterable[Batch] = ()) -> None:
        self._digests = bytearray()
        self._layouts: list[Layout] = []
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        """Adds the next samples of the data set."""
        leaves = _leaves(batch.inputs, batch.target)
        layout = _layout(leaves)
        if layout not in self._layouts:
            self._layouts.append(layout)
        self._digests += b"".join(_digest(leaves))
        self.__dict__.pop("_rows", None)  # made again when it is needed

    @property
    def fingerprint(self) -> str:
        """A hexadecimal digest of the content and order of all samples."""
        return hashlib.blake2b(self._digests, digest_size=_DIGEST_BYTES).hexdigest()

    def rows(self, inputs: Any, target: Shaped[Tensor, "B ..."] | None) -> Int[Tensor, "B"]:
        """Finds each sample's row in the data set, `(B,)`.

        Rows are int64 on the CPU; the tensors may be on any device.

        Raises:
            UnknownSamplesError: If samples are not in the data set.
            ValueError: If tensors differ in their number of samples, or samples of the data set in their shapes.
        """
        if len(self._layouts) > 1:
            first, second = map(_describe, self._layouts[:2])
            raise ValueError(
                f"Expected batches of tensors that differ in their values only but got {second} after {first}."
            )
        (expected,) = self._layouts
        leaves = _leaves(inputs, target)
        layout = _layout(leaves)
        if not _comparable(layout, expected):
            raise UnknownSamplesError(
                f"Expected samples like those of the reference set, {_describe(expected)}, but got {_describe(layout)}. "
                "Training seems to read another data set, or the same one through other transforms."
            )
        converted = {name: value.to(expected[name][0]) for name, value in leaves.items()}
        found = [self._rows.get(digest, -1) for digest in _digest(converted)]
        for name, value in leaves.items():
            same = converted[name]
            if value.dtype != same.dtype:
                kept = _bytes(same.to(value.dtype)).eq(_bytes(value)).all(1).tolist()
                found = [row if equal else -1 for row, equal in zip(found, kept, strict=True)]
        unknown = [position for position, row in enumerate(found) if row < 0]
        if unknown:
            named = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
            raise UnknownSamplesError(
                f"Expected a batch of samples of the reference set but {len(unknown)} of its {len(found)} samples are not in it, "
                f"at the positions {named}. Training augments at random, or reads other data or through other transforms. Give "
                "what it reads as the reference, without augmentation, or use dynamics that take any stream of data."
            )
        return torch.tensor(found)

    @property
    def first_rows(self) -> Tensor:
        """The row of the first sample that is equal to each sample, `(N,)`."""
        digests = bytes(self._digests)
        starts = range(0, len(digests), _DIGEST_BYTES)
        return torch.tensor([self._rows[digests[start : start + _DIGEST_BYTES]] for start in starts])

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        digests = bytes(self._digests)
        starts = reversed(range(0, len(digests), _DIGEST_BYTES))  # the first of equal samples stays
        return {digests[start : start + _DIGEST_BYTES]: start // _DIGEST_BYTES for start in starts}


def _leaves(inputs: Any, target: Tensor | None) -> dict[str, Tensor]:
    paths, _ = pytree.tree_flatten_with_path({"inputs": inputs, "target": target})
    leaves = {}
    for path, leaf in paths:
        name = pytree.keystr(path).replace("['inputs']", "inputs", 1).replace("['target']", "target", 1)
        if isinstance(leaf, Tensor):
            leaves[name] = leaf.detach().cpu()
        elif isinstance(leaf, Mapping):
            leaves |= {f"{name}[{key!r}]": v.detach().cpu() for key, v in leaf.items() if isinstance(v, Tensor)}
        else:
            leaves |= {f"{name}/{i}": tensor.detach().cpu() for i, tensor in enumerate(tensors_in(leaf))}
    shapes = {leaf.shape[:1] for leaf in leaves.values()}
    if len(shapes) > 1 or torch.Size() in shapes:
        raise ValueError(
            "Expected tensors with the same number of samples in their first dimension but got "
            + ", ".join(f"{name} of shape {tuple(leaf.shape)}" for name, leaf in leaves.items())
            + "."
        )
    return leaves


def _layout(leaves: dict[str, Tensor]) -> Layout:
    padded, _ = _padding(leaves)
    return {name: (leaf.dtype, (-1,) if name in padded else tuple(leaf.shape[1:])) for name, leaf in leaves.items()}


def _padding(leaves: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """The leaves that an attention mask `(B, T)` pads, and the kept positions.

    There are none without a mask of this kind.
    """
    masks = [leaf for name, leaf in leaves.items() if name.endswith("['attention_mask']") and leaf.dim() == 2]
    if len(masks) != 1 or masks[0].is_floating_point() or masks[0].is_complex():
        return [], torch.empty(0)
    padded = [
        name
        for name, leaf in leaves.items()
        if name.endswith(("_ids']", "_mask']")) and leaf.shape == masks[0].shape and not leaf.is_floating_point()
    ]
    return padded, masks[0].bool()


def _comparable(layout: Layout, expected: Layout) -> bool:
    return layout.keys() == expected.keys() and all(
        kind == expected[name]
        or (kind[1] == expected[name][1] and kind[0].is_floating_point and expected[name][0].is_floating_point)
        for name, kind in layout.items()
    )


def _bytes(leaf: Tensor) -> Tensor:
    """The values of each sample as bytes, `(B, n)`."""
    if leaf.is_floating_point() or leaf.is_complex():
        leaf = leaf + 0.0  # -0.0 becomes 0.0
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:])).contiguous().view(torch.uint8)


def _digest(leaves: dict[str, Tensor]) -> list[bytes]:
    """A digest of each sample."""
    padded, kept = _padding(leaves)
    plain = [_bytes(leaf) for name, leaf in leaves.items() if name not in padded]
    # A loop over samples: 0.7 us each, against 0.5 us for a vectorized hash that mixes as well (64 samples of 64 numbers).
    samples: list[Any] = [b""] * len(kept) if not plain else list(torch.cat(plain, 1).numpy())
    if padded:
        tokens = torch.stack([leaves[name].long() for name in padded], 2)
        parts = [
            bytes(sample) + row[keep].numpy().tobytes() for sample, row, keep in zip(samples, tokens, kept, strict=True)
        ]
        samples = parts
    return [hashlib.blake2b(sample, digest_size=_DIGEST_BYTES).digest() for sample in samples]


def _describe(layout: Layout) -> str:
    parts = (f"{name} {str(dtype).removeprefix('torch.')} of shape {shape}" for name, (dtype, shape) in layout.items())
    return " and ".join(parts) or "no tensors"
