"""What objects say that they hold, for their `repr`: counts and shapes, never whole tensors."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def represent(instance: object, *held: str) -> str:
    """The class of an object and what it holds.

    Example:
        >>> represent([], "7 samples", "")
        'list(7 samples)'
    """
    return f"{type(instance).__name__}({', '.join(part for part in held if part)})"


def parameter_count(tensors: "Mapping[str, Tensor]") -> str:
    """The number of all elements: "4,810 parameters"."""
    return f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters"


def shape(tensor: "Tensor") -> str:
    """The shape and the type of a tensor: "float64 (7, 3)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def represent_fields(instance: object, fields: Collection[str]) -> str:
    """The named attributes of an object, with the shapes of tensors in their place.

    Example:
        >>> import types, torch
        >>> represent_fields(types.SimpleNamespace(a=torch.ones(2), b=0.5, c=[{"d": torch.ones(())}]), "abc")
        "SimpleNamespace(a=float32 (2,), b=0.5, c=[{'d': float32 ()}])"
    """
    return represent(instance, *(f"{name}={_brief(getattr(instance, name))}" for name in fields))


def _brief(value: object) -> str:
    from torch import Tensor  # here, since a sweep's results do without

    if isinstance(value, Tensor):
        return shape(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_brief(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor | Mapping) for each in value):
        return "[" + ", ".join(map(_brief, value)) + "]"
    return repr(value)


def name_of(function: object) -> str:
    """The name of a function, or what a callable object says of itself."""
    return str(getattr(function, "__qualname__", repr(function)))
