"""Checks the shapes in the package's annotations, as jaxtyping and beartype read them, whenever a function returns."""

import functools
import importlib.abc
import importlib.machinery
import inspect
import random
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any, get_args

import jaxtyping
import torch
from beartype.door import is_bearable

from lightning_ntk.utilities import shapes


class ShapeError(AssertionError):
    """A tensor has another shape than its annotation says."""


def install() -> None:
    """Checks the functions of all modules of the package that are imported from now on."""
    for name in shapes.__all__:
        setattr(shapes, name, getattr(jaxtyping, name))
    sys.meta_path.insert(0, _Finder())


def checked(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """The function with a check of its shapes; the function itself if it has none.

    The check comes after the call: what the function refuses itself raises its own sentence. It is one more function of the
    module with these global `names`, for doctest and for warnings that look for the user's line.
    """
    hints: dict[str, Any] = {name: hint for name, hint in inspect.get_annotations(function).items() if _has_shape(hint)}
    if not hints:
        return function
    # Plain axes first: those of which N*K is the product are known then.
    order = sorted(hints, key=lambda name: "*" in str(hints[name]))
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and name in hints:
            hints[name] = tuple[hints[name], ...]
    bind = signature.bind

    # Which member of a sequence beartype looks at is random, and a run's random numbers are what many tests compare.
    draws = any(get_args(hint) for hint in hints.values())

    def check(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        values = bind(*args, **kwargs).arguments | {"return": result}
        state = random.getstate() if draws else None
        with jaxtyping.jaxtyped("context"):
            for name in order:
                if name in values and not is_bearable(values[name], hints[name]):
                    found = {name: _described(values[name]) for name in order if name in values}
                    raise ShapeError(f"Expected `{name}` of {function.__qualname__} as {hints[name]} but got {found}.")
        if state is not None:
            random.setstate(state)

    def checking(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        check(args, kwargs, result)
        return result

    return functools.update_wrapper(FunctionType(checking.__code__, names, closure=checking.__closure__), function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))


def _described(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_described(part) for part in value]
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else value


def _check_all(module: ModuleType, scope: Any) -> None:
    """Checks the functions that a module, or a class in it, defines."""
    for name, value in list(vars(scope).items()):
        if inspect.isfunction(value) and (scope is not module or value.__module__ == module.__name__):
            setattr(scope, name, checked(value, vars(module)))
        elif isinstance(value, classmethod | staticmethod):
            setattr(scope, name, type(value)(checked(value.__func__, vars(module))))
        elif isinstance(value, property) and value.fget is not None:
            setattr(scope, name, property(checked(value.fget, vars(module)), value.fset, value.fdel, value.__doc__))
        elif (
            inspect.isclass(value) and value.__module__ == module.__name__ and not getattr(value, "_is_protocol", False)
        ):
            _check_all(module, value)


class _Finder(importlib.abc.MetaPathFinder):
    """Checks a module's functions before any other module imports them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not name.startswith("lightning_ntk."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                _check_all(module, module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec
