"""Warnings that point to the user's own line."""

import sys
import warnings

# Code that calls this package, or that this package calls, and that the user has not written.
_NOT_THE_USER = {
    "lightning", "lightning_ntk", "lightning_utilities", "pytorch_lightning", "torch", "torchmetrics", "tqdm", "transformers",
}  # fmt: skip


def warn_user(message: str) -> None:
    """Gives a UserWarning at the line of the user's code.

    It is the line that led here, such as that of `trainer.fit`.
    """
    frame, level = sys._getframe().f_back, 2
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _NOT_THE_USER and package not in sys.stdlib_module_names:
            break
        frame, level = frame.f_back, level + 1
    # Without a line of the user's, as in a worker of a sweep, the place in this package is the best there is.
    warnings.warn(message, UserWarning, stacklevel=level if frame is not None else 2)
