"""The tensors of a batch, whatever the batch is made of."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(batch: Any) -> list[Tensor]:
    """Finds all tensors of a batch.

    It looks in containers, mappings that are not dicts, and attributes of plain objects.
    """
    return list(_walk(batch, set()))


def copy_batch(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """A deep copy of a batch; with `dtype`, floating-point tensors get this type."""
    # A deep copy of a tensor copies its whole storage, and a batch may be a part of its data set.
    clones = {id(t): t.clone().to(dtype if t.is_floating_point() else None) for t in tensors_in(batch)}
    return copy.deepcopy(batch, dict(clones))


def _walk(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    if id(tree) in seen or isinstance(tree, str | bytes | int | float | type | None):
        return
    seen.add(id(tree))
    branches: list[Any] = []
    if isinstance(tree, list | tuple | set):
        branches = list(tree)
    elif callable(getattr(tree, "items", None)):
        branches = [value for _, value in tree.items()]
    for branch in (*branches, *getattr(tree, "__dict__", {}).values()):
        yield from _walk(branch, seen)
