"""One progress bar for every long loop of the package."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Shorter loops show nothing, so that frequent measurements do not make the terminal flicker.
DELAY_SECONDS = 0.5
# Operations mean nothing to a reader; the share that is done and the time left do.
_SHARE_FORMAT = "{l_bar}{bar}| [{elapsed}<{remaining}]"


class Work(NamedTuple):
    """What a bar shows."""

    description: str
    total: float | None  # units of the whole work; None if unknown
    counted: bool = True  # whether a reader would count these units
    depth: int = 0  # how many bars are open around this one


class Bar(Protocol):
    """Shows the progress of one piece of work."""

    def update(self, n: float) -> object:
        """Adds `n` finished units."""

    def close(self) -> object:
        """Removes the bar: the work is done or given up."""


def tqdm_bar(work: Work, make: "type[tqdm[Any]]" = tqdm, **options: Any) -> Bar:
    """A bar in the terminal that disappears when it is closed.

    `options` are those of tqdm.
    """
    if not work.counted:
        options["bar_format"] = "{desc} ..." if work.total is None else _SHARE_FORMAT
    # A call of unknown length never updates its bar, so the bar must show at once.
    delay = 0 if work.total is None else DELAY_SECONDS
    bar: Bar = make(desc=work.description, total=work.total, leave=False, delay=delay, dynamic_ncols=True, **options)
    return bar


_make_bar: ContextVar[Callable[[Work], Bar]] = ContextVar("make_bar", default=tqdm_bar)
_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def bars_made_by(make: Callable[[Work], Bar]) -> Iterator[None]:
    """Makes every bar of the package with `make` inside the block."""
    tokens = _make_bar.set(make), _depth.set(0)
    try:
        yield
    finally:
        _make_bar.reset(tokens[0])
        _depth.reset(tokens[1])


def track(iterable: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yields from `iterable` under a bar that names the work.

    The bar disappears at the end.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with track_operations(description, total=total, counted=True, enabled=enabled) as advance:
        for item in iterable:
            yield item
            advance(1)


@contextmanager
def track_operations(
    description: str, *, total: float | None, counted: bool = False, enabled: bool = True
) -> Iterator[Callable[[float], object]]:
    """A bar for steps of unequal cost.

    It yields a function to call after each step with its operations.

    `total` is None for a single call that cannot report its progress.
    """
    if not enabled:
        yield lambda n: None
        return
    depth = _depth.get()
    bar = _make_bar.get()(Work(description, total, counted, depth))
    token = _depth.set(depth + 1)
    try:
        yield bar.update
    finally:
        _depth.reset(token)
        bar.close()
