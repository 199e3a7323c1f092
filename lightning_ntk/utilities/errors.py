"""Explains errors of torch and of the user's own code.

A message says what was done, on what, and the cause.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@contextmanager
def explained(what: Callable[[], str], advice: str) -> Iterator[None]:
    """Explains what was done when something fails.

    Errors of torch become a ValueError, those of the user's code get a note.

    Args:
        what: What is done, the beginning of a sentence: "The forward pass on ...". Called after a failure only.
        advice: What to do about an error of torch, a sentence.

    Raises:
        ValueError: In the place of an error that torch has raised, which is its cause.
        MemoryError: In the place of one about memory on the CPU.
    """
    try:
        yield
    except Exception as error:
        origin = _origin(error)
        if origin == "lightning_ntk" or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        if "can't allocate memory" in str(error):
            raise MemoryError(
                f"{what()} needs more memory than is free: {error}. Use a smaller `batch_size`."
            ) from error
        if origin == "torch":
            raise ValueError(f"{what()} failed: {str(error).rstrip('.')}. {advice}") from error
        if not hasattr(error, "__notes__"):
            error.add_note(f"{what()} failed, which lightning_ntk asked for.")
        raise


def describe(tree: object) -> str:
    """The types and shapes of the tensors in inputs, in words."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    parts = [f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}" for t in tensors[:3]]
    more = f" and {len(tensors) - 3} more" if tensors[3:] else ""
    return f"{', '.join(parts)}{more}" if tensors else f"a {type(tree).__name__} without tensors"


def _origin(error: Exception) -> str:
    """The package whose code has raised an error.

    An error of a worker process is the user's.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    # A mode that watches operations stands between the code that asked for one and the error.
    frame = next(frame for frame in reversed(frames) if frame.f_code.co_name != "__torch_function__")
    worker = frame.f_code.co_name == "reraise"
    return "" if worker else str(frame.f_globals.get("__name__", "")).partition(".")[0]
