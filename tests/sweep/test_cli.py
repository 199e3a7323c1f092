"""The YAML file and the commands."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from lightning_ntk import __version__
from lightning_ntk.sweep.cli import _parser, main
from lightning_ntk.sweep.sweep_file import SweepFile

OBJECTIVE = """
def objective(config):
    if config["width"] == 32 and not (HERE / "repaired").exists():
        raise RuntimeError("no luck")
    return {"ntk/distance": 3 * config["width"] ** -0.5 * 1.1 ** config["seed"]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(f"from pathlib import Path\n\nHERE = Path({str(tmp_path)!r})\n{OBJECTIVE}")
    return write(tmp_path, objective="train.py:objective", grid={"width": [16, 64, 256], "seed": [-1, 0, 1]}, workers=0)


def write(directory: Path, **content: object) -> Path:
    path = directory / "widths.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def sweep(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main(["sweep", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.out + captured.err


def test_run_status_table_and_plot(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "9 configurations: 9 complete, 0 failed, 0 running, 0 waiting" in sweep(capsys, "run", file, "--quiet")
    assert (tmp_path / "widths.journal").exists()  # beside the file, wherever the command is called
    status = sweep(capsys, "status", file)
    assert status.count("complete  width=") == 9
    assert "complete  width=16, seed=-1   " in status  # aligned
    table = sweep(capsys, "table", file, "--format", "csv")
    assert table.splitlines()[1] == f"0,16,-1,{3 * 16**-0.5 * 1.1**-1}"
    sweep(capsys, "table", file, "--output", tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text().startswith("| trial | width | seed | ntk/distance |")
    figure = tmp_path / "f.png"
    arguments = ["--x", "width", "--y", "ntk/distance", "--group", "seed", "--output", figure]
    assert "slope -0.50, 95% [-0.5" in sweep(capsys, "plot", file, *arguments)
    assert figure.stat().st_size > 10_000


def test_failures_are_shown_with_their_traceback_and_tried_again_on_request(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(tmp_path, objective="train.py:objective", grid={"width": [16, 32], "seed": [0]}, workers=0)
    shown = sweep(capsys, "run", file, "--quiet", status=1)
    assert f"Next: lightning-ntk sweep status {file}\n" in shown
    assert "RuntimeError: no luck. `lightning-ntk sweep status`" in shown
    assert "UserWarning: 1 of 2 configurations failed" in shown
    assert "2 configurations: 1 complete, 1 failed" in shown
    status = sweep(capsys, "status", file, status=1)
    assert 'train.py", line' in status
    assert "failed    width=32, seed=0  RuntimeError: no luck\n" in status
    assert f"Next: lightning-ntk sweep run {file} --retry-failed" in status
    (tmp_path / "repaired").touch()
    assert "2 complete, 0 failed" in sweep(capsys, "run", file, "--quiet", "--retry-failed")


def test_equal_failures_are_shown_once(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path, objective="train.py:objective", grid={"width": [32], "seed": [0, 1, 2]}, workers=0)
    sweep(capsys, "run", file, "--quiet", status=1)
    status = sweep(capsys, "status", file, status=1)
    assert "width=32, seed=0 and 2 more failed with:\n    Traceback" in status
    assert status.count("Traceback") == 1


def test_a_table_fits_the_terminal_unless_it_is_asked_for_more(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text("objective = lambda config: {f'ntk/scalar_{i}': 1.0 for i in range(20)}")
    assert "Next: lightning-ntk sweep table" in sweep(capsys, "run", file, "--quiet")
    assert main(["sweep", "table", str(file)]) == 0
    table = capsys.readouterr()
    assert "15 more columns: --all-columns" in table.err
    assert {len(line) for line in table.out.splitlines()} == {99}
    assert "| ntk/scalar_19 |" in sweep(capsys, "table", file, "--all-columns")
    assert sweep(capsys, "table", file, "--columns", "width", "ntk/scalar_7").startswith("| width | ntk/scalar_7 |\n")
    shown = sweep(capsys, "table", file, "--columns", "seed", "--format", "csv")
    assert shown.splitlines()[:2] == ["seed", "-1"]


def test_a_worker_serves_the_queue_of_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "This worker ended 9 trials." in sweep(capsys, "worker", file, "--wait")
    assert "This worker ended 0 trials." in sweep(capsys, "worker", file)
    assert "9 complete" in sweep(capsys, "status", file)


def test_storage_and_name_may_be_given_instead(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/other.db"
    sweep(capsys, "run", file, "--quiet", "--storage", storage, "--name", "second")
    assert (tmp_path / "other.db").exists()
    assert "9 complete" in sweep(capsys, "status", file, "--storage", storage, "--name", "second")
    missing = f"sqlite:///{tmp_path}/missing.db"
    assert "does not exist: run" in sweep(capsys, "status", file, "--storage", missing, status=1)
    assert "does not exist: run the sweep first" in sweep(capsys, "status", file, status=1)
    assert "but it has ['second']" in sweep(capsys, "table", file, "--storage", storage, status=1)


def test_a_damaged_database_is_said_in_a_sentence(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ntk.sweep.storage._ATTEMPTS", 1)
    write(tmp_path, objective="train.py:objective", grid={"width": [16], "seed": [0]}, workers=0)
    database = tmp_path / "other.db"
    sweep(capsys, "run", file, "--quiet", "--storage", f"sqlite:///{database}")
    content = database.read_bytes()
    for page in (1, 3, 5):
        damaged = content[: 4096 * page] + b"x" * (len(content) - 4096 * page)
        database.write_bytes(damaged)
        shown = sweep(capsys, "status", file, "--storage", f"sqlite:///{database}", status=1)
        assert shown.startswith("lightning-ntk: ")
        assert shown.endswith("database disk image is malformed.\n")


def test_a_path_in_the_file_is_relative_to_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = SweepFile.read("../widths.yaml").sweep
    assert Path(content.storage) == tmp_path / "widths.journal"
    assert content.logs == tmp_path / "widths.logs"
    assert content.objective.load()({"width": 9, "seed": 0}) == {"ntk/distance": 1.0}
    assert SweepFile.read("../widths.yaml", storage="here.journal").sweep.storage == "here.journal"


def test_numbers_of_yaml_1_2_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("objective: a:b\ngrid: {lr: [1e-3, 2.5E+2, -1e4, 3, 1.5, .5e0], name: [1e, e3, v1e3, '1e3']}\n")
    configurations = SweepFile.read(path).sweep.configurations
    assert list(dict.fromkeys(c["lr"] for c in configurations)) == [1e-3, 250.0, -1e4, 3, 1.5, 0.5]
    assert list(dict.fromkeys(c["name"] for c in configurations)) == ["1e", "e3", "v1e3", "1e3"]


def test_plain_text_without_a_value_in_yaml_1_2_is_text(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    texts = ["1:30", "010", "1_000", "on", "no", "2020-01-01"]
    path.write_text(f"objective: a:b\ngrid: {{a: [{', '.join(texts)}], b: [true, null, .5]}}\n")
    configurations = SweepFile.read(path).sweep.configurations
    assert list(dict.fromkeys(c["a"] for c in configurations)) == texts
    assert [c["b"] for c in configurations[:3]] == [True, None, 0.5]


def test_samples_times_a_grid(tmp_path: Path) -> None:
    ranges = {"lr": {"low": 1e-3, "high": 1.0, "log": True}, "activation": ["tanh", "relu"]}
    path = write(
        tmp_path, objective="a:b", latin_hypercube={"samples": 5, "seed": 2, "ranges": ranges}, grid={"seed": [0, 1]}
    )
    configurations = SweepFile.read(path).sweep.configurations
    assert len(configurations) == 10
    assert len({c["lr"] for c in configurations}) == 5
    path = write(tmp_path, objective="a:b", random={"samples": 4, "ranges": ranges})
    assert len(SweepFile.read(path).sweep.configurations) == 4
    path = write(tmp_path, objective="a:b", grid=[{"width": 3}, {"depth": 2}])
    assert SweepFile.read(path).sweep.configurations == [{"width": 3}, {"depth": 2}]


GRID = {"grid": {"a": [1]}}


def sample(changes: dict[str, object]) -> dict[str, object]:
    ranges = {"a": {"low": 1, "high": 4, **changes}}
    return {"objective": "a:b", "random": {"samples": 1, "ranges": ranges}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"objective": "a:b"}, "to have configurations under one of ['grid', 'random', 'latin_hypercube']"),
        (GRID, "to have the keys ['objective']"),
        ({"objective": "a:b", "gird": {"a": [1]}}, "but it has ['gird']"),
        ({"objective": "a:b", "grid": {"a": [1, 1]}}, "numbers 0 and 1 are the same: {'a': 1}"),
        ({"objective": "a:b", "storage": None, **GRID}, "Expected 'storage' in "),
        ({"objective": "a:b", "name": ["a"], **GRID}, "widths.yaml to be text but got ['a']"),
        ({"objective": "a:b", "threads": 0, **GRID}, "Expected argument `threads` to be an integer, at least 1"),
        ({"objective": "a:b", "workers": "x", **GRID}, "Expected argument `workers` to be an integer, at least 0"),
        ({"objective": "a:b", "patience": "x", **GRID}, "Expected argument `patience` to be a positive number"),
        (sample({"log": "no"}), "Expected `log` of a range to be true or false but got 'no'"),
        (sample({"low": "a"}), "Expected `low` of a range to be a number but got 'a'"),
        (sample({"low": 0.2, "integer": True}), "Expected whole numbers as ends of an integer range but got 0.2 and 4"),
        ({"objective": "a:b", "grid": {}}, "zero trials"),
        ({"objective": "a:b", "grid": None}, "zero trials"),
        ({"objective": "a:b", "random": {"samples": 0, "ranges": {"x": [1, 2]}}}, "Expected argument `samples`"),
        ({"objective": "a:b", "random": {"samples": 2}}, "Expected random to have the keys ['ranges']"),
        (
            {"objective": "a:b", "random": {"samples": 1, "ranges": {"x": {"low": 1}}}},
            "the range of x to have the keys ['high']",
        ),
        ({"objective": "b", **GRID}, 'Expected the objective as "package.module:function"'),
        ({"objective": {"cli": 3}, **GRID}, "Expected objective to have keys among ['lightning_cli']"),
        (
            {"objective": {"lightning_cli": {"config": "no.yaml"}}, **GRID},
            "Expected a configuration file of LightningCLI",
        ),
        ({"objective": "no_such_module:f", **GRID}, "No module named 'no_such_module'"),
        ({"objective": "train.py:f", **GRID}, "module '_sweep_train_"),
        ({"objective": "nothing.py:f", **GRID}, "No such file or directory: "),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(
    file: Path, content: dict[str, object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(file.parent, **content)
    assert sentence in sweep(capsys, "run", file, status=1)
    assert not (file.parent / "widths.journal").exists()


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "just words"])
def test_a_file_that_is_no_description_is_refused(file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(text)
    assert "lightning-ntk: Expected" in sweep(capsys, "run", file, status=1)
    assert "Expected a YAML file that describes a sweep" in sweep(capsys, "run", file.parent / "no.yaml", status=1)


@pytest.mark.parametrize("key", ["grid", "width"])
def test_a_key_that_occurs_twice_is_refused_by_name(file: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    again = "grid: {width: [16]}" if key == "grid" else "random: {samples: 1, ranges: {width: [1], width: [2]}}"
    file.write_text(f"objective: train.py:objective\ngrid: {{seed: [0]}}\n{again}\n")
    shown = sweep(capsys, "run", file, status=1)
    assert f"the key '{key}' occurs twice" in shown
    assert "line 3" in shown


@pytest.mark.parametrize("command", [("run", "--quiet"), ("worker",)])
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def f(:", r"SyntaxError: .*\(train\.py, line 1\)"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("{}['a']", "KeyError: 'a'"),
    ],
)
def test_an_objective_that_cannot_be_imported_is_said_and_fails_nothing(
    file: Path, code: str, sentence: str, command: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "train.py").write_text(code)
    shown = sweep(capsys, command[0], file, *command[1:], status=1)
    assert re.search(f"lightning-ntk: Expected to import 'train.py:objective', .* but it raised {sentence}", shown)
    assert not (file.parent / "widths.journal").exists()


def test_a_table_of_nothing_says_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(file.parent, objective="train.py:objective", grid={"width": [32], "seed": [0]}, workers=0)
    assert "1 of 1 configurations failed" in sweep(capsys, "run", file, "--quiet", status=1)
    assert "Expected complete results in the sweep 'widths' but it has none yet" in sweep(
        capsys, "table", file, status=1
    )


def test_the_command_is_installed_under_its_name() -> None:
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["lightning-ntk"].partition(":")
    assert getattr(__import__(module, fromlist=[function]), function) is main


def test_the_example_is_a_description() -> None:
    example = SweepFile.read(Path(__file__).parent.parent.parent / "examples" / "sweep.yaml").sweep
    assert len(example.configurations) == 9
    assert example.objective.load().__name__ == "objective"


DOCUMENTATION = (Path(__file__).parent.parent.parent / "docs" / "sweep.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"lightning-ntk (sweep \w+ widths\.yaml[^#`\n]*)", DOCUMENTATION))
def test_the_documented_commands_exist(command: str) -> None:
    assert _parser().parse_args(command.split()).file == "widths.yaml"


def test_the_documented_file_is_the_example(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent.parent / "examples"
    (tmp_path / "widths.yaml").write_text(re.findall(r"```yaml\n(.*?)```", DOCUMENTATION, flags=re.DOTALL)[0])
    documented, shipped = (SweepFile.read(d / f).sweep for d, f in ((tmp_path, "widths.yaml"), (example, "sweep.yaml")))
    assert documented.configurations == shipped.configurations


def options(arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code: int = stopped.value.code
    return code


def test_help_needs_no_extra_and_status_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from lightning_ntk.sweep.cli import _parser; _parser().format_help();"
        "assert not {'torch', 'lightning', 'optuna', 'yaml', 'scipy'} & set(sys.modules);"
        "import lightning_ntk.sweep.commands, lightning_ntk.sweep.worker; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert options(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-ntk {__version__}\n"


def test_a_missing_extra_is_named(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lightning_ntk.sweep.commands")
    monkeypatch.setitem(sys.modules, "optuna.exceptions", None)
    shown = sweep(capsys, "run", file, status=1)
    assert "but optuna is not installed: pip install 'lightning-ntk[sweep]'" in shown


def test_a_pipe_that_closes_is_no_traceback(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(capsys, "run", file, "--quiet")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["sweep", "status", str(file)]) == 1
    assert capsys.readouterr().err == ""


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert options(["sweep", "dance", "f.yaml"]) == 2
    assert "invalid choice: 'dance'" in capsys.readouterr().err
    assert options(["sweep", "plot", "--help"]) == 0


RUN = """
import math

class Monitor:
    name = "ntk"
    def __init__(self, width):
        self.history = [
            {"step": float(t), "relative_weight_distance": t * width**0.5 / 1e4, "loss": math.exp(-width * t / 1e3)}
            for t in (0, 1, 10, 100)
        ]

def objective(config):
    return Monitor(config["width"])
"""


def test_a_sweep_at_equal_loss_and_its_page(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RUN)
    sweep(capsys, "run", file, "--quiet")
    axes = ["--x", "width", "--y", "ntk/relative_weight_distance", "--output", tmp_path / "f.png"]
    assert "slope 0.50" in sweep(capsys, "plot", file, *axes, "--step", "10", "--group", "seed")
    assert "slope -0.50" in sweep(capsys, "plot", file, *axes, "--at", "loss=0.9995", "--group", "seed")
    table = sweep(capsys, "table", file, "--at", "loss=0.5", "--columns", "width", "step")
    assert table.splitlines()[2].split("|")[2].strip() == "43.322"  # 1000 log(2) / 16
    page = tmp_path / "page.html"
    assert sweep(capsys, "report", file, "--at", "loss=0.9995", "--output", page) == f"Page: {page}\n"
    assert "9 runs:" in page.read_text()
    assert "Lazy or rich? widths" in page.read_text()


@pytest.mark.parametrize("wrong", ["loss", "loss=-1", "step=3", "loss=x"])
def test_only_a_positive_loss_is_a_place_to_compare(file: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert options(["sweep", "plot", str(file), "--x", "width", "--y", "loss", "--at", wrong]) == 2
    assert f"expected loss=VALUE, such as loss=0.5, but got {wrong!r}" in capsys.readouterr().err


def test_report_writes_a_page_beside_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "step,train_loss,ntk/relative_weight_distance,ntk/loss",
        *(f"{s},0.1,{s / 1000},{1 / s}" for s in (1, 20, 50)),
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "After 50 steps" in printed
    assert f"Written: {tmp_path / 'report.html'}" in printed
    assert "Lazy." in (tmp_path / "report.html").read_text()


def test_report_without_a_log_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "no file" in capsys.readouterr().err
