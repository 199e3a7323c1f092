"""Checks of arguments, with a sentence for each that is wrong."""

from collections.abc import Sequence
from typing import Any, get_args

import torch


def require_choice(name: str, value: object, choices: object) -> None:
    """Raises a ValueError if an argument is none of the values of a Literal."""
    allowed = [v for c in get_args(choices) for v in (get_args(c) or [c])]
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, allowed))} but got {value!r}.")


def require_device(name: str, value: object) -> None:
    """Raises a ValueError if an argument is neither None nor the name of a device."""
    try:
        valid = value is None or (isinstance(value, str) and bool(torch.device(value)))
    except RuntimeError:
        valid = False
    if not valid:
        raise ValueError(
            f'Expected argument `{name}` to be a device such as "cpu" or "cuda:0", or None, but got {value!r}.'
        )


def require_integer(name: str, value: object, *, least: int) -> None:
    """Raises a ValueError if an argument is no integer, or below `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected argument `{name}` to be an integer, at least {least}, but got {value!r}.")


def require_steps(value: Any) -> None:
    """Raises a ValueError if the argument `steps` is no positive integer, list of steps or "log"."""
    whole = (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(s, int) and s >= 0 for s in value)
    )
    if not (value == "log" or whole or (isinstance(value, int) and not isinstance(value, bool) and value > 0)):
        raise ValueError(
            f'Expected argument `steps` to be a positive integer, a list of steps or "log" but got {value!r}.'
        )
