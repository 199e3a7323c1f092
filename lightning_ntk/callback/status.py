"""Tracks how well a run is followed, and what the user has been told."""

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_ntk.callback.progress_bars import cleared_bars
from lightning_ntk.utilities.user_warnings import warn_user


@rank_zero_only
def say(message: str, name: str = "ntk") -> None:
    """Prints a message on a line of its own.

    It begins with the name of the monitor, if the user has given it one.
    """
    with cleared_bars():
        rank_zero_info(f"LinearizationMonitor{'' if name == 'ntk' else f' {name!r}'}: {message}")


@rank_zero_only
def warn(message: str) -> None:
    """Warns at the user's line, on a line of its own."""
    with cleared_bars():
        warn_user(message)


class RunStatus:
    """Reports each thing once, and remembers whether the linearized network still follows the run.

    Args:
        strict: Whether a failing measurement ends the run.

    Attributes:
        reported: The warnings that were given, by kind.
        exact: Whether the linearized network follows all that the run has done.
        lost: Whether the linearized network could not follow, which ends the measurements.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self.reported: dict[str, str] = {}
        self.exact = True
        self.lost = False

    def report_once(self, kind: str, message: str) -> None:
        """Warns, unless a warning of this kind was given before."""
        if kind not in self.reported:
            self.reported[kind] = message
            warn(message)

    def mark(self, kind: str, message: str) -> None:
        """Reports what the linearized network does not follow, and marks later rows."""
        self.exact = False
        self.report_once(kind, message)

    def fail(self, error: Exception, sentence: str, kind: str = "failure") -> None:
        """Reports a failed measurement, or raises it if the monitor is strict."""
        if self._strict:
            raise error
        self.report_once(kind, f"{sentence} {type(error).__name__}: {error}")
