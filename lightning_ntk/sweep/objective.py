"""What a sweep runs: a function of a configuration, and what it may return."""

import hashlib
import numbers
import pickle
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from lightning_ntk.sweep.configurations import Configuration
from lightning_ntk.sweep.queue import Row


@runtime_checkable
class Monitor(Protocol):
    """What a sweep reads of a `LinearizationMonitor`."""

    name: str
    history: list[dict[str, float]]


Objective = Callable[[Configuration], Monitor | Mapping[str, float]]
"""Trains for one configuration; returns the run's `LinearizationMonitor`, or named scalars."""


@dataclass(frozen=True)
class ImportedObjective:
    """An objective named by a string, imported in the process that runs it."""

    path: str  # "package.module:function", or "file.py:function" relative to `directory`
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
        """Imports the function."""
        found: Any = import_path(self.path, self.directory)
        if not callable(found):
            raise ImportError(f"Expected {self.path} to be a function of a configuration but it is {found!r}.")
        function: Objective = found
        return function

    def __call__(self, configuration: Configuration) -> Monitor | Mapping[str, float]:
        """Imports the function and calls it."""
        return self.load()(configuration)


def import_path(path: str, directory: str = ".") -> Any:
    """Imports "package.module:name", "package.module.name" or "file.py:name" from a directory, or raises an ImportError."""
    add_to_path(directory)
    module, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        if module.endswith(".py"):
            return getattr(_import_file(Path(directory, module).resolve()), name)
        return pkgutil.resolve_name(f"{module}:{name}")
    except (Exception, SystemExit) as error:
        raise ImportError(
            f"Expected to import {path!r}, searched in {directory}, but it raised {type(error).__name__}: {error}"
        ) from error


def add_to_path(directory: str) -> None:
    """Makes modules of a directory and the current one importable.

    It does what `python` does for a script.
    """
    for entry in (str(Path.cwd()), str(Path(directory).resolve())):
        if entry not in sys.path:
            sys.path.insert(0, entry)


def _import_file(file: Path) -> ModuleType:
    # Not the name of an installed package, nor of a file elsewhere.
    name = f"_sweep_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        loader = SourceFileLoader(name, str(file))
        sys.modules[name] = module_from_spec(ModuleSpec(name, loader, origin=str(file)))
        try:
            loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def objective_identity(objective: Objective) -> str:
    """The objective's name, the same in a script, from the command line, and tomorrow."""
    identity = getattr(objective, "identity", None)
    if isinstance(identity, str):
        return identity
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    module = named.__module__
    if module in ("__main__", "__mp_main__"):  # the latter in a process that was spawned
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module.rpartition('.')[2]}:{named.__qualname__}"


def require_for_processes(objective: Objective) -> None:
    """Raises a TypeError unless another process can import the objective.

    Lambdas, local functions and notebook cells cannot be imported.
    """
    try:
        pickle.dumps(objective)
    except Exception as error:
        reason = str(error)
    else:
        if getattr(objective, "__module__", None) != "__main__" or hasattr(sys.modules["__main__"], "__file__"):
            return
        reason = "it is defined in an interactive session"
    raise TypeError(
        f"Expected an objective that worker processes can import, a function at the top level of a file, but got {objective!r}: "
        f"{reason}. Move it to a file, or use workers=0 to run the sweep in this process."
    )


def rows_of(result: Any) -> list[Row]:
    """The measurements that an objective returned.

    There is at least one row with a scalar besides "step".

    The history of a `LinearizationMonitor` gets the tags that it logs ("ntk/weight_distance"); a dictionary is one row.
    """
    rows: Sequence[Mapping[str, Any]]
    if isinstance(result, Mapping):
        rows = [result]
    elif isinstance(result, Monitor):
        rows = [
            {tag if tag == "step" else f"{result.name}/{tag}": v for tag, v in row.items()} for row in result.history
        ]
    else:
        raise TypeError(
            f"Expected the objective to return a LinearizationMonitor or a dictionary of scalars but it returned {result!r}."
        )
    if all(set(row) <= {"step"} for row in rows):
        raise ValueError(
            "Expected the objective to return at least one scalar besides the step but it returned none. A LinearizationMonitor "
            "has them after `fit` of the Trainer to which it was given."
        )
    return [{tag: _scalar(tag, value) for tag, value in row.items()} for row in rows]


def verdict_of(result: Any) -> tuple[str, str] | None:
    """The word and the reason of a monitor's verdict, or None.

    The monitor knows more of the run than its scalars.
    """
    verdict = getattr(result, "verdict", None)
    return None if verdict is None else (verdict.word, verdict.reason)


def headline(rows: Sequence[Row]) -> str:
    """The scalar that stands for a trial: the relative weight distance, else the first."""
    tags = [tag for row in (rows[-1], *rows) for tag in row if tag != "step"]
    distances = [tag for tag in rows[-1] if tag.rpartition("/")[2] == "relative_weight_distance"]
    return (distances or tags)[0]


def _scalar(tag: Any, value: Any) -> float:
    if not isinstance(tag, str):
        raise TypeError(f"Expected the scalars of a result to have strings as names but got {tag!r}.")
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"Expected the scalar {tag!r} of a result to be a number but got {value!r}.")
