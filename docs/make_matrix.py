"""What was tested with what: a table made of the `tested` markers in the test files, which are read and not run.

    @pytest.mark.tested("resume", "replay", "twin")

says that a test resumes a run with each of two dynamics: the row, then one or more columns. The marker may stand on a
function, on a class, among the `marks` of a `pytest.param`, or in `pytestmark`. The table is written when the documentation
is built; `python docs/make_matrix.py` prints it.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COLUMNS = {
    "gradient_descent": "gradient descent",
    "gradient_flow": "gradient flow",
    "replay": "replay",
    "twin": "twin",
}
PLACEHOLDER = "<!-- matrix -->"


class Tested(NamedTuple):
    """One marker.

    Attributes:
        setting: The row.
        columns: Dynamics with which the setting is tested.
        test: Where, as `tests/file.py::name`.
    """

    setting: str
    columns: tuple[str, ...]
    test: str

    @property
    def by_trainer(self) -> bool:
        """Whether the test runs the Trainer."""
        return not self.test.startswith(("tests/dynamics/", "tests/training/"))


def collect(tests: Path) -> list[Tested]:
    """All markers of the test files below `tests`, in the order of files and lines.

    Raises:
        ValueError: If a marker has other arguments than a setting and some of the dynamics.
    """
    return [tested for path in sorted(tests.rglob("test_*.py")) for tested in _of_file(path, tests.parent)]


def matrix_page(tests: Path) -> str:
    """The table, and below it the tests of each row, in Markdown.

    A filled circle stands for a run of the Trainer, an open one for the dynamics alone: tests below `tests/dynamics` and
    `tests/training`.
    """
    rows: defaultdict[str, list[Tested]] = defaultdict(list)
    for tested in collect(tests):
        rows[tested.setting].append(tested)
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + ":-:|" * len(COLUMNS)]
    details = []
    for setting in sorted(rows, key=str.lower):
        cells = [[tested.by_trainer for tested in rows[setting] if column in tested.columns] for column in COLUMNS]
        circles = ["●" if any(cell) else "○" if cell else "" for cell in cells]
        lines.append(f"| {setting} | " + " | ".join(circles) + " |")
        details += ["", setting]
        for tested in rows[setting]:
            details += [f": `{tested.test}` ({', '.join(COLUMNS[column] for column in tested.columns)})"]
    return "\n".join([*lines, "", "## The tests", *details])


def _of_file(path: Path, root: Path) -> Iterator[Tested]:
    place = path.relative_to(root).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            owners |= {inner: f"::{node.name}" for decorator in node.decorator_list for inner in ast.walk(decorator)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.tested":
            values = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
            names = [value for value in values if isinstance(value, str)]
            unknown = set(names[1:]) - COLUMNS.keys()
            if len(names) != len(values) or len(names) < 2 or unknown or node.keywords:
                raise ValueError(
                    f"{place}:{node.lineno}: expected `pytest.mark.tested(setting, dynamics, ...)` with dynamics among "
                    f"{', '.join(COLUMNS)} but got `{ast.unparse(node)}`."
                )
            yield Tested(names[0], tuple(names[1:]), place + owners.get(node, ""))


if __name__ == "__main__":
    print(matrix_page(Path(__file__).parent.parent / "tests"))
