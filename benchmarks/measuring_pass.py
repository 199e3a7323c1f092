"""What a measurement costs next to the training pass that it cannot beat."""

import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from models import MODELS, digits
from timing import Comparison, interleaved
from torch import nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.comparison import OutputComparison, RunComparison
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.training.base import StepSettings


def against_an_epoch(samples: int = 1797, batch_size: int = 256, repeats: int = 9) -> Iterator[Comparison]:
    """Every pass of a measurement next to a plain forward and backward epoch on the same batches."""
    for name in MODELS:
        times = measure(name, samples, batch_size, repeats)
        floor = times.pop("plain epoch")
        for part, value in times.items():
            case = f"{part}, {name}, N = {samples}"
            yield Comparison(case, value, "floor: a plain epoch", floor, {"time over the floor": value / floor})


def measure(name: str, samples: int, batch_size: int, repeats: int) -> dict[str, float]:
    """Seconds of every pass for one network."""
    torch.manual_seed(0)
    module = MODELS[name]()
    inputs, targets = digits(name, samples)
    training = LinearizedTraining(
        module, (inputs, targets), lr=0.01, solver="lanczos", matrix_free=True, horizon=1, batch_size=batch_size, progress=False
    )  # fmt: skip
    state = training.state(1)
    stacked = state.coefficients.expand(4, -1, -1)
    weights = dict(module.named_parameters())
    problem = training.problem
    comparison = RunComparison(
        PairLoss(training.linearization, nn.MSELoss()),
        training.follow(),
        reference=OutputComparison(problem, taylor=False),
    )
    comparison.step(StepSettings([{"lr": 0.01}]))
    tangent = training.displacement(1)

    def plain_epoch() -> None:
        for start in range(0, samples, batch_size):
            loss = nn.functional.mse_loss(
                module(inputs[start : start + batch_size]), targets[start : start + batch_size]
            )
            module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]

    return interleaved(
        {
            "plain epoch": plain_epoch,
            "weights(t)": lambda: problem.pull_back(stacked[:1]),
            "weights at 4 times": lambda: problem.jacobian.vjp(stacked),
            "Jacobian-vector pass": lambda: problem.jacobian.jvp(tangent),
            "measurement": lambda: comparison.measure(weights),
        },
        repeats,
    )


def share_of_the_example() -> Comparison:
    """The whole fit in examples/digits.py, and what the callback takes of it."""
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "digits.py"))
    with tempfile.TemporaryDirectory() as directory:
        monitor, _, elapsed = example["train"](example["parse_arguments"](["--output", directory]))
    spent = sum(monitor.seconds.values())
    return Comparison("callback in examples/digits.py", spent, "the whole fit", elapsed, dict(monitor.seconds))
