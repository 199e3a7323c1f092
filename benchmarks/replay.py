"""What a replayed step costs next to the training step that it follows, and to reading the kernel's rows once.

    python benchmarks/replay.py [--output benchmarks/results/replay.json]

scikit-learn's digits, batches of 64, K = 10, float32 kernel of the MLP, cross-entropy, momentum 0.9, clipping by norm. A step of
the replay is measured beside plain training steps of three networks (its own cost depends on N and K only), beside the
recognition of the batch, and beside the limit: one product with as many kernel rows, contiguous, in their own type. Then the ways
to multiply with scattered rows, and what float32 costs in accuracy: relative errors of the coefficients after five epochs. One
thread; seconds are those of the processor, which other work on the machine affects less than those of the clock.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import MODELS, digits
from torch import Tensor, nn

from lightning_ntk import empirical_ntk
from lightning_ntk.dynamics.replay import Replay
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.losses import Objective
from lightning_ntk.reference import Reference
from lightning_ntk.sample_index import SampleIndex

BATCH, OUTPUTS = 64, 10
SETTINGS = SGDSettings(lr=0.02, momentum=0.9)
Record = dict[str, float]


def interleaved_medians(functions: dict[str, Callable[[], object]], repeats: int) -> Record:
    """Median processor seconds of each function, run in turn so that a drifting machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.process_time()
            function()
            if repeat:  # the first round warms up
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(name: str, samples: int) -> Callable[[], None]:
    """A plain step of one network on a random batch."""
    torch.manual_seed(0)
    module = MODELS[name]()
    inputs, targets = digits(name, samples)
    labels = targets.argmax(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=SETTINGS.lr, momentum=SETTINGS.momentum)

    def step() -> None:
        rows = torch.randperm(samples)[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def start(samples: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, class labels, initial predictions and kernel of the MLP."""
    torch.manual_seed(0)
    module = MODELS["MLP"]().to(dtype)
    inputs, targets = digits("MLP", samples)
    inputs = inputs.to(dtype)
    with torch.no_grad():
        outputs = module(inputs)
    return inputs, targets.argmax(1), outputs, empirical_ntk(module, inputs)


def costs(samples: int, repeats: int) -> Record:
    """Median seconds of a replayed step, and of what it is compared with."""
    inputs, labels, outputs, kernel = start(samples)
    replay = Replay(kernel, outputs, Objective(nn.CrossEntropyLoss(), outputs, labels))
    index = SampleIndex(Reference((inputs, labels)))
    gradient = torch.randn(BATCH * OUTPUTS)

    def replayed() -> None:
        rows = torch.randperm(samples)[:BATCH]
        replay.accumulate(rows, labels[rows])
        replay.step(SETTINGS, clip_norm=1.0)

    def recognised() -> None:
        rows = torch.randperm(samples)[:BATCH]
        index.rows(inputs[rows], labels[rows])

    def contiguous() -> None:
        first = OUTPUTS * int(torch.randint(samples - BATCH, ()))
        torch.mv(kernel[first : first + len(gradient)].T, gradient)

    functions: dict[str, Callable[[], object]] = {"replay": replayed, "recognition": recognised, "limit": contiguous}
    functions.update({f"plain step, {name}": training_step(name, samples) for name in MODELS})
    medians = interleaved_medians(functions, repeats)
    return medians | {"recognition of all": interleaved_medians({"": lambda: index.rows(inputs, labels)}, 5)[""]}


def ways_to_multiply(samples: int, repeats: int) -> Record:
    """Median seconds of the product of 64 scattered samples' kernel rows with their gradients, by several ways."""
    kernel = torch.randn(OUTPUTS * samples, OUTPUTS * samples)
    blocks = kernel.view(samples, OUTPUTS, -1)
    views = blocks.mT.unbind(0)
    gradient = torch.randn(BATCH, OUTPUTS).double()
    buffer = torch.empty(OUTPUTS, kernel.shape[1], dtype=torch.float64)

    def scattered() -> Tensor:
        return torch.randperm(samples)[:BATCH]

    def in_place() -> None:
        result = torch.zeros(len(kernel), dtype=torch.float64)
        pairs = list(zip(scattered().tolist(), gradient.float().unbind(0), strict=True))
        for start in range(0, BATCH, 8):
            partial = torch.zeros(len(kernel))
            for row, own in pairs[start : start + 8]:
                partial.addmv_(views[row], own)
            result += partial

    def converted() -> None:
        result = torch.zeros(len(kernel), dtype=torch.float64)
        for row, own in zip(scattered().tolist(), gradient.unbind(0), strict=True):
            result.addmv_(buffer.copy_(blocks[row]).T, own)

    def gathered() -> None:
        rows = blocks.index_select(0, scattered()).flatten(0, 1)
        torch.mv(rows.T, gradient.float().flatten())

    def gathered_and_converted() -> None:
        rows = blocks.index_select(0, scattered()).flatten(0, 1).double()
        torch.mv(rows.T, gradient.flatten())

    return interleaved_medians(
        {
            "in place, float32, summed in float64": in_place,
            "sample by sample, converted to float64": converted,
            "gathered, float32": gathered,
            "gathered, converted to float64": gathered_and_converted,
        },
        repeats,
    )


def accuracy(samples: int, epochs: int = 5) -> Record:
    """Relative errors of the coefficients: of float32 products with a kernel, and of that kernel itself."""
    _, labels, outputs, kernel = start(samples)
    exact_outputs, exact_kernel = start(samples, torch.float64)[2:]

    def coefficients(kernel: Tensor, outputs: Tensor) -> Tensor:
        replay = Replay(kernel, outputs, Objective(nn.CrossEntropyLoss(), outputs, labels))
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(samples, generator=generator), BATCH):
                replay.accumulate(rows, labels[rows])
                replay.step(SETTINGS)
        return replay.coefficients

    own = coefficients(kernel, outputs)
    products = coefficients(kernel.double(), outputs)
    exact = coefficients(exact_kernel, exact_outputs)
    return {
        "float32 products": ((own - products).norm() / products.norm()).item(),
        "float32 kernel and outputs": ((products - exact).norm() / exact.norm()).item(),
    }


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "replay.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Record]] = {}
    for samples in (1797, 500):
        seconds = costs(samples, arguments.repeats)
        replay = seconds["replay"]
        ratios = {f"replay / {name}": replay / seconds[name] for name in seconds if not name.startswith("recognition")}
        del ratios["replay / replay"]
        products = ways_to_multiply(samples, arguments.repeats)
        results[f"N = {samples}"] = {"seconds": seconds, "ratios": ratios, "products": products}
        print(f"N = {samples}: a step of the replay takes {replay * 1e3:.2f} ms")
        for name, ratio in ratios.items():
            print(f"    {name:<42}{ratio:8.2f} x")
        print(f"    {'recognition of a batch':<42}{seconds['recognition'] * 1e3:8.3f} ms")
        print(f"    {'recognition of all samples':<42}{seconds['recognition of all'] * 1e3:8.3f} ms")
        for name, value in products.items():
            print(f"    {name:<42}{value * 1e3:8.2f} ms", flush=True)
    errors = accuracy(500)
    print("relative error: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"} | {"batch_size": BATCH},
        "results": results,
        "relative error": errors,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
