"""Restores the state of objects, such as generators, counters and caches."""

import functools
import io
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Larger containers and tensors are data, and no state.
_MOST_ELEMENTS = 1000
_MOST_NUMBERS = 64
_ATOMS: tuple[Any, ...] = (
    str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, torch.dtype, torch.device,
    *weakref.ProxyTypes,  # which look like iterators, whatever they stand for
)  # fmt: skip
_CONTAINERS = (list, dict, set, deque)


@contextmanager
def preserved_objects(*roots: Any, skip: tuple[type, ...] = ()) -> Iterator[None]:
    """Restores on exit what can be reached from some objects.

    It covers random generators, attributes, and small containers and tensors.

    Attributes, containers, closures and arguments of partial functions are followed, but not objects of the types `skip`. Files,
    iterators and what lives outside of Python stay as they are.
    """
    restore = [action for thing in _reached(roots, skip) for action in _memory_of(thing)]
    try:
        yield
    finally:
        for action in restore:
            action()


def reached_iterator(*roots: Any, skip: tuple[type, ...] = ()) -> Any:
    """Finds an iterator that cannot be restored; None if there is none.

    It is reached from some objects. A generator is an example.

    Objects of the types `skip` are not followed.
    """
    return next((thing for thing in _reached(roots, skip) if _is_iterator(thing)), None)


def is_random_generator(value: Any) -> bool:
    """Whether an object draws random numbers from its own state.

    These are PyTorch's, Python's and NumPy's generators.
    """
    return isinstance(value, torch.Generator | random.Random) or _is_numpy(value)


def random_state(generator: Any) -> Any:
    """The state of a random generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else _bits(generator).state


def set_random_state(generator: Any, state: Any) -> None:
    """Puts a random generator into a state."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        _bits(generator).state = state


def class_generators(kind: type) -> list[Any]:
    """Random generators that are attributes of a class."""
    return [value for base in kind.__mro__ for value in vars(base).values() if is_random_generator(value)]


def _reached(roots: Iterable[Any], skip: tuple[type, ...]) -> Iterator[Any]:
    """Every object that may keep a state, once."""
    waiting, seen = list(roots), set()
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, (*_ATOMS, *skip)) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        waiting += _parts(thing)


def _parts(thing: Any) -> list[Any]:
    if is_random_generator(thing) or isinstance(thing, Tensor):
        return []
    if isinstance(thing, (*_CONTAINERS, tuple)):
        if len(thing) > _MOST_ELEMENTS:
            return []
        return list(thing.values()) if isinstance(thing, dict) else list(thing)
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        named = (thing.__globals__.get(name) for name in thing.__code__.co_names)
        return [*cells, *(value for value in named if is_random_generator(value))]
    return [*getattr(thing, "__dict__", {}).values(), *class_generators(type(thing))]


def _memory_of(thing: Any) -> list[Callable[[], None]]:
    """What puts this object back as it is now, without its parts."""
    if is_random_generator(thing):
        return [functools.partial(set_random_state, thing, random_state(thing))]
    if isinstance(thing, Tensor):
        small = thing.numel() <= _MOST_NUMBERS and not thing.requires_grad
        return [functools.partial(_restore_tensor, thing, thing.clone(), thing._version)] if small else []
    if isinstance(thing, _CONTAINERS) and len(thing) <= _MOST_ELEMENTS:
        return [functools.partial(_restore_container, thing, thing.copy())]
    attributes = getattr(thing, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(thing, types.FunctionType):
        return [functools.partial(_restore_container, attributes, dict(attributes))]
    return []


def _restore_container(container: Any, kept: Any) -> None:
    if isinstance(container, Mapping):
        same = container.keys() == kept.keys() and all(container[key] is value for key, value in kept.items())
    else:
        same = len(container) == len(kept) and all(a is b for a, b in zip(container, kept, strict=True))
    if not same:
        container.clear()
        container.extend(kept) if isinstance(container, list | deque) else container.update(kept)


def _restore_tensor(tensor: Tensor, kept: Tensor, version: int) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(kept)


def _is_iterator(thing: Any) -> bool:
    return hasattr(type(thing), "__next__") and not isinstance(thing, io.IOBase)


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def _bits(generator: Any) -> Any:
    return getattr(generator, "bit_generator", None) or generator._bit_generator
