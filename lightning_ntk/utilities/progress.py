"""One progress bar for every long loop of the package."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Loops shorter than this show nothing, so that frequent measurements do not make the terminal flicker.
DELAY_SECONDS = 0.5
# Counted operations mean nothing to a reader; their share of all, and the time that is left, do.
_SHARE_FORMAT = "{l_bar}{bar}| [{elapsed}<{remaining}]"
_POLL_SECONDS = 0.1


class Work(NamedTuple):
    """What a bar is about.

    Attributes:
        description: The work, a few words.
        total: Steps, or units of any kind, of all of it; None if nobody knows.
        counted: Whether a reader would count these units.
        depth: Bars that are open around this one.
    """

    description: str
    total: float | None
    counted: bool = True
    depth: int = 0


class Bar(Protocol):
    """What shows the progress of one piece of work."""

    def update(self, n: float) -> object:
        """So many units more are done."""

    def close(self) -> object:
        """The work is done or given up, and the bar is to vanish."""


def tqdm_bar(work: Work, make: "type[tqdm[Any]]" = tqdm, **options: Any) -> Bar:
    """A bar in the terminal that vanishes when it is closed; `options` are those of tqdm."""
    if not work.counted:
        options["bar_format"] = _SHARE_FORMAT
    bar: Bar = make(
        desc=work.description, total=work.total, leave=False, delay=DELAY_SECONDS, dynamic_ncols=True, **options
    )
    return bar


_make_bar: ContextVar[Callable[[Work], Bar]] = ContextVar("make_bar", default=tqdm_bar)
_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def bars_made_by(make: Callable[[Work], Bar]) -> Iterator[None]:
    """Within, every bar of the package is made by `make`."""
    tokens = _make_bar.set(make), _depth.set(0)
    try:
        yield
    finally:
        _make_bar.reset(tokens[0])
        _depth.reset(tokens[1])


def track(iterable: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yields from `iterable` under a bar that names the work and vanishes when it is done."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with _open(Work(description, total), enabled) as advance:
        for item in iterable:
            yield item
            advance(1)


@contextmanager
def track_operations(
    description: str, *, total: float, counted: bool = False, enabled: bool = True
) -> Iterator[Callable[[float], object]]:
    """A bar for work in steps of unequal cost, whose estimate of the time left goes by operations.

    Args:
        description: The work.
        total: Operations of all steps.
        counted: Whether a reader would count them; else only their share is shown.
        enabled: Whether to show the bar.

    Yields:
        A function to be called after each step, with its operations.
    """
    with _open(Work(description, total, counted), enabled) as advance:
        yield advance


def wait_for(call: Callable[[], T], description: str, *, seconds: float, enabled: bool = True) -> T:
    """Calls a function that is one long operation of a library, under a bar, and so that Ctrl-C ends the waiting at once.

    Python answers signals between two of its own instructions, hence never within a factorization. It runs in a thread
    of its own, which an interruption leaves to itself until the process ends.

    Args:
        call: The function.
        description: What it does.
        seconds: How long it is expected to take.
        enabled: Whether to show the bar.

    Returns:
        What it returns; what it raises is raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    left = seconds
    with track_operations(description, total=seconds, enabled=enabled) as advance:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            # The bar stays short of its end, however late the work is.
            passed = min(_POLL_SECONDS, left / 2)
            left -= passed
            advance(passed)
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _open(work: Work, enabled: bool) -> Iterator[Callable[[float], object]]:
    if not enabled:
        yield lambda n: None
        return
    depth = _depth.get()
    bar = _make_bar.get()(work._replace(depth=depth))
    token = _depth.set(depth + 1)
    try:
        yield bar.update
    finally:
        _depth.reset(token)
        bar.close()
