"""Training on two processes with gloo: the numbers of one process, and no process that waits for another forever."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_ntk import LinearizationMonitor
from lightning_ntk.utilities.distributed import ALONE
from tests.callback.ddp_cases import COMPARED, PROCESSES, Regression, sgd, solvers
from tests.problems import mlp

ROOT = Path(__file__).parents[2]


def run_processes(cases: str, folder: Path) -> list[dict[str, Any]]:
    """What each of the processes returns. They are started here, as torchrun would, and not by Lightning."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES), "NODE_RANK": "0"}
    environment = os.environ | settings | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.callback.ddp_cases", cases, str(folder)], cwd=ROOT,
            env=environment | {"LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes("compared", tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes("others", tmp_path_factory.mktemp("others"))


@pytest.mark.tested("DDP, two processes", "gradient_descent", "gradient_flow", "replay", "twin")
@pytest.mark.parametrize("case", COMPARED)
def test_two_processes_give_the_numbers_of_one(compared: list[dict[str, Any]], case: str) -> None:
    first, second = (results[case] for results in compared)
    alone = COMPARED[case](1)
    assert first["dynamics"] == second["dynamics"] == alone["dynamics"]
    assert first["history"] == second["history"]
    assert len(alone["history"]) >= 3
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-12)
    for row, expected in zip(first["history"], alone["history"], strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            # Distances of nothing, at the first step, are what rounding leaves of them.
            if "mode" in name:
                row[name], value = abs(row[name]), abs(value)
            assert row[name] == pytest.approx(value, rel=1e-10, abs=1e-12), (case, name)
    assert alone["history"][-1]["displacement"] > 1e-3


def test_dynamics_are_those_of_the_run(compared: list[dict[str, Any]]) -> None:
    chosen = {case: result["dynamics"] for case, result in compared[0].items()}
    assert chosen["gradient_descent"] == chosen["accumulated_gradient_descent"] == "gradient_descent"
    assert chosen["replay"] == "replay"
    assert chosen["twin_with_adam"] == "twin"
    warned = {case: result["warnings"] for case, result in compared[0].items() if result["warnings"]}
    assert warned.keys() <= {"gradient_flow_with_groups"}
    assert not any(result["warnings"] for result in compared[1].values())


def test_every_solver_and_kernel_is_that_of_one_process(others: list[dict[str, Any]]) -> None:
    expected = solvers(ALONE)
    first, second = (results["solvers"] for results in others)
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        if name != "sums in float32":
            torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-11, msg=name)
    torch.testing.assert_close(first["sums in float32"], PROCESSES * expected["sums in float32"], rtol=1e-5, atol=0)


@pytest.mark.tested("DDP, training bitwise unchanged", "replay")
def test_training_is_bitwise_that_without_a_monitor(others: list[dict[str, Any]]) -> None:
    assert [results["unchanged"] for results in others] == [True, True]


@pytest.mark.tested("DDP, failure of one process", "replay")
def test_a_failure_of_one_process_is_one_of_all(others: list[dict[str, Any]]) -> None:
    first, second = (results["failures"] for results in others)
    assert first.keys() == second.keys()
    assert "UnknownSamples" not in first["unknown sample, replay"]
    for results in (first, second):
        assert results["unknown sample, replay"].startswith("MisconfigurationException")
        assert "1 of its 1 samples are not in it" in results["unknown sample, replay"]
        assert results["unknown sample, auto"]["dynamics"] == "twin"
        assert [row["step"] for row in results["unknown sample, auto"]["history"]] == [0, 1, 2, 3, 4]
        assert [row["step"] for row in results["unknown sample later"]["history"]] == [0, 1, 2]
        assert results["another reference in each process"].startswith("MisconfigurationException")
        assert "Expected the same reference data" in results["another reference in each process"]
        assert "Failing: a sensor is broken" in results["strict failure"]
        assert "Expected the same reference data" in results["another length in each process"]
        assert "Expected the same arguments of Lin" in results["another schedule in each process"]
        assert [row["step"] for row in results["a schedule of each process"]["history"]] == [0, 1, 2, 3, 4]
    assert first["unknown sample, replay"].endswith("(In process 1.)")
    for name, result in first.items():
        if not isinstance(result, str):
            assert result["history"] == second[name]["history"], name
            assert all(torch.equal(value, second[name]["weights"][key]) for key, value in result["weights"].items())
    # In the capture, in a measurement, and in a step of the linearized network, after which there are no more measurements.
    for count in (1, 7):
        assert first[f"failure after {count} passes"].endswith("Failing: a sensor is broken (In process 1.)")
    reports = {count: first[f"failure after {count} passes"]["warnings"] for count in (19, 23, 29, 37)}
    assert all("a sensor is broken (In process 1.)" in message for message, *_ in reports.values())
    assert reports[19][0].startswith("The measurement at step 0 failed")
    assert reports[23][0].startswith("The linearized network is lost in step 1")
    assert len(first["failure after 37 passes"]["history"]) == 3


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_divide_the_network_are_refused_by_name(
    strategy: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", object.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"DDPStrategy, where .* but got {strategy.__name__}"):
        LinearizationMonitor().setup(trainer, Regression(mlp(3), sgd()), "fit")
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", object.__new__(DDPStrategy))
    LinearizationMonitor().setup(trainer, Regression(mlp(3), sgd()), "fit")


def test_rows_of_processes_are_all_rows_once() -> None:
    for size in (1, 2, 3, 7):
        for total in (0, 1, 2, 11, 100):
            shares = [type(ALONE)(rank, size).rows(total) for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
