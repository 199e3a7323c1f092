"""What a release says of itself in several places is the same."""

import importlib
import json
import re
import tomllib
from importlib.metadata import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch.torch_version import TorchVersion

import lightning_ntk
from lightning_ntk.utilities import contexts

ROOT = Path(__file__).parent.parent


def test_versions_agree() -> None:
    version = lightning_ntk.__version__
    assert metadata("lightning-ntk")["Version"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert heading is not None
    assert heading[1] == version


def pins(file: str) -> dict[str, Version]:
    lines = [line.split("==") for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(name): Version(version) for name, version in lines}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [r for r in map(Requirement, chain(*lists)) if r.name != "lightning-ntk"]


def test_the_tested_versions_are_within_the_ranges() -> None:
    tested = pins("constraints.txt")
    for requirement in requirements():
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_floors_are_the_oldest_versions() -> None:
    oldest = pins("tests/versions/oldest.txt")
    for requirement in requirements():
        (specifier,) = requirement.specifier
        floor = Version(specifier.version).release
        assert oldest[canonicalize_name(requirement.name)].release[: len(floor)] == floor, requirement


def test_the_oldest_and_the_newest_versions_were_tested() -> None:
    oldest, newest = (json.loads((ROOT / f"tests/versions/{which}.json").read_text()) for which in ("oldest", "newest"))
    assert oldest["failed"] == newest["failed"] == 0
    for name, version in pins("tests/versions/oldest.txt").items():
        assert Version(oldest["versions"][name]) == version <= Version(newest["versions"][name]), name


def test_an_older_pytorch_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", TorchVersion("2.7.1+cu126"))
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.8 or newer, but this is 2\.7\.1"):
        importlib.reload(contexts)
