"""One progress bar for every long loop of the package."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(iterable: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yields from `iterable` under a tqdm bar that names the work and vanishes when it is done.

    Loops shorter than half a second show nothing, so that frequent measurements do not make the terminal flicker.
    """
    yield from tqdm(
        iterable, desc=description, total=total, leave=False, delay=0.5, disable=not enabled, dynamic_ncols=True
    )
