"""Parts of a parameter that a network uses in its place.

They are slices, chunks, transposed views and rows.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from lightning_ntk.kernel.factors import Dense, Factor, Outer

_VIEWS = [
    "chunk", "flatten", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "transpose",
    "unbind", "unflatten", "unsqueeze",
]  # fmt: skip
VIEWS: frozenset[Callable[..., Any]] = frozenset(
    [getattr(owner, name) for owner in (torch, torch.Tensor) for name in _VIEWS]
    + [torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.view]
    + [torch.Tensor.T.__get__, torch.Tensor.mT.__get__]  # type: ignore[attr-defined]
)
"""Functions whose results are elements of their first argument."""


# An attribute of tensors that were computed from the batch. A table of them beside the tensors would have to keep all
# activations alive: the identity of a dead tensor passes to another, and tensors cannot be keys of a WeakKeyDictionary,
# as they compare elementwise.
_MARK = "_lightning_ntk_batch"


def mark_batch(inputs: Any) -> Any:
    """The inputs as new tensors which are known to depend on the batch."""

    def marked(tensor: Tensor) -> Tensor:
        view = tensor.view_as(tensor)
        setattr(view, _MARK, True)
        return view

    return pytree.tree_map_only(Tensor, marked, inputs)


def depends_on_batch(tensor: object) -> bool:
    """Whether a tensor was computed from the inputs, as far as `follow_batch` was told."""
    return getattr(tensor, _MARK, False)


def follow_batch(func: Callable[..., Any], args: tuple[Any, ...], results: Iterable[Any]) -> None:
    """Marks what a function computed from the batch."""
    written = args[:1] if func is torch.Tensor.__setitem__ else ()
    for result in (*results, *written):
        if isinstance(result, Tensor):
            setattr(result, _MARK, True)


class Selection(NamedTuple):
    """Which elements of a parameter a tensor consists of.

    Attributes:
        name: The parameter.
        shape: Its shape, as rows of `width` elements.
        rows: The row of the parameter in every row of the tensor, `(r,)`.
        width: Elements of a row.
        transposed: Whether the tensor is all of a matrix, transposed; then rows are elements.
    """

    name: str
    shape: torch.Size
    rows: Tensor
    width: int
    transposed: bool = False


def view_of(name: str, parameter: Tensor, view: object) -> Selection | None:
    """The elements of `parameter` that the tensor `view` shows.

    None if it shows others, or copies of them.
    """
    if not isinstance(view, Tensor) or not parameter.is_contiguous() or view.dtype != parameter.dtype:
        return None
    if view.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr() or not view.numel():
        return None
    width = parameter.shape[-1] if parameter.dim() > 1 else 1
    offset = view.storage_offset() - parameter.storage_offset()
    shape, strides = list(view.shape), list(view.stride())
    transposed = view.dim() == 2 and (shape, strides) == (list(parameter.shape[::-1]), list(parameter.stride()[::-1]))
    whole = not transposed and shape[-1:] == [width] and strides[-1:] == [1] and not offset % width
    if whole and all(stride % width == 0 for stride in strides[:-1]):
        shape, strides, offset = shape[:-1], [stride // width for stride in strides[:-1]], offset // width
    else:
        width = 1
    rows = torch.full((), int(offset), device=view.device)
    for size, stride in zip(shape, strides, strict=True):
        rows = rows.unsqueeze(-1) + stride * torch.arange(size, device=view.device)
    return Selection(name, parameter.shape, rows.flatten(), width, transposed)


def looked_up(name: str, parameter: Tensor, *args: Any, **kwargs: Any) -> Selection | None:
    """The rows of an embedding that all samples look up alike.

    The indices into the `nn.Embedding` are the same for all samples, as those of positions are.
    """
    call = signature(F.embedding).bind(*args, **kwargs).arguments
    index: Tensor = call["input"]
    same_for_all = not depends_on_batch(index) and (index.dim() < 2 or len(index) == 1)
    options = call.get("padding_idx"), call.get("max_norm"), call.get("scale_grad_by_freq") or None
    if call["weight"] is not parameter or not same_for_all or options != (None, None, None):
        return None
    return Selection(name, parameter.shape, index.flatten().long(), parameter.shape[1])


def of_parameter(factor: Factor, selection: Selection, enlarged: dict[int, Tensor]) -> Factor:
    """Makes the Jacobian of a parameter from that of a selection.

    Factors that share gradients share the `enlarged` ones.
    """
    shape, rows, width = selection.shape, selection.rows, selection.width
    total = shape.numel() // width
    if isinstance(factor, Outer) and factor.gradients.shape[2] == 1:
        inputs, gradients, first = factor.inputs, factor.gradients, factor.input_first
        if selection.transposed:
            return Outer(inputs, gradients, shape, not first)
        sizes = (factor.width, gradients.shape[4]) if first else (gradients.shape[4], factor.width)
        if sizes == (len(rows), width):
            if not first:
                if id(gradients) not in enlarged:
                    enlarged[id(gradients)] = _spread(gradients, rows, total)
                return Outer(inputs, enlarged[id(gradients)], shape)
            return Outer(rows[inputs] if factor.one_hot else _spread(inputs, rows, total), gradients, shape, True)
    elements = (rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)).flatten()
    jacobian = factor.dense()
    jacobian = _spread(jacobian.reshape(*jacobian.shape[:2], -1), elements, shape.numel())
    return Dense(jacobian.reshape(*jacobian.shape[:2], *shape))


def _spread(values: Tensor, places: Tensor, size: int) -> Tensor:
    """`values` on their last axis at `places` of a longer one, zeros elsewhere."""
    return values.new_zeros(*values.shape[:-1], size).index_add_(-1, places, values)
