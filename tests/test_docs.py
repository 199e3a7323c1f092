"""The documentation: it builds, its snippets run and print what the pages show, and its pages name what there is."""

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from packaging.version import Version
from torch import nn
from torch.utils.data import TensorDataset

import lightning_ntk
from lightning_ntk import LinearizationMonitor, plots
from lightning_ntk.kernel.rules.layers import RULES
from tests.callback.test_monitor import digits, fit, make_module

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lightning_ntk.__file__).parent
DOCS = ROOT / "docs"
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
CODE = re.compile(r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(DOCS.glob("[!_]*.md")) if SNIPPET.search(page.read_text())]
TUTORIALS = sorted(page.stem for page in (DOCS / "tutorials").glob("*.md"))


def text(page: Path) -> str:
    """A page with the setup that it includes."""
    return page.read_text().replace("```{include} _setup.md\n```\n", (DOCS / "_setup.md").read_text())


def same(printed: str, shown: str) -> bool:
    """Whether two outputs have the same words, and numbers that agree as far as other processors compute them alike."""
    printed, shown = printed.strip(), shown.strip()
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.05, abs=1e-5) for a, b in pairs)


def told(tree: ast.AST) -> list[str]:
    """First lines in which Sphinx takes what is before a colon for a type: those of properties, attributes and `Returns:`."""
    docs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node) or ""
            docs += re.findall(r"^Returns:\n +(.*)$", doc, flags=re.MULTILINE)
            docs += [doc] if any("property" in ast.unparse(decorator) for decorator in node.decorator_list) else []
        elif isinstance(node, ast.Module | ast.ClassDef):
            for before, after in itertools.pairwise(node.body):
                if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                    docs.append(str(ast.literal_eval(after.value)) if isinstance(after.value, ast.Constant) else "")
    return [re.sub(r":\w+:`[^`]*`|`[^`]*`", "", doc.partition("\n")[0]) for doc in docs]


def test_no_description_of_a_value_is_read_as_its_type() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert [line for line in told(ast.parse(path.read_text())) if ": " in line] == [], path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "fine_tuning" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("this PyTorch draws other dropout masks than that of constraints.txt")
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []  # that the snippets print
    names: dict[str, Any] = {"print": lambda *values: lines.extend(" ".join(map(str, values)).splitlines())}
    rules = dict(RULES)
    try:
        for snippet, shown in SNIPPET.findall(text(page)):
            lines.clear()
            exec(snippet, names)
            printed = "\n".join(lines)
            assert same(printed, shown), f"{snippet}\nprinted\n{printed}\nand the page shows\n{shown}"
    finally:
        RULES.clear()
        RULES.update(rules)


def test_outputs_are_compared_by_words_and_numbers() -> None:
    assert same("loss after 10 steps: 0.0690", "loss after 10 steps: 0.0692")
    assert not same("loss after 10 steps: 0.06", "loss after 10 steps: 0.07")
    assert not same("loss 0.06", "losses 0.06")
    assert not same("", "0.06")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_code_fits_into_the_column_of_the_page(page: Path) -> None:
    assert not [line for block in CODE.findall(page.read_text()) for line in block.splitlines() if len(line) > 84]


def test_it_builds_without_a_warning_and_names_everything_public(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "docs", str(site)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(ROOT.glob("docs/**/*.html"))  # nothing is written beside the sources
    require_executed(site)
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split()[0].split(".")[-1] for line in zlib.decompress(packed).decode().splitlines()}
    for package in (
        "lightning_ntk",
        "lightning_ntk.functional",
        "lightning_ntk.huggingface",
        "lightning_ntk.metrics",
        "lightning_ntk.plots",
        "lightning_ntk.kernel",
        "lightning_ntk.sweep",
    ):
        assert set(importlib.import_module(package).__all__) <= documented
    table = (site / "tested.html").read_text()
    assert "●" in table
    assert "<!-- matrix -->" not in table


def require_executed(site: Path) -> None:
    """Every tutorial was run, and its notebook with outputs can be downloaded; every plot of the reference has a picture."""
    for name in TUTORIALS:
        (notebook,) = site.glob(f"_downloads/*/{name}.ipynb")
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in cells)
        assert any(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    page = (site / "api" / "plots.html").read_text()
    drawn = [name for name in plots.__all__ if name.startswith("plot_")]
    assert page.count("<img alt=") == len(drawn)


def test_the_yaml_of_the_callback_is_what_the_command_line_takes(tmp_path: Path) -> None:
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "lightning.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "config.yaml").write_text(yaml)
    cli = LightningCLI(BoringModel, BoringDataModule, run=False, args=[f"--config={tmp_path / 'config.yaml'}"])
    (monitor,) = [c for c in cli.trainer.callbacks if isinstance(c, LinearizationMonitor)]
    assert (monitor.steps, monitor.dynamics, monitor.per_parameter) == ([1, 10, 100, 1000], "twin", True)
    assert (monitor.loss, monitor.reference_samples) == (None, 256)


def matrix() -> Any:
    sys.path.append(str(DOCS))
    try:
        return importlib.import_module("make_matrix")
    finally:
        sys.path.remove(str(DOCS))


def test_the_matrix_has_every_marker() -> None:
    page = matrix().matrix_page(ROOT / "tests")
    marked = 0
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path == Path(__file__):
            continue
        for setting, columns in re.findall(
            r'^@pytest\.mark\.tested\("([^"]*)", (.*)\)$', path.read_text(), re.MULTILINE
        ):
            marked += 1
            (row,) = re.findall(rf"^\| {re.escape(setting)} \|(.*)\|$", page, re.MULTILINE)
            filled = [cell.strip() != "" for cell in row.split("|")]
            names = list(matrix().COLUMNS)
            assert all(filled[names.index(column)] for column in re.findall(r'"([^"]*)"', columns))
    assert marked > 40
    assert page.count("\n: `tests/") == len(matrix().collect(ROOT / "tests")) >= marked


def test_markers_stand_on_functions_classes_cases_and_modules(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    (tests / "dynamics").mkdir(parents=True)
    (tests / "test_a.py").write_text(
        'pytestmark = pytest.mark.tested("all", "twin")\n\n'
        '@pytest.mark.tested("class", "replay")\nclass TestIt:\n    pass\n\n'
        '@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.tested("case", "twin", "replay"))])\n'
        "def test_x(x):\n    pass\n"
    )
    (tests / "dynamics" / "test_b.py").write_text('@pytest.mark.tested("class", "twin")\ndef test_y():\n    pass\n')
    found = {(tested.setting, tested.columns, tested.test) for tested in matrix().collect(tests)}
    assert found == {
        ("all", ("twin",), "tests/test_a.py"),
        ("class", ("replay",), "tests/test_a.py::TestIt"),
        ("case", ("twin", "replay"), "tests/test_a.py::test_x"),
        ("class", ("twin",), "tests/dynamics/test_b.py::test_y"),
    }
    assert "| class |  |  | ● | ○ |" in matrix().matrix_page(tests)


@pytest.mark.parametrize("arguments", ['"resume"', '"resume", "adam"', 'RESUME, "twin"', '"resume", dynamics="twin"'])
def test_a_marker_with_other_arguments_is_refused(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(f"@pytest.mark.tested({arguments})\ndef test_x():\n    pass\n")
    with pytest.raises(ValueError, match=r"test_a.py:1: expected `pytest.mark.tested\(setting, dynamics"):
        matrix().collect(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_scalars_page_has_every_scalar() -> None:
    page = (DOCS / "scalars.md").read_text()
    labeled = TensorDataset(digits().tensors[0], torch.arange(11) % 3)
    options = {"per_parameter": True, "evaluation": labeled, "loss": nn.MSELoss(), "reference": labeled}
    names: set[str] = set()
    for more in (
        {"dynamics": "gradient_descent", "modes": 2, "closest": True, "kernel_probe": 3, "regime": True},
        {"dynamics": "twin", "kernels": ("before", "after")},
    ):
        monitor = LinearizationMonitor(strict=True, **options, **more)
        fit(monitor, make_module(), max_steps=2)
        names |= set(monitor.history[-1])
    assert {"mode/2/residual", "evaluation/loss", "closest_time", "kernel_velocity"} <= names
    for name in names:
        name = re.sub(r"^mode/\d+", "mode/<i>", name.removeprefix("evaluation/"))
        name = re.sub(r"^parameter/.*", "parameter/<name>", name)
        name = re.sub(r"^regime/layer/.*/", "regime/layer/<layer>/", name)
        name = re.sub(r"^(regime/.*)_(low|high)$", r"\1", name)
        shown = {name, re.sub(r"^kernel_regression/(before|after)/", "kernel_regression/<kernel>/", name)}
        assert any(f"`{tag}`" in page for tag in shown), name


def test_every_folder_is_in_the_architecture_with_its_sentence() -> None:
    page = dict(re.findall(r"^`(\w+)/`\n: (.*)$", (DOCS / "architecture.md").read_text(), re.MULTILINE))
    folders = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    assert page.keys() == folders.keys()
    assert len(page) == 15
    for name, path in folders.items():
        assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] == page[name]
    assert {path.name for path in PACKAGE.glob("*") if path.is_file()} == {"__init__.py", "py.typed"}
