"""Runs of two processes: `python -m tests.callback.ddp_cases CASES FOLDER`, started by test_ddp.py once for each process.

Every case is a function of the strategy's options; what it returns is compared with the same case in one process.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_ntk import LinearizationMonitor, LinearizedTraining
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.distributed import Processes
from tests.problems import ConvNet, Unused, make, mlp

PROCESSES = 2


class Regression(LightningModule):
    def __init__(self, body: nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.body, self.make_optimizer = body, make_optimizer

    def forward(self, inputs):
        return self.body(inputs)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class SamplesOfAll(DistributedSampler[Any]):
    """What all processes together draw, in the order in which it makes up their batches, with the samples that come twice."""

    def __iter__(self):
        indices = list(super().__iter__())
        return iter(indices + indices[: -len(indices) % PROCESSES])

    def __len__(self) -> int:
        return super().__len__() + -super().__len__() % PROCESSES


def samples(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(count, 6, generator=generator, dtype=torch.float64),
        torch.randn(count, 3, generator=generator, dtype=torch.float64),
    )


def fit(
    body: Callable[[int], nn.Module],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    data: Dataset[Any],
    batch_size: int,
    processes: int,
    monitor: LinearizationMonitor | None,
    strategy: str = "ddp",
    ordered: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A run on `processes`, shuffled by Lightning unless `ordered`; one process gets the batches of all of them as one."""
    seed_everything(1, verbose=False)
    module = Regression(body(3), optimizer).double()
    settings: dict[str, Any] = {"strategy": strategy, "devices": processes}
    sampler: DistributedSampler[Any] | None = None
    if processes == 1:
        settings = {"devices": 1}
        sampler = SamplesOfAll(data, num_replicas=1, rank=0, seed=1)
        batch_size *= PROCESSES
    elif ordered:
        settings["use_distributed_sampler"] = False
        sampler = DistributedSampler(data, PROCESSES, int(os.environ["LOCAL_RANK"]), shuffle=False)
    trainer = Trainer(
        accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[monitor] if monitor else [], max_epochs=-1,
        **settings, **options,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, batch_size=batch_size, sampler=sampler))
    comparison = None if monitor is None else monitor.comparison
    return {
        "history": [] if monitor is None else monitor.history,
        "dynamics": None if comparison is None else comparison.dynamics,
        "weights": {name: value.detach().clone() for name, value in module.named_parameters()},
        "warnings": [
            str(w.message) for w in caught if "LinearizationMonitor" in str(w.message) or "goes on" in str(w.message)
        ],
    }


def monitor(data: Dataset[Any] | None, **options: Any) -> LinearizationMonitor:
    return LinearizationMonitor(**({"reference": data, "steps": 2, "strict": True} | options))


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, **options)


def gradient_descent(processes: int) -> dict[str, Any]:
    data = samples(14)
    observed = monitor(data, evaluation=samples(5), per_parameter=True, modes=2, batch_size=3, regime=True)
    return fit(
        mlp, sgd(momentum=0.9, weight_decay=0.01), data=data, batch_size=7, processes=processes, monitor=observed,
        max_steps=7,
    )  # fmt: skip


def accumulated_gradient_descent(processes: int) -> dict[str, Any]:
    data = samples(12)
    return fit(
        mlp, sgd(), data=data, batch_size=3, processes=processes, max_steps=5, accumulate_grad_batches=2,
        monitor=monitor(data, dynamics="auto", jacobian="stored"),
    )  # fmt: skip


def replay(processes: int) -> dict[str, Any]:
    data = samples(11)
    return fit(
        mlp, sgd(momentum=0.5, nesterov=True, weight_decay=0.02), data=data, batch_size=2, processes=processes,
        max_steps=9, gradient_clip_val=0.2, monitor=monitor(data, batch_size=4),
    )  # fmt: skip


def accumulated_replay(processes: int) -> dict[str, Any]:
    data = samples(13)
    return fit(
        mlp, sgd(), data=data, batch_size=2, processes=processes, max_steps=6, accumulate_grad_batches=2,
        monitor=monitor(data, dynamics="replay", steps=1),
    )  # fmt: skip


def twin_with_adam(processes: int) -> dict[str, Any]:
    data = samples(11)
    return fit(
        Unused, lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1), data=data, batch_size=3,
        processes=processes, max_steps=6, strategy="ddp_find_unused_parameters_true", gradient_clip_val=0.3,
        monitor=monitor(data, evaluation=samples(1), batch_size=2),
    )  # fmt: skip


def stored_twin(processes: int) -> dict[str, Any]:
    data = samples(11)
    return fit(
        mlp, torch.optim.AdamW, data=data, batch_size=2, processes=processes, max_steps=6, gradient_clip_val=0.3,
        accumulate_grad_batches=2, monitor=monitor(data, dynamics="twin", jacobian="stored"),
    )  # fmt: skip


def accumulated_twin(processes: int) -> dict[str, Any]:
    return fit(
        mlp, torch.optim.Adagrad, data=samples(8), batch_size=2, processes=processes, max_steps=6,
        accumulate_grad_batches=2, monitor=monitor(None),
    )  # fmt: skip


def late_capture(processes: int) -> dict[str, Any]:
    data = samples(10)
    return fit(
        mlp, sgd(momentum=0.9), data=data, batch_size=5, processes=processes, max_steps=7,
        monitor=monitor(data, capture_at=2, steps=1),
    )  # fmt: skip


def gradient_flow_with_groups(processes: int) -> dict[str, Any]:
    data = samples(10)

    def groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others}], lr=0.05)

    return fit(
        mlp, groups, data=data, batch_size=5, processes=processes, max_steps=5,
        monitor=monitor(data, dynamics="gradient_flow"),
    )  # fmt: skip


COMPARED: dict[str, Callable[[int], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        gradient_descent, accumulated_gradient_descent, replay, accumulated_replay, twin_with_adam, stored_twin,
        accumulated_twin, late_capture, gradient_flow_with_groups,
    )
}  # fmt: skip


def solvers(processes: Processes) -> dict[str, Any]:
    """Weights by every solver, and kernels by every method and memory limit."""
    results: dict[str, Any] = {}
    for network in ("mlp", "conv"):
        module, inputs, targets = make(network, samples=11)
        problem = LinearizedProblem(module, (inputs, targets), batch_size=2, processes=processes)
        for name, options in {
            "eigh": {"solver": "eigh"},
            "Lanczos on the kernel": {"solver": "lanczos", "matrix_free": False},
            "Lanczos without a kernel": {"solver": "lanczos", "matrix_free": True},
        }.items():
            training = LinearizedTraining(problem, lr=0.05, tolerance=1e-11, **options)  # type: ignore[arg-type]
            results[f"{network} {name}"] = torch.cat([w.flatten() for w in training.weights(30).values()])
            results[f"{network} {name} predictions"] = training.predictions(20)
        for method in ("structured", "contraction"):
            for limit in (2**30, 2**14):
                results[f"{network} {method} {limit}"] = compute_kernel(
                    problem.linearization, problem.reference, method=method, memory_limit=limit, processes=processes
                )
        results[f"{network} two sets"] = compute_kernel(
            problem.linearization, problem.reference, problem.reference.subset([3, 1, 9]), processes=processes
        )
    # More processes than samples.
    module, inputs, targets = make("mlp", samples=1)
    training = LinearizedTraining(LinearizedProblem(module, (inputs, targets), processes=processes), lr=0.05)
    results["one sample"] = torch.cat([w.flatten() for w in training.weights(30).values()])
    single = {name: value.float() for name, value in results.items() if "structured" in name}
    rounded = [processes.sum_(value.clone()) for value in single.values()]
    results["sums in float32"] = torch.stack([value.sum() for value in rounded])
    return results


def unchanged_weights() -> bool:
    """Whether a shuffled run with dropout and BatchNorm has bitwise the weights that it has without a monitor."""
    data = samples(13)
    arguments: dict[str, Any] = {
        "body": ConvNet, "optimizer": sgd(), "data": data, "batch_size": 3, "processes": PROCESSES, "max_steps": 8,
    }  # fmt: skip
    with_it, without = (
        fit(monitor=m, **arguments) for m in (monitor(data, capture_at=3, dynamics="replay", mismatch="log"), None)
    )
    assert len(with_it["history"]) > 2
    return all(torch.equal(value, without["weights"][name]) for name, value in with_it["weights"].items())


class Failing(Exception):
    pass


def failures() -> dict[str, Any]:
    """What both processes do where only the second one fails."""
    second = dist.get_rank() == 1
    data = samples(10)
    inputs, targets = data.tensors
    calls = {"count": 0}

    def fail_late(module: nn.Module, batch: Any) -> torch.Tensor:
        calls["count"] += 1
        if second and calls["count"] > calls["allowed"]:
            raise Failing("a sensor is broken")
        return module(batch)

    results: dict[str, Any] = {}

    def run(name: str, observed: LinearizationMonitor, **options: Any) -> None:
        arguments = {"max_steps": 4, "batch_size": 1, "data": data} | options
        try:
            results[name] = fit(mlp, sgd(), processes=PROCESSES, monitor=observed, ordered=True, **arguments)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"

    # The second process has the samples 1, 3, 5, ...
    without_one = TensorDataset(inputs[[0, 2, 3, 4, 5, 6, 7, 8, 9]], targets[[0, 2, 3, 4, 5, 6, 7, 8, 9]])
    without_five = TensorDataset(inputs[[0, 1, 2, 3, 4, 6, 7, 8, 9]], targets[[0, 1, 2, 3, 4, 6, 7, 8, 9]])
    lenient: dict[str, Any] = {"strict": False, "steps": 1}
    run("unknown sample, replay", monitor(without_one, dynamics="replay", **lenient))
    run("unknown sample, auto", monitor(without_one, **lenient), data=Subset(data, range(9)))
    run("unknown sample later", monitor(without_five, dynamics="replay", **lenient))
    for count in (1, 7, 19, 23, 29, 37):
        calls["count"], calls["allowed"] = 0, count
        run(f"failure after {count} passes", monitor(data, dynamics="replay", predict=fail_late, **lenient))
    calls["count"], calls["allowed"] = 0, 29
    run("strict failure", monitor(data, dynamics="replay", predict=fail_late, steps=1))
    other = TensorDataset(inputs + dist.get_rank(), targets)
    run("another reference in each process", monitor(other, **lenient))
    own = TensorDataset(*(tensor[: 8 + dist.get_rank()] for tensor in data.tensors))
    run("another length in each process", monitor(own, **lenient))
    run("another schedule in each process", monitor(data, strict=False, steps=1 + dist.get_rank()))

    class Irregular(LinearizationMonitor):
        def should_measure(self, step: int) -> bool:
            return step % 2 == dist.get_rank()

    run("a schedule of each process", Irregular(data))
    return results


def main(cases: str, folder: Path) -> None:
    """Runs the cases as one of two processes and saves what they return."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if cases == "compared":
        results = {name: case(PROCESSES) for name, case in COMPARED.items()}
    else:
        results["unchanged"] = unchanged_weights()
        results["solvers"] = solvers(Processes.of_process_group(torch.device("cpu")))
        results["failures"] = failures()
    torch.save(results, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
