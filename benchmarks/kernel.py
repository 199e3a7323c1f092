"""The kernel and its modes, next to what a user would otherwise do and to the products that cannot be avoided.

    python benchmarks/kernel.py [--output benchmarks/results/kernel.json] [--skip-full]

One thread, float32, K = 10, scikit-learn's digits. For each network: `empirical_ntk` by its rules, by contraction, and the
plain torch.func way (`vmap(jacrev)` on all samples, then one product a parameter, as in PyTorch's tutorial). Then the kernel
of all 1797 images of the MLP next to its unavoidable matrix products, and the modes for 1000 steps next to `torch.linalg.eigh`.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import MODELS, digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lightning_ntk import LinearizedTraining, empirical_ntk

Record = dict[str, float]


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of several runs after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def vmap_jacrev(module: nn.Module, inputs: Tensor) -> Tensor:
    """The kernel as PyTorch's tutorial makes it: all Jacobians, then their products."""
    params = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(module, weights, (sample.unsqueeze(0),))
        return result.squeeze(0)

    jacobians = vmap(jacrev(outputs), (None, 0))(params, inputs)
    flat = [jacobian.flatten(0, 1).flatten(1) for jacobian in jacobians.values()]
    return torch.stack([jacobian @ jacobian.T for jacobian in flat]).sum(0)


def compare_methods(name: str, samples: int, repeats: int) -> Record:
    """Seconds and agreement of all ways to one kernel."""
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    inputs, _ = digits(name, samples)
    reference = vmap_jacrev(module, inputs)
    structured = empirical_ntk(module, inputs)
    return {
        "structured": seconds(lambda: empirical_ntk(module, inputs), repeats),
        "contraction": seconds(lambda: empirical_ntk(module, inputs, method="contraction"), 1),
        "vmap(jacrev)": seconds(lambda: vmap_jacrev(module, inputs), 1),
        "relative difference": ((structured - reference).norm() / reference.norm()).item(),
    }


def full_training_set() -> Record:
    """The kernel of all 1797 images: seconds, and those of half of G G^T for every layer's output gradients G."""
    torch.manual_seed(0)
    module = MODELS["MLP"]()
    inputs, _ = digits("MLP", 1797)
    rows = 10 * len(inputs)
    gradients = [torch.randn(rows, width) for width in (512, 512)]
    block = 2048
    scratch = torch.empty(block, block)

    def products() -> None:
        for factor in gradients:
            for i in range(0, rows, block):
                for j in range(i, rows, block):
                    left, right = factor[i : i + block], factor[j : j + block]
                    torch.mm(left, right.T, out=scratch[: len(left), : len(right)])

    floor = seconds(products, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel = empirical_ntk(module, inputs)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / kernel.nbytes
    del kernel
    elapsed = seconds(lambda: empirical_ntk(module, inputs), 3)
    return {
        "kernel": elapsed,
        "matrix products": floor,
        "ratio": elapsed / floor,
        "peak memory over the kernel's": peak,
    }


def modes() -> Record:
    """Modes for 1000 steps at eta * lambda_max = 1: dense at 5120 rows, and everything without a kernel at 17 970."""
    torch.manual_seed(0)
    module = MODELS["MLP"]()
    inputs, targets = digits("MLP", 512)
    kernel = empirical_ntk(module, inputs)
    double = kernel.double()
    started = time.perf_counter()
    largest = torch.linalg.eigh(double)[0][-1].item()
    eigh = time.perf_counter() - started
    rate = targets.numel() / (2 * largest)

    def lanczos() -> None:
        LinearizedTraining(
            module, (inputs, targets), lr=rate, ntk=kernel, solver="lanczos", horizon=1000, progress=False
        )

    def without_horizon() -> None:
        LinearizedTraining(module, (inputs, targets), lr=rate, ntk=kernel, solver="lanczos", progress=False)

    everything, preparation = seconds(lanczos, 3), seconds(without_horizon, 3)
    return {"eigh": eigh, "Lanczos": everything - preparation, "Lanczos and capture": everything}


def matrix_free() -> Record:
    """A complete capture for 1000 steps without a kernel, on all images, next to 150 plain epochs."""
    torch.manual_seed(0)
    module = MODELS["MLP"]()
    inputs, targets = digits("MLP", 1797)

    def epoch() -> None:
        for start in range(0, len(inputs), 256):
            loss = nn.functional.mse_loss(module(inputs[start : start + 256]), targets[start : start + 256])
            module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]

    probe = LinearizedTraining(module, (inputs, targets), lr=1e-3, solver="lanczos", matrix_free=True, progress=False)
    rate = probe.max_learning_rate / 2
    started = time.perf_counter()
    training = LinearizedTraining(
        module, (inputs, targets), lr=rate, solver="lanczos", matrix_free=True, horizon=1000, tolerance=1e-4, progress=False
    )  # fmt: skip
    elapsed = time.perf_counter() - started
    bound = training.error_bound(1000, relative=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"capture": elapsed, "150 plain epochs": 150 * seconds(epoch, 15), "bound": bound, "peak GiB": peak}


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernel.json")
    parser.add_argument("--skip-full", action="store_true", help="leave out the kernel of all images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Record] = {}

    def show(title: str, record: Record) -> None:
        results[title] = record
        print(f"{title:<24}" + "   ".join(f"{key} {value:.4g}" for key, value in record.items()), flush=True)

    show("matrix-free, N = 1797", matrix_free())  # first: peak memory is that of the process so far
    if not arguments.skip_full:
        show("MLP, N = 1797", full_training_set())
    for name, samples, repeats in (("MLP", 256, 5), ("CNN", 256, 3), ("transformer", 128, 3)):
        record = compare_methods(name, samples, repeats)
        record["vmap(jacrev) / structured"] = record["vmap(jacrev)"] / record["structured"]
        show(f"{name}, N = {samples}", record)
    record = modes()
    record["eigh / Lanczos"] = record["eigh"] / record["Lanczos"]
    show("modes, 5120 rows", record)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    arguments.output.write_text(json.dumps({"machine": machine, "seconds": results}, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
