"""The documentation: its snippets run and print what the pages show, its pages name what there is, and it builds."""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor
from tests.test_callback import digits, fit, make_module

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))

from make_matrix import COLUMNS, collect, matrix_page  # noqa: E402

SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
PAGES = [page for page in sorted(DOCS.glob("*.md")) if SNIPPET.search(page.read_text())]


def namespace() -> tuple[dict[str, Any], list[str]]:
    """What snippets may use without defining it, and the lines that they print."""
    lines: list[str] = []
    inputs, targets = digits().tensors
    names = {
        "module": make_module(),
        "inputs": inputs,
        "targets": targets,
        "train_loader": DataLoader(digits(), batch_size=11),
        "print": lambda *values: lines.extend(" ".join(map(str, values)).splitlines()),
    }
    return names, lines


def same(printed: str, shown: str) -> bool:
    """Whether two outputs have the same words, and numbers that agree as far as other processors compute them alike."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.05, abs=1e-5) for a, b in pairs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, lines = namespace()
    for snippet, shown in SNIPPET.findall(page.read_text()):
        lines.clear()
        exec(snippet, names)
        printed = "\n".join(lines)
        assert same(printed, shown.strip()), f"{snippet}\nprinted\n{printed}\nand the page shows\n{shown}"
