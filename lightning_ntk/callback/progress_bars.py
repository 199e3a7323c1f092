"""Progress bars below the Trainer's own, TQDM or Rich."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_ntk.utilities.progress import DELAY_SECONDS, Work, bars_made_by, tqdm_bar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Nobody reads faster, and drawing takes a millisecond.
_SECONDS_BETWEEN_DRAWINGS = 0.1
_PERCENT = 100


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process shows a TQDM or Rich bar, below which others fit."""
    bar = trainer.progress_bar_callback
    return trainer.is_global_zero and isinstance(bar, TQDMProgressBar | RichProgressBar) and bar.is_enabled


@contextmanager
def nested_bars(trainer: Trainer) -> Iterator[None]:
    """Draws the package's bars below the Trainer's, of the same kind."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        with _rich_display(bar) as display, bars_made_by(lambda work: RichBar(display, work)):
            yield
    elif isinstance(bar, TQDMProgressBar):
        place, options = 2 * bar.process_position + 1, {"file": sys.stdout, "disable": bar.is_disabled}
        with bars_made_by(lambda work: tqdm_bar(work, Tqdm, position=place + work.depth, **options)):
            yield
    else:
        yield


@contextmanager
def _rich_display(bar: RichProgressBar) -> Iterator["Progress"]:
    """The Trainer's Rich display, or a new one.

    The Trainer has none before training has begun and before a second fit.
    """
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


@contextmanager
def cleared_bars() -> Iterator[None]:
    """Clears the bars for a message, then draws them again below it."""
    # Rich does so for what is written to sys.stderr, but Lightning's logger has kept the one from before.
    replaced = getattr(sys.stderr, "rich_proxied_file", None)
    handlers = [h for h in logging.getLogger("lightning.pytorch").handlers if isinstance(h, logging.StreamHandler)]
    late = [handler for handler in handlers if replaced is not None and handler.stream is replaced]
    for handler in late:
        handler.setStream(sys.stderr)
    try:
        with Tqdm.external_write_mode(file=sys.stdout) if getattr(Tqdm, "_instances", None) else nullcontext():
            yield
            sys.stdout.flush()
    finally:
        for handler in late:
            handler.setStream(replaced)


class RichBar:
    """One task of a Rich display, shown only if the work takes long.

    The display keeps one task for each depth, hidden until it is needed again. Removing a task would shift the others, and
    `RichProgressBar.train_progress_bar` finds the Trainer's by their place.
    """

    def __init__(self, progress: "Progress", work: Work) -> None:
        self._progress = progress
        self._work = work
        # Rich shows completed/total: uncounted work is scaled to percent.
        self._scale = 1 if work.counted or not work.total else _PERCENT / work.total
        self._task: TaskID | None = None
        self._done = 0.0
        self._started = self._drawn = time.monotonic()

    def update(self, n: float) -> None:
        """Adds finished units."""
        self._done += n
        now = time.monotonic()
        if now - self._started < DELAY_SECONDS or now - self._drawn < _SECONDS_BETWEEN_DRAWINGS:
            return
        self._drawn = now
        if self._task is None:
            self._task = self._show()
        if self._work.total:
            self._progress.update(self._task, completed=self._scale * self._done)
        self._progress.refresh()

    def close(self) -> None:
        """Hides the task."""
        if self._task is not None:
            self._progress.update(self._task, visible=False)
            self._progress.refresh()

    def _show(self) -> "TaskID":
        if not self._progress.live.is_started:
            self._progress.start()
        tasks = [task.id for task in self._progress.tasks if "lightning_ntk" in task.fields]
        while len(tasks) <= self._work.depth:
            tasks.append(self._progress.add_task("", visible=False, lightning_ntk=True))
        task = tasks[self._work.depth]
        # Displays of Trainers need a total. Work of unknown length stays at 0 of 1.
        total = self._scale * (self._work.total or 1)
        self._progress.reset(task, description=self._work.description, total=total, visible=True)
        return task
