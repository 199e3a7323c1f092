"""Two processes with gloo: an exchange each, and one error for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from lightning_ntk.data.reference import NoFixedOrderError, Reference
from lightning_ntk.linearization import Linearization
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.utilities import distributed
from lightning_ntk.utilities.distributed import ALONE, Processes, mean_over, sum_over


class Particular(RuntimeError):
    """Has a constructor of its own."""

    def __init__(self, value: int, place: str) -> None:
        super().__init__(f"{value} at {place}")


def local_error() -> Exception:
    class Local(NoFixedOrderError):
        pass

    return Local("a class of a function")


def failing(rank: int, error: Exception) -> Callable[[Processes], Any]:
    def case(processes: Processes) -> Any:
        with processes.agreement():
            if processes.rank == rank:
                raise error
            return processes.sum_(torch.ones(3))

    return case


def nested(processes: Processes) -> Any:
    with processes.agreement():
        try:
            failing(1, KeyError("inside"))(processes)
        finally:
            processes_after = processes.any(False)
    return processes_after


def different_sizes(processes: Processes) -> Any:
    data = torch.ones(4 + processes.rank, 6), torch.ones(4 + processes.rank, 3)
    with processes.agreement():
        return DataPasses(Linearization(nn.Linear(6, 3)), Reference(data), processes=processes).first()


def sums(processes: Processes) -> Any:
    own = {"a": torch.full((2,), float(processes.rank)), "b": torch.ones(1, 3)}
    return (
        [value.tolist() for value in sum_over(processes, own).values()],
        [value.tolist() for value in mean_over(processes, own).values()],
        processes.minimum(3.0 + processes.rank),
        [processes.any(processes.rank == rank) for rank in range(3)],
    )


CASES: dict[str, Callable[[Processes], Any]] = {
    "first": failing(0, ValueError("broken")),
    "second": failing(1, MemoryError("no space")),
    "its own constructor": failing(1, Particular(3, "here")),
    "a class of a function": failing(1, local_error()),
    "nested": nested,
    "different sizes": different_sizes,
    "sums": sums,
}


def run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes.of_process_group(torch.device("cpu"))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(processes)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # so that the last exchange is freed; otherwise an older PyTorch may wait without end
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    spawn(run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("first", "ValueError: broken", "ValueError: broken (In process 0.)"),
        ("second", "MemoryError: no space (In process 1.)", "MemoryError: no space"),
        ("its own constructor", "Particular: 3 at here (In process 1.)", "Particular: 3 at here"),
        (
            "a class of a function",
            "NoFixedOrderError: a class of a function (In process 1.)",
            "Local: a class of a function",
        ),
    ],
)
def test_all_raise_the_error_of_the_first(results: list[dict[str, Any]], case: str, first: str, second: str) -> None:
    assert [result[case] for result in results] == [first, second]


def test_an_agreed_error_is_not_agreed_twice(results: list[dict[str, Any]]) -> None:
    assert results[0]["nested"].startswith("KeyError: ")
    assert "(In process 1.)" in results[0]["nested"]
    assert results[1]["nested"] == "KeyError: 'inside'"


def test_data_sets_of_different_sizes_are_refused_in_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["different sizes"].startswith("ValueError: Expected the same reference data in all processes")


def test_sums_means_and_conditions(results: list[dict[str, Any]]) -> None:
    expected = ([[1.0, 1.0], [[2.0] * 3]], [[0.5, 0.5], [[1.0] * 3]], 3.0, [True, True, False])
    assert results[0]["sums"] == results[1]["sums"] == expected


def test_a_condition_is_one_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = []
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, *operation: exchanges.append(tensor.numel()))
    processes = Processes(0, 2)
    assert processes.any(True)
    assert not processes.any(False)
    assert processes.minimum(2.5) == 2.5
    assert processes.free_memory("cpu") > 0
    assert len(exchanges) == 4


def test_a_single_process_exchanges_nothing() -> None:
    value = torch.ones(2)
    assert ALONE.sum_(value) is value
    assert ALONE.broadcast_(value) is value
    assert (ALONE.any(True), ALONE.any(False), ALONE.minimum(3.0)) == (True, False, 3.0)
    with pytest.raises(ZeroDivisionError), ALONE.agreement():
        raise ZeroDivisionError
