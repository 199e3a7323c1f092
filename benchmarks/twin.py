"""What the linearised twin costs next to the training step that it follows, and where it goes.

    python benchmarks/twin.py [--threads 1] [--output benchmarks/results/twin.json]

For three networks on scikit-learn's digits, float32, cross-entropy and AdamW: a plain training step, the same step together
with the twin's, and the twin's parts: the backward pass J^T u with its forward, what the Jacobian-vector product adds to
it in the combined pass, the two passes one after the other instead, and the step of the optimizer.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from models import MODELS, digits
from timing import interleaved as interleaved_medians
from torch import Tensor, nn

from lightning_ntk import Linearization
from lightning_ntk.dynamics.twin import Twin
from lightning_ntk.losses import Objective
from lightning_ntk.parameters import trainable_parameters


def measure(name: str, batch_size: int, repeats: int) -> dict[str, float]:
    """Seconds of a plain step, of a step with the twin, and of the twin's parts."""
    torch.manual_seed(0)
    module = MODELS[name]()
    inputs, one_hot = digits(name, batch_size)
    labels = one_hot.argmax(1)
    loss = nn.CrossEntropyLoss()
    live = trainable_parameters(module)
    # So small a rate that the repeats see the same weights.
    optimizer = torch.optim.AdamW(live.values(), lr=1e-6)
    linearization = Linearization(module)
    objective = Objective(loss, linearization.predict(inputs), labels)
    twin = Twin(linearization, optimizer, live, objective)
    cotangent = objective.gradient(linearization.predict(inputs), labels)

    def plain() -> None:
        optimizer.zero_grad()
        loss(module(inputs), labels).backward()
        optimizer.step()

    stepping: list[float] = []

    def with_twin() -> None:
        plain()
        twin.accumulate(inputs, labels)
        started = time.perf_counter()
        twin.step(optimizer.param_groups)
        stepping.append(time.perf_counter() - started)

    tangent = {key: 1e-3 * torch.randn_like(value) for key, value in live.items()}

    def one_pass(direction: dict[str, Tensor] | None) -> None:
        linearization.predict_jvp_and_vjp(direction, inputs, lambda outputs, derivative: cotangent)

    def two_passes() -> None:
        linearization.predict_and_jvp(tangent, inputs)
        linearization.predict_and_vjp([cotangent], inputs)

    seconds = interleaved_medians(
        {
            "plain step": plain,
            "step with twin": with_twin,
            "J^T u": lambda: one_pass(None),
            "J v and J^T u": lambda: one_pass(tangent),
            "J v, then J^T u": two_passes,
        },
        repeats,
    )
    return seconds | {"optimizer": statistics.median(stepping)}


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "twin.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    columns = ("step with twin", "J^T u", "J v and J^T u", "J v, then J^T u", "optimizer")
    print(f"{'model, batch':<18}{'plain step':>12}" + "".join(f"{column:>17}" for column in columns))
    for name in MODELS:
        for batch_size in arguments.batch_sizes:
            seconds = measure(name, batch_size, arguments.repeats)
            ratios = {column: seconds[column] / seconds["plain step"] for column in columns}
            results[f"{name}, {batch_size}"] = {"seconds": seconds, "ratios": ratios}
            row = "".join(f"{ratios[column]:15.2f} x" for column in columns)
            print(f"{name + ', ' + str(batch_size):<18}{seconds['plain step'] * 1e3:9.2f} ms{row}", flush=True)
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
