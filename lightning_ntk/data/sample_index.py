"""Which samples of the reference set a training batch holds, recognized by their content."""

import hashlib
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Reference

Digest: TypeAlias = bytes


class UnknownSamplesError(ValueError):
    """A batch holds samples that are not in the reference set.

    Attributes:
        positions: Where in the batch they are.
    """

    def __init__(self, message: str, positions: list[int]) -> None:
        super().__init__(message)
        self.positions = positions


class SampleIndex:
    """Finds samples of the reference set by the values of their inputs and targets, in whatever order they come.

    Each sample is known by a 128-bit BLAKE2b digest of its tensors: that any two of a million different ones share theirs has a
    probability below 1e-26. Equal values are equal samples: -0.0 is 0.0, and a batch whose floating-point type is not that of the
    reference is compared after a conversion, where that loses nothing (`precision="64-true"` makes such batches). Leaves that are
    no tensors are not compared.

    Args:
        reference: The reference set, read once.

    Attributes:
        num_samples: N, samples of the reference set.
        num_duplicates: Samples that repeat an earlier one; they are found as that one, whose kernel rows are the same.
    """

    def __init__(self, reference: Reference) -> None:
        self._rows: dict[Digest, int] = {}
        self._layout: Layout | None = None
        for batch in reference.batches():
            leaves = _leaves(batch.inputs, batch.target)
            layout = _layout(leaves)
            if self._layout is None:
                self._layout = layout
            elif layout != self._layout:
                raise ValueError(
                    f"Expected batches of tensors that differ in their values only but got {_describe(layout)} after "
                    f"{_describe(self._layout)}."
                )
            for row, digest in enumerate(_digests(list(leaves.values())), start=batch.rows.start):
                self._rows.setdefault(digest, row)
        self.num_samples = len(reference)
        self.num_duplicates = self.num_samples - len(self._rows)

    def rows(self, inputs: Any, target: Tensor | None) -> Tensor:
        """The row of each sample of a batch in the reference set.

        Args:
            inputs: A tensor, or tensors in tuples, lists and dicts, each `(b, ...)`, on any device.
            target: Targets `(b, ...)`.

        Returns:
            Rows `(b,)`, int64 on the CPU.

        Raises:
            UnknownSamplesError: If samples are not in the reference set.
            ValueError: If the tensors differ in their number of samples.
        """
        leaves = _leaves(inputs, target)
        layout = _layout(leaves)
        assert self._layout is not None
        count = len(next(iter(leaves.values()))) if leaves else 0
        if not _comparable(layout, self._layout):
            raise UnknownSamplesError(
                f"Expected samples like those of the reference set, {_describe(self._layout)}, but got {_describe(layout)}. "
                "Training seems to read another data set, or the same one through other transforms.",
                list(range(count)),
            )
        values = list(leaves.values())
        converted = [value.to(kind[0]) for value, kind in zip(values, self._layout.values(), strict=True)]
        found = [self._rows.get(digest, -1) for digest in _digests(converted)]
        for value, same in zip(values, converted, strict=True):
            if value.dtype != same.dtype:
                kept = _bytes(same.to(value.dtype)).eq(_bytes(value)).all(1).tolist()
                found = [row if equal else -1 for row, equal in zip(found, kept, strict=True)]
        unknown = [position for position, row in enumerate(found) if row < 0]
        if unknown:
            raise UnknownSamplesError(_unknown(unknown, count), unknown)
        return torch.tensor(found)


Layout: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # path of a leaf -> type and shape of one sample


def _leaves(inputs: Any, target: Tensor | None) -> dict[str, Tensor]:
    paths, _ = pytree.tree_flatten_with_path({"inputs": inputs, "target": target})
    leaves = {
        pytree.keystr(path).replace("['inputs']", "inputs", 1).replace("['target']", "target", 1): leaf.detach().cpu()
        for path, leaf in paths
        if isinstance(leaf, Tensor)
    }
    shapes = {leaf.shape[:1] for leaf in leaves.values()}
    if len(shapes) > 1 or torch.Size() in shapes:
        raise ValueError(
            "Expected tensors with the same number of samples in their first dimension but got "
            + ", ".join(f"{name} of shape {tuple(leaf.shape)}" for name, leaf in leaves.items())
            + "."
        )
    return leaves


def _layout(leaves: dict[str, Tensor]) -> Layout:
    return {name: (leaf.dtype, tuple(leaf.shape[1:])) for name, leaf in leaves.items()}


def _comparable(layout: Layout, expected: Layout) -> bool:
    return layout.keys() == expected.keys() and all(
        kind == expected[name]
        or (kind[1] == expected[name][1] and kind[0].is_floating_point and expected[name][0].is_floating_point)
        for name, kind in layout.items()
    )


def _bytes(leaf: Tensor) -> Tensor:
    """The values of each sample as bytes, `(b, n)`."""
    if leaf.is_floating_point() or leaf.is_complex():
        leaf = leaf + 0.0  # -0.0 becomes 0.0
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:])).contiguous().view(torch.uint8)


def sample_digests(inputs: Any, target: Tensor | None) -> list[Digest]:
    """A digest of the content of each sample of a batch."""
    return _digests(list(_leaves(inputs, target).values()))


def _digests(leaves: list[Tensor]) -> list[Digest]:
    # A loop over samples: 0.7 us each, against 0.5 us for a vectorized hash that mixes as well (64 samples of 64 numbers).
    samples = torch.cat([_bytes(leaf) for leaf in leaves], 1).numpy()
    return [hashlib.blake2b(sample, digest_size=16).digest() for sample in samples]


def _describe(layout: Layout) -> str:
    parts = (f"{name} {str(dtype).removeprefix('torch.')} of shape {shape}" for name, (dtype, shape) in layout.items())
    return " and ".join(parts) or "no tensors"


def _unknown(positions: list[int], count: int) -> str:
    named = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
    return (
        f"Expected a batch of samples of the reference set but {len(positions)} of its {count} samples are not in it, at the "
        f"positions {named}. Most likely the data set augments at random or adds noise, training reads another data set or "
        "split, or its transforms differ from those of the reference. Give the data set that training reads as the reference, "
        "without augmentation, or use dynamics that take any stream of data."
    )
