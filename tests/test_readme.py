"""The README's snippets run as they stand, but for the length of the run."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_ntk import __version__
from tests.callback.test_monitor import digits, make_module

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs, targets = digits().tensors
    names = {
        "module": make_module(),
        "train_loader": DataLoader(digits(), batch_size=11),
        "inputs": inputs,
        "targets": targets,
        "new_inputs": torch.randn(3, 6),
    }
    exec(re.sub(r"max_steps=\d+", 'max_steps=3, accelerator="cpu"', snippet), names)


def test_the_citation_agrees_with_the_citation_file() -> None:
    cited = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", README.replace("\\_", "_"), flags=re.MULTILINE))
    file = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())
    assert cited["title"] == file["title"]
    assert cited["version"] == file["version"] == __version__
    assert (int(cited["year"]), cited["license"]) == (file["date-released"].year, file["license"])
    assert cited["author"] == "{" + file["authors"][0]["name"] + "}"


def test_there_are_two_snippets_and_two_commands() -> None:
    assert len(SNIPPETS) == 2
    assert re.findall(r"  # (run|test)$", README, flags=re.MULTILINE) == ["run", "test"]
