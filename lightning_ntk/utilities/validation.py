"""Checks that raise a sentence: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:  # sweeps check their arguments without torch
    import torch
    from torch import Tensor


def require_choice(name: str, value: object, choices: object) -> None:
    """Raises a ValueError unless an argument is one of the values of a Literal."""
    allowed = [v for c in get_args(choices) for v in (get_args(c) or [c])]
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, allowed))} but got {value!r}.")


def require_callable(name: str, value: object) -> None:
    """Raises a TypeError unless an argument is None or callable.

    A class is refused too: calling one makes a new object.
    """
    if isinstance(value, type):
        raise TypeError(
            f"Expected argument `{name}` to be a function or None but got the class {value.__name__}. Pass an instance, such as "
            f"{value.__name__}()."
        )
    if value is not None and not callable(value):
        raise TypeError(f"Expected argument `{name}` to be a function or None but got {value!r}.")


def require_values(name: str, tensor: Tensor) -> None:
    """Raises a ValueError unless a tensor holds its values in memory.

    It must hold one value per element.
    """
    import torch

    kinds = {
        "quantized": (tensor.is_quantized, "Use `dequantize()`."),
        "nested": (tensor.is_nested, "Use `to_padded_tensor(0.0)`."),
        "sparse": (tensor.layout != torch.strided, "Use `to_dense()`."),
        "on the meta device": (tensor.is_meta, "Load its values."),
    }
    for kind, (found, advice) in kinds.items():
        if found:
            raise ValueError(f"Expected {name} in dense tensors but got one that is {kind}. {advice}")


def require_number(name: str, value: object, what: str) -> None:
    """Raises a TypeError unless an argument is a real number.

    A number in a tensor or an array is fine.
    """
    try:
        valid = not isinstance(value, bool | str) and isinstance(float(value), float)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        valid = False
    if not valid:
        raise TypeError(f"Expected argument `{name}` to be {what} but got {_shown(value)}.")


def require_device(name: str, value: object) -> None:
    """Raises a ValueError unless an argument is None or the name of a device."""
    import torch

    try:
        valid = value is None or (isinstance(value, str) and bool(torch.device(value)))
    except RuntimeError:
        valid = False
    if not valid:
        raise ValueError(
            f'Expected argument `{name}` to be a device such as "cpu" or "cuda:0", or None, but got {value!r}.'
        )
    if isinstance(value, str):
        require_float64(torch.device(value))


def require_float64(device: torch.device) -> None:
    """Raises a ValueError on Apple's MPS: sums over batches and spectra need float64."""
    if device.type == "mps":
        raise ValueError(
            'Expected a device with float64 but "mps" has none. Move the module to the CPU, `module.to("cpu")`, or train '
            'with Trainer(accelerator="cpu").'
        )


def require_instance(name: str, value: object, kind: Any, what: str) -> None:
    """Raises a TypeError unless an argument is of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"Expected argument `{name}` to be {what} but got {_shown(value)}.")


def require_integer(name: str, value: object, *, least: int) -> None:
    """Raises a ValueError unless an argument is an integer that is at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected argument `{name}` to be an integer, at least {least}, but got {value!r}.")


def require_same_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "tensors") -> None:
    """Raises an error unless tensors have the same names and shapes.

    `what` says what they are.
    """
    import torch

    given: Any = tensors
    if not isinstance(given, Mapping):
        raise TypeError(f"Expected {what} by name, a dict of tensors, but got {_shown(given)}.")
    differing = sorted(expected.keys() ^ tensors.keys())
    if differing:
        raise ValueError(
            f"Expected {what} with the names {sorted(expected)[:6]} but these names differ: {differing[:6]}."
        )
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"Expected {what} by name, a dict of tensors, but `{name}` is {_shown(tensor)}.")
        if tensor.shape != expected[name].shape:
            shape = tuple(expected[name].shape)
            raise ValueError(f"Expected {what} with `{name}` of shape {shape} but got {tuple(tensor.shape)}.")


def require_matching(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "tensors"
) -> dict[str, Tensor]:
    """Returns the tensors in the order of `expected`.

    Raises a ValueError, about `what`, unless names and shapes are the same.
    """
    require_same_names(tensors, expected, what)
    return {name: tensors[name] for name in expected}


def require_same_shape(**tensors: Tensor) -> None:
    """Raises a ValueError unless all shapes are equal: others would broadcast to plausible nonsense."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected tensors of one shape but got {shapes}.")


def require_steps(value: Any) -> None:
    """Raises a ValueError unless the argument `steps` is valid.

    It must be a positive integer, a list of steps or "log".
    """
    values = isinstance(value, Sequence | int)  # an array would be compared element by element
    whole = isinstance(value, Sequence) and not isinstance(value, str) and all(type(s) is int and s >= 0 for s in value)
    if not (values and (value == "log" or whole or (type(value) is int and value > 0))):
        raise ValueError(
            f'Expected argument `steps` to be a positive integer, a list of integers or "log" but got {value!r}.'
        )


def _shown(value: object) -> str:
    """A value in one short line."""
    return " ".join(repr(value).split())[:100]
