"""Progress bars below those of a Trainer, as the Trainer's own are made."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_ntk.utilities.progress import DELAY_SECONDS, Bar, Work, bars_made_by, tqdm_bar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# A terminal cannot be read faster, and drawing it takes a millisecond.
_SECONDS_BETWEEN_DRAWINGS = 0.1
# Rich shows the units done and all of them, which for what nobody counts is better in percent.
_PERCENT = 100


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process shows a TQDM or a Rich bar, below which others have a place."""
    bar = trainer.progress_bar_callback
    return trainer.is_global_zero and isinstance(bar, TQDMProgressBar | RichProgressBar) and bar.is_enabled


@contextmanager
def nested_bars(trainer: Trainer) -> Iterator[None]:
    """Within, bars of the package are drawn below the Trainer's, of the same kind."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        with _rich_display(bar) as display, bars_made_by(lambda work: RichBar(display, work)):
            yield
    elif isinstance(bar, TQDMProgressBar):
        with bars_made_by(_tqdm_maker(bar)):
            yield
    else:
        yield


def _tqdm_maker(bar: TQDMProgressBar) -> Callable[[Work], Bar]:
    return lambda work: tqdm_bar(
        work, Tqdm, position=2 * bar.process_position + 1 + work.depth, file=sys.stdout, disable=bar.is_disabled
    )


@contextmanager
def _rich_display(bar: RichProgressBar) -> Iterator["Progress"]:
    """The Trainer's. Before training has begun there is none, or before a second fit one that is over: then one for now."""
    if bar.progress is not None and bar.progress.live.is_started:
        yield bar.progress
        return
    from rich.progress import Progress

    display = Progress(transient=True)
    try:
        yield display
    finally:
        if display.live.is_started:
            display.stop()


# Tasks of a Progress, one for every depth. They are hidden and used again: the Trainer finds its own by their place.
_tasks: "WeakKeyDictionary[Progress, list[TaskID]]" = WeakKeyDictionary()


class RichBar:
    """One task of a Rich display, shown if it takes long enough and hidden again.

    Args:
        progress: The display, which is started if it is not.
        work: What to show.
    """

    def __init__(self, progress: "Progress", work: Work) -> None:
        self._progress = progress
        self._work = work
        self._task: TaskID | None = None
        self._done = 0.0
        self._started = self._drawn = time.monotonic()

    def update(self, n: float) -> None:
        """So many units more are done."""
        self._done += n
        now = time.monotonic()
        if now - self._started < DELAY_SECONDS or now - self._drawn < _SECONDS_BETWEEN_DRAWINGS:
            return
        self._drawn = now
        if self._task is None:
            self._show()
        assert self._task is not None
        if self._work.total:
            self._progress.update(self._task, completed=self._scale * self._done)
        self._progress.refresh()

    def close(self) -> None:
        """Hides the task."""
        if self._task is None:
            return
        self._progress.update(self._task, visible=False)
        self._progress.refresh()
        self._task = None

    @property
    def _scale(self) -> float:
        return 1 if self._work.counted or not self._work.total else _PERCENT / self._work.total

    def _show(self) -> None:
        if not self._progress.live.is_started:
            self._progress.start()
        description, total = self._work.description, self._work.total
        # Displays of Trainers have no place for work of unknown length: it stays at its beginning.
        arguments: dict[str, Any] = {"total": self._scale * total if total else 1}
        tasks = _tasks.setdefault(self._progress, [])
        while len(tasks) <= self._work.depth:
            tasks.append(self._progress.add_task(description, visible=False, **arguments))
        self._task = tasks[self._work.depth]
        self._progress.reset(self._task, description=description, visible=True, **arguments)
