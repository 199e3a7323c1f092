import importlib

import pytest

import lightning_ntk
import lightning_ntk.sweep


@pytest.mark.parametrize("package", [lightning_ntk, lightning_ntk.sweep])
def test_every_public_name_is_found_and_listed(package: object) -> None:
    names = vars(package)["__all__"]
    assert all(getattr(package, name).__name__ == name for name in names)
    assert set(names) <= set(dir(package))


def test_modules_are_found_and_unknown_names_are_not() -> None:
    assert lightning_ntk.plots is importlib.import_module("lightning_ntk.plots")
    with pytest.raises(AttributeError, match="module 'lightning_ntk' has no attribute 'LinearisationMonitor'"):
        lightning_ntk.LinearisationMonitor  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from lightning_ntk.sweep import nothing  # noqa: F401
