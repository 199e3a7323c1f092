"""The kernel next to what a user would otherwise do, and to the products that cannot be avoided."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from models import MODELS, CausalModel, Encoder, digits
from peers.plain_torch import ntk_vector_products, row_by_row, vmap_jacrev
from timing import Comparison, Function, interleaved, seconds
from torch import Tensor, nn

from lightning_ntk import empirical_ntk

# Samples on which the ways that are slow or large are run, next to this package on as many.
SAMPLES = {"MLP": 256, "CNN": 256, "transformer": 128}
FEW, VERY_FEW = 32, 8
PEER_SCRIPT = Path(__file__).parent / "peers" / "neural_tangents_kernel.py"


def against_plain_torch() -> Iterator[Comparison]:
    """Every network, every way."""
    for name, samples in SAMPLES.items():
        for way, size in ((vmap_jacrev, samples), (row_by_row, FEW), (ntk_vector_products, VERY_FEW)):
            module, inputs = network(name, size)
            kernel, expected = empirical_ntk(module, inputs), way(module, inputs)
            functions: dict[str, Function] = {
                "ours": lambda module=module, inputs=inputs: empirical_ntk(module, inputs),  # type: ignore[misc]
                "theirs": lambda way=way, module=module, inputs=inputs: way(module, inputs),  # type: ignore[misc]
            }
            # Both have run once, which warmed them up; half a minute each time for the largest.
            times = interleaved(functions, 1 if name == "MLP" and size > FEW else 5, warm_up=False)
            difference = {"relative difference": float((kernel - expected).norm() / expected.norm())}
            case = f"kernel, {name}, N = {size}"
            yield Comparison(case, times["ours"], WAYS[way.__name__], times["theirs"], difference)


WAYS = {
    "vmap_jacrev": "torch.func: vmap(jacrev), contracted",
    "row_by_row": "a backward pass for each row, stacked, mm",
    "ntk_vector_products": "torch.func: NTK-vector products",
}


def full_training_set() -> Comparison:
    """The kernel of all 1797 images, and half of G G^T for every layer's output gradients G."""
    module, inputs = network("MLP", 1797)
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

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel = empirical_ntk(module, inputs)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / kernel.nbytes
    del kernel
    floor = seconds(products)
    elapsed = seconds(lambda: empirical_ntk(module, inputs))
    notes = {"peak memory in kernels": peak, "time over the floor": elapsed / floor}
    return Comparison("kernel, MLP, N = 1797", elapsed, "floor: its matrix products", floor, notes)


def language_models() -> Iterator[Comparison]:
    """An encoder next to the products of its Jacobians, and a tied vocabulary next to one that is not."""
    torch.manual_seed(0)
    module, tokens = Encoder().eval(), torch.randint(0, 30522, (128, 32))
    used = time.process_time()
    elapsed = seconds(lambda: empirical_ntk(module, tokens), 1, warm_up=False)
    notes = {"seconds of all cores": time.process_time() - used}
    notes["peak GiB of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = torch.randn(256, 1 << 17)
    layers = [p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "embeddings" not in name]
    # Above the diagonal.
    floor = seconds(lambda: rows.mm(rows.T)) * sum(layers) / rows.shape[1] / 2
    yield Comparison("kernel, MiniLM, 22.7M parameters, N = 128", elapsed, "floor: J J^T of its layers", floor, notes)
    tokens = torch.randint(0, 50257, (16, 32))
    models = {"tied": CausalModel(tied=True).eval(), "not tied": CausalModel(tied=False).eval()}
    times = interleaved({name: partial(empirical_ntk, model, tokens) for name, model in models.items()}, 3)
    yield Comparison("kernel, GPT-2's vocabulary, tied, N = 16", times["tied"], "the same, not tied", times["not tied"])


def against_neural_tangents(python: str, implementations: list[str], samples: int = 128) -> Iterator[Comparison]:
    """The fastest of the peer's implementations, compile time excluded; ours before and after it, on the same core.

    Args:
        python: An interpreter that has peers/requirements.txt.
        implementations: Implementations of neural-tangents, by name.
        samples: N.
    """
    allowed = os.sched_getaffinity(0)
    # XLA's thread pool does not listen to a number of threads.
    os.sched_setaffinity(0, {min(allowed)})
    try:
        before = {name: _ours(name, samples) for name in MODELS}
        command = [python, str(PEER_SCRIPT), str(samples), "3", *implementations]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        after = {name: _ours(name, samples) for name in MODELS}
    finally:
        os.sched_setaffinity(0, allowed)
    for name, times in json.loads(printed.splitlines()[-1]).items():
        best = min(times, key=times.__getitem__)
        ours = (before[name] + after[name]) / 2
        yield Comparison(f"kernel, {name}, N = {samples}", ours, f"neural-tangents: {best}", times[best])


def _ours(name: str, samples: int) -> float:
    module, inputs = network(name, samples)
    return seconds(lambda: empirical_ntk(module, inputs))


def network(name: str, samples: int) -> tuple[nn.Module, Tensor]:
    """A network of the benchmarks and its inputs."""
    torch.manual_seed(0)
    return MODELS[name]().eval(), digits(name, samples)[0]
