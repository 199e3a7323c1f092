"""What a sweep runs: a function of a configuration, given as such or by its import path, and what it may return."""

import hashlib
import importlib
import importlib.util
import numbers
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_ntk.sweep.configurations import Configuration
from lightning_ntk.sweep.entry import Row


@runtime_checkable
class Monitor(Protocol):
    """What a sweep reads of a `LinearizationMonitor`."""

    name: str
    history: list[dict[str, float]]


Objective = Callable[[Configuration], Monitor | Mapping[str, float]]
"""Trains for one configuration; returns the `LinearizationMonitor` of the run, or named scalars."""


@dataclass(frozen=True)
class ImportedObjective:
    """An objective named by a string, imported in the process that runs it.

    Args:
        path: "package.module:function", or "file.py:function" relative to `directory`.
        directory: Searched for modules too.

    Raises:
        ValueError: If the string has another form.
    """

    path: str
    directory: str = "."

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or self.path.count(":") != 1 or not all(self.path.split(":")):
            raise ValueError(
                f'Expected the objective as "package.module:function" or "file.py:function" but got {self.path!r}.'
            )

    @property
    def identity(self) -> str:
        """The name under which its results are kept."""
        module, function = self.path.split(":")
        name = Path(module).stem if module.endswith(".py") else module
        return f"{name.rpartition('.')[2]}:{function}"

    def load(self) -> Objective:
        """The function itself.

        Raises:
            ImportError: If there is no such module, function, or file.
        """
        found: Any = import_path(self.path, self.directory)
        if not callable(found):
            raise ImportError(f"Expected {self.path} to be a function of a configuration but it is {found!r}.")
        function: Objective = found
        return function

    def __call__(self, configuration: Configuration) -> Monitor | Mapping[str, float]:
        """Imports the function and calls it."""
        return self.load()(configuration)


def import_path(path: str, directory: str = ".") -> Any:
    """The object "package.module:name" or "file.py:name"; dots may stand for the colon where it is a module's.

    Raises:
        ImportError: If there is no such module, file or name.
    """
    module_name, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    add_to_path(directory)
    if module_name.endswith(".py"):
        module_name = _import_file(Path(directory, module_name).resolve())
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise ImportError(f"Expected a name {name!r} in {module.__file__} but there is none.")
    return getattr(module, name)


def add_to_path(directory: str) -> None:
    """Lets modules of a directory, and of the current one, be imported, as `python` does for a script's."""
    for entry in (str(Path.cwd()), str(Path(directory).resolve())):
        if entry not in sys.path:
            sys.path.insert(0, entry)


def _import_file(file: Path) -> str:
    if not file.is_file():
        raise ImportError(f"Expected a Python file at {file} but there is none.")
    # Not the name of an installed package, nor of a file elsewhere.
    name = f"_sweep_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return name


def objective_identity(objective: Objective) -> str:
    """A name for the objective that is the same in a script, from the command line, and tomorrow."""
    identity = getattr(objective, "identity", None)
    if isinstance(identity, str):
        return identity
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    module = named.__module__
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module.rpartition('.')[2]}:{named.__qualname__}"


def require_for_processes(objective: Objective) -> None:
    """Requires an objective that another process can import.

    Raises:
        TypeError: If it is a lambda, a local function, or defined in a notebook.
    """
    interactive = not hasattr(sys.modules["__main__"], "__file__")
    try:
        pickle.dumps(objective)
    except Exception as error:
        reason = str(error)
    else:
        if getattr(objective, "__module__", None) != "__main__" or not interactive:
            return
        reason = "it is defined in an interactive session"
    raise TypeError(
        f"Expected an objective that worker processes can import, a function at the top level of a file, but got {objective!r}: "
        f"{reason}. Move it to a file, or use workers=0 to run the sweep in this process."
    )


def rows_of(result: Any) -> list[Row]:
    """The measurements in what an objective returned, as plain floats.

    Args:
        result: A `LinearizationMonitor`: its history, with the tags that it logs ("ntk/weight_distance"); or one dictionary of
            scalars, with or without a "step".

    Returns:
        At least one row with at least one scalar besides "step".

    Raises:
        TypeError: If it is anything else.
        ValueError: If nothing was measured.
    """
    rows: Sequence[Mapping[str, Any]]
    if isinstance(result, Mapping):
        rows = [result]
    elif isinstance(result, Monitor):
        rows = [
            {tag if tag == "step" else f"{result.name}/{tag}": v for tag, v in row.items()} for row in result.history
        ]
        if not rows:
            raise ValueError(
                "Expected a LinearizationMonitor that has measured but its history is empty: was it given to the Trainer that "
                "called fit?"
            )
    else:
        returned = "nothing" if result is None else f"{result!r} of type {type(result).__name__}"
        raise TypeError(
            f"Expected the objective to return a LinearizationMonitor or a dictionary of scalars but it returned {returned}."
        )
    if all(set(row) <= {"step"} for row in rows):
        raise ValueError("Expected the objective to return at least one scalar besides the step but it returned none.")
    return [{_tag(tag): _scalar(tag, value) for tag, value in row.items()} for row in rows]


def headline(rows: Sequence[Row]) -> str:
    """The scalar that stands for a trial where there is room for one: the relative weight distance, else the first."""
    tags = [tag for tag in rows[-1] if tag != "step"] or [tag for row in rows for tag in row if tag != "step"]
    distances = [tag for tag in tags if tag.rpartition("/")[2] == "relative_weight_distance"]
    return (distances or tags)[0]


def _tag(tag: Any) -> str:
    if not isinstance(tag, str):
        raise TypeError(f"Expected the scalars of a result to have strings as names but got {tag!r}.")
    return tag


def _scalar(tag: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(
        f"Expected the scalar {tag!r} of a result to be a number but got {value!r} of type {type(value).__name__}."
    )
