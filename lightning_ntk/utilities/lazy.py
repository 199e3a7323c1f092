"""Imports what is needed when it is first used (PEP 562), so that the command line starts without torch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    Args:
        package: The package's `__name__`.
        modules: The module in which each name is found. Submodules are found without being named.
    """

    def getattr_of_package(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name]), name)
        missing = f"{package}.{name}"
        if not name.startswith("_"):
            try:
                return importlib.import_module(missing)
            except ModuleNotFoundError as error:
                if error.name != missing:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattr_of_package, lambda: ["__doc__", *modules]


def optional_module(name: str, use: str) -> Any:
    """Imports a module of a package that only one use needs.

    Args:
        name: The module.
        use: What needs it, at the beginning of a sentence.

    Raises:
        ModuleNotFoundError: If the package is not installed, with how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(f"{use} needs {package}, which is not installed: pip install {package}.") from error
