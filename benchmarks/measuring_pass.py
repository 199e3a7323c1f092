"""What a measurement costs next to the training pass that it cannot beat.

    python benchmarks/measuring_pass.py [--threads 1] [--output benchmarks/results/measuring_pass.json]

For three networks on scikit-learn's digits, float32, the same data and batch size: a plain forward + backward epoch (the
floor), the pass J^T a that gives the linearised weights at a later time, four times at once, a Jacobian-vector pass, and a
complete measurement of the callback. Then the share of the callback in the whole fit of the example.
"""

import argparse
import json
import platform
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import MODELS, digits
from torch import nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.following import StepSettings
from lightning_ntk.observation import Observation, Options


def interleaved_medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run in turn so that a drifting machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


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
    options = Options(
        dynamics="gradient_descent", solver="lanczos", loss=nn.MSELoss(), batch_size=batch_size, taylor=False
    )
    observation = Observation(
        module,
        torch.optim.SGD(module.parameters(), lr=0.01),
        options,
        data=lambda: (inputs, targets),
        differences=lambda *_: [],
        horizon=1,
    )
    settings = StepSettings([{"lr": 0.01}])
    observation.step(settings)
    tangent = training.displacement_of(state)

    def plain_epoch() -> None:
        for start in range(0, samples, batch_size):
            loss = nn.functional.mse_loss(
                module(inputs[start : start + batch_size]), targets[start : start + batch_size]
            )
            module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]

    return interleaved_medians(
        {
            "plain epoch": plain_epoch,
            "weights(t)": lambda: training.displacement_of(state),
            "weights at 4 times": lambda: training.capture.jacobian.vjp(stacked),
            "Jacobian-vector pass": lambda: training.capture.jacobian.jvp(tangent),
            "measurement": lambda: observation.measure(weights),
        },
        repeats,
    )


def share_of_the_example() -> dict[str, float]:
    """Seconds of the whole fit in examples/digits.py, of the capture and of all measurements."""
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "digits.py"))
    with tempfile.TemporaryDirectory() as directory:
        monitor, _, elapsed = example["train"](example["parse_arguments"](["--output", directory]))
    return {"fit": elapsed, **monitor.seconds, "share": sum(monitor.seconds.values()) / elapsed}


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "measuring_pass.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    print(f"{'model':<13}" + f"{'plain epoch':>14}" + "".join(f"{c:>24}" for c in
          ("weights(t)", "weights at 4 times", "Jacobian-vector pass", "measurement")))  # fmt: skip
    for name in MODELS:
        seconds = measure(name, arguments.samples, arguments.batch_size, arguments.repeats)
        floor = seconds["plain epoch"]
        results[name] = {"seconds": seconds, "ratios": {key: value / floor for key, value in seconds.items()}}
        ratios = "".join(f"{value / floor:22.2f} x" for key, value in seconds.items() if key != "plain epoch")
        print(f"{name:<13}{floor * 1e3:11.1f} ms{ratios}")
    share = share_of_the_example()
    print(
        f"examples/digits.py: fit {share['fit']:.1f} s, capture {share['capture']:.2f} s, measurements "
        f"{share['measurements']:.2f} s; the callback took {share['share']:.1%}"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "results": results,
        "example": share,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
