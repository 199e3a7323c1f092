"""A sweep described by a YAML file."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lightning_ntk.sweep.configurations import (
    Configuration,
    Range,
    check_configurations,
    grid,
    latin_hypercube,
    product,
    random_sample,
)
from lightning_ntk.sweep.lightning_cli import CommandLineObjective
from lightning_ntk.sweep.objective import ImportedObjective
from lightning_ntk.sweep.runner import Sweep

_SOURCES = ("grid", "random", "latin_hypercube")


@dataclass(frozen=True)
class SweepFile:
    """The contents of a file such as this; paths in it are relative to its directory.

        objective: my_project.train:objective       # or file.py:function, or {lightning_cli: {config: config.yaml}}
        grid: {width: [64, 256, 1024], seed: [0, 1, 2]}
        storage: sweep.journal                      # or a URL
        workers: 2

    Args:
        path: Of the file.
        objective: The function to run, by name, or the LightningCLI configuration.
        configurations: From `grid` (a dictionary of lists, or a list of dictionaries), `random` and `latin_hypercube` (with
            `samples`, `seed` and `ranges`); of several, every combination.
        storage: A path or a URL.
        name: Of the sweep in its storage.
        workers: Number of processes.
        threads: Of each worker. None: its share.
        patience: Seconds until a silent worker on another machine is taken for dead.
        logs: Directory for what workers print.
    """

    path: Path
    objective: ImportedObjective | CommandLineObjective
    configurations: list[Configuration]
    storage: str
    name: str
    workers: int
    threads: int | None
    patience: float
    logs: Path

    @staticmethod
    def read(path: str | os.PathLike[str], *, storage: str | None = None, name: str | None = None) -> "SweepFile":
        """Reads and checks a file.

        Args:
            path: Of the file.
            storage: Instead of the one in the file, relative to the current directory.
            name: Instead of the one in the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no YAML, lacks the objective or the configurations, or has a key that means nothing.
            TypeError: If a value has another type.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"Expected a YAML file that describes a sweep at {file} but there is none.")
        try:
            content = yaml.load(file.read_text(), Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {file} to be YAML but {error}") from error
        allowed = {field.name for field in fields(SweepFile)} - {"path", "configurations"} | set(_SOURCES)
        _require_keys(content, str(file), allowed, required={"objective"})
        directory = file.resolve().parent
        name = name or str(content.get("name", file.stem))
        place = storage or str(content.get("storage", f"{name}.journal"))
        if storage is None and "://" not in place:
            place = str(directory / place)
        return SweepFile(
            path=file,
            objective=_objective(content["objective"], name, directory),
            configurations=_configurations(content, file),
            storage=place,
            name=name,
            workers=content.get("workers", 1),
            threads=content.get("threads"),
            patience=content.get("patience", 120.0),
            logs=directory / content.get("logs", f"{name}.logs"),
        )

    def sweep(self) -> Sweep:
        """The sweep that the file describes."""
        return Sweep(
            self.objective, self.configurations,
            storage=self.storage, name=self.name, patience=self.patience, logs=self.logs,
        )  # fmt: skip


def _objective(content: Any, name: str, directory: Path) -> ImportedObjective | CommandLineObjective:
    if isinstance(content, str):
        return ImportedObjective(content, str(directory))
    _require_keys(content, "objective", {"lightning_cli"}, required={"lightning_cli"})
    options = content["lightning_cli"]
    _require_keys(options, "lightning_cli", {"config", "model", "data", "cli", "directory"}, required={"config"})
    config = options["config"]
    return CommandLineObjective(
        config=(config,) if isinstance(config, str) else tuple(config),
        search=str(directory),
        **{"directory": f"{name}.runs", **{key: value for key, value in options.items() if key != "config"}},
    )


def _configurations(content: Mapping[str, Any], file: Path) -> list[Configuration]:
    parts = []
    if "grid" in content:
        points = content["grid"]
        parts.append(grid(points) if isinstance(points, Mapping) else check_configurations(points or []))
    samplers: tuple[tuple[str, Callable[..., list[Configuration]]], ...] = (
        ("random", random_sample),
        ("latin_hypercube", latin_hypercube),
    )
    for key, sampler in samplers:
        if key in content:
            _require_keys(content[key], key, {"samples", "seed", "ranges"}, required={"samples", "ranges"})
            ranges = content[key]["ranges"]
            _require_keys(ranges, f"{key}.ranges", None, required=set())
            parts.append(
                sampler(
                    {parameter: _range(parameter, choices) for parameter, choices in ranges.items()},
                    samples=content[key]["samples"],
                    seed=content[key].get("seed", 0),
                )
            )
    if not parts:
        raise ValueError(f"Expected {file} to have configurations under one of {list(_SOURCES)} but it has none.")
    return product(*parts)


def _range(parameter: str, content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    _require_keys(content, f"the range of {parameter}", {"low", "high", "log", "integer"}, required={"low", "high"})
    return Range(**content)


def _require_keys(content: Any, where: str, allowed: set[str] | None, *, required: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise TypeError(f"Expected {where} to have keys and values but got {content!r}.")
    unknown = [] if allowed is None else sorted(str(key) for key in content if key not in allowed)
    if unknown:
        raise ValueError(f"Expected {where} to have keys among {sorted(allowed or ())} but it has {unknown}.")
    missing = sorted(required - set(content))
    if missing:
        raise ValueError(f"Expected {where} to have the keys {missing} but it has {sorted(map(str, content))}.")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 1e-3 is a number, as in YAML 1.2; PyYAML reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
