"""What a release says of itself in several places is the same."""

import re
from importlib.metadata import metadata
from pathlib import Path

import tomllib

import lightning_ntk

ROOT = Path(__file__).parent.parent


def test_versions_agree() -> None:
    version = lightning_ntk.__version__
    assert metadata("lightning-ntk")["Version"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert heading is not None
    assert heading[1] == version


def test_the_tested_versions_are_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert pinned[requirement.name] in requirement.specifier, requirement
