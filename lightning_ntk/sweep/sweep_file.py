"""A sweep described by a YAML file."""

import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lightning_ntk.sweep.configurations import Configuration, Range, grid, latin_hypercube, product, random_sample
from lightning_ntk.sweep.lightning_cli import CommandLineObjective
from lightning_ntk.sweep.objective import ImportedObjective, Objective
from lightning_ntk.sweep.runner import Sweep
from lightning_ntk.utilities.validation import require_integer

_SAMPLERS = {"random": random_sample, "latin_hypercube": latin_hypercube}
_SOURCES = ("grid", *_SAMPLERS)
_TEXTS = ("storage", "name", "logs")
_OPTIONS = ("objective", "workers", "threads", "patience", *_TEXTS)


@dataclass(frozen=True)
class SweepFile:
    """The contents of a sweep file; paths are relative to its directory.

        objective: my_project.train:objective       # or file.py:function, or {lightning_cli: {config: config.yaml}}
        grid: {width: [64, 256, 1024], seed: [0, 1, 2]}
        storage: sweep.journal                      # or a URL
        workers: 2

    Configurations come from `grid` (a dictionary of lists, or a list of dictionaries), `random` and `latin_hypercube` (with
    `samples`, `seed` and `ranges`); of several, every combination.
    """

    sweep: Sweep
    workers: int
    threads: int | None  # of each worker; None: its share of the processors

    @staticmethod
    def read(path: str | os.PathLike[str], *, storage: str | None = None, name: str | None = None) -> "SweepFile":
        """Reads and checks a file.

        `storage`, relative to the current directory, and `name` replace those in it.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"Expected a YAML file that describes a sweep at {file} but there is none.")
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {file} to be YAML but {error}") from error
        _require_keys(content, str(file), {*_OPTIONS, *_SOURCES}, required={"objective"})
        for key in _TEXTS:
            if key in content and not (isinstance(content[key], str) and content[key]):
                raise TypeError(
                    f"Expected {key!r} in {file} to be text but got {content[key]!r}; leave it out for its default."
                )
        require_integer("workers", workers := content.get("workers", 1), least=0)
        if (threads := content.get("threads")) is not None:
            require_integer("threads", threads, least=1)
        directory = file.resolve().parent
        name = name or content.get("name", file.stem)
        if storage is None:
            storage = content.get("storage", f"{name}.journal")
            storage = storage if "://" in storage else str(directory / storage)
        sweep = Sweep(
            _objective(content["objective"], name, directory), _configurations(content, file),
            storage=storage, name=name, patience=content.get("patience", 120.0),
            logs=directory / content.get("logs", f"{name}.logs"),
        )  # fmt: skip
        return SweepFile(sweep, workers, threads)


def _objective(content: Any, name: str, directory: Path) -> Objective:
    if isinstance(content, str):
        return ImportedObjective(content, str(directory))
    _require_keys(content, "objective", {"lightning_cli"}, required={"lightning_cli"})
    options = content["lightning_cli"]
    _require_keys(options, "lightning_cli", {"config", "model", "data", "cli", "directory"}, required={"config"})
    config = options["config"]
    files = (config,) if isinstance(config, str) else tuple(config)
    return CommandLineObjective(**{"directory": f"{name}.runs", **options, "config": files, "search": str(directory)})


def _configurations(content: Mapping[str, Any], file: Path) -> list[Configuration]:
    parts = []
    if "grid" in content:
        points = content["grid"]
        parts.append(grid(points) if isinstance(points, Mapping) else points or [])
    for key, sampler in _SAMPLERS.items():
        if key in content:
            options = content[key]
            _require_keys(options, key, {"samples", "seed", "ranges"}, required={"samples", "ranges"})
            _require_keys(options["ranges"], f"{key}.ranges")
            ranges = {parameter: _range(parameter, choices) for parameter, choices in options["ranges"].items()}
            parts.append(sampler(ranges, samples=options["samples"], seed=options.get("seed", 0)))
    if not parts:
        raise ValueError(f"Expected {file} to have configurations under one of {list(_SOURCES)} but it has none.")
    return product(*parts)


def _range(parameter: str, content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    _require_keys(content, f"the range of {parameter}", {"low", "high", "log", "integer"}, required={"low", "high"})
    return Range(**content)


def _require_keys(content: Any, where: str, allowed: Set[str] | None = None, required: Set[str] = frozenset()) -> None:
    if not isinstance(content, Mapping):
        raise TypeError(f"Expected {where} to have keys and values but got {content!r}.")
    unknown = [] if allowed is None else sorted(str(key) for key in content if key not in allowed)
    if unknown:
        raise ValueError(f"Expected {where} to have keys among {sorted(allowed or ())} but it has {unknown}.")
    missing = sorted(required - set(content))
    if missing:
        raise ValueError(f"Expected {where} to have the keys {missing} but it has {sorted(map(str, content))}.")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without duplicate keys, with plain values as in YAML 1.2.

    PyYAML reads YAML 1.1, where 1e-3 and 1:30 are text and the number 90, and 010 and no are 8 and false.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: list[Any] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            keys.append(key.value)
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]\d*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), _first)
