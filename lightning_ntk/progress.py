"""One progress bar for every long loop of the package."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Loops shorter than this show nothing, so that frequent measurements do not make the terminal flicker.
_DELAY_SECONDS = 0.5
# Counted operations mean nothing to a reader; their share of all, and the time that is left, do.
_SHARE_FORMAT = "{l_bar}{bar}| [{elapsed}<{remaining}]"


def track(iterable: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yields from `iterable` under a tqdm bar that names the work and vanishes when it is done."""
    yield from tqdm(
        iterable,
        desc=description,
        total=total,
        leave=False,
        delay=_DELAY_SECONDS,
        disable=not enabled,
        dynamic_ncols=True,
    )


@contextmanager
def track_operations(description: str, *, total: float, enabled: bool = True) -> Iterator[Callable[[float], object]]:
    """A bar for work in steps of unequal cost, whose estimate of the time left goes by operations.

    Args:
        description: The work.
        total: Operations of all steps.
        enabled: Whether to show the bar.

    Yields:
        A function to be called after each step, with its operations.
    """
    with tqdm(
        desc=description,
        total=total,
        leave=False,
        delay=_DELAY_SECONDS,
        disable=not enabled,
        dynamic_ncols=True,
        bar_format=_SHARE_FORMAT,
    ) as bar:
        yield bar.update
