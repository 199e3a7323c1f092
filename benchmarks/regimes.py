"""Whether the intervals of the panel of regimes hold, on digits: against the dense kernel and the Gauss-Newton matrix.

    python benchmarks/regimes.py [500] [--output benchmarks/results/regimes.json]

prints and writes the share of trials in which each 95 % interval holds the true number, its mean half width relative to the
estimate, and the largest error. A trial is a panel with random numbers of its own. The rows `layers` count the worst layer.

For the curvature of few samples it prints and writes that of 32, of their halves, of 128 and of all samples, here a quarter of
the digits, and for a perceptron on independent normal numbers, for which every sample is another direction.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from timing import machine
from torch import Tensor, nn

from lightning_ntk import Linearization, empirical_ntk
from lightning_ntk.comparison import RegimePanel
from lightning_ntk.data.reference import Reference, evenly_spaced_rows
from lightning_ntk.functional import centered_kernel_target_alignment, effective_rank, kernel_target_alignment

RESULTS = Path(__file__).parent / "results" / "regimes.json"
SAMPLES = 32
FEWER = 4  # of so many digits one, where the curvature of all of them is measured
ALIGNMENTS = {"alignment": kernel_target_alignment, "centered_alignment": centered_kernel_target_alignment}


def narrow() -> nn.Module:
    """Two narrow hidden layers of rectifiers."""
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*layers).double()


def perceptron() -> nn.Module:
    """Two hidden layers."""
    layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)]
    return nn.Sequential(*layers).double()


def convolutional() -> nn.Module:
    """Two convolutions."""
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 10)).double()


def trained(module: nn.Module, inputs: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """The module after some steps of SGD on the cross-entropy."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs[step % 7 :: 7]), labels[step % 7 :: 7])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


def true_numbers(module: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """The panel of the dense kernel and of those of the layers."""
    kernel, targets = empirical_ntk(module, inputs), nn.functional.one_hot(labels, 10).double()
    outputs = module(inputs).detach()

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(flat.reshape(outputs.shape), labels)

    hessian: Tensor = torch.autograd.functional.hessian(loss, outputs.flatten())  # type: ignore[no-untyped-call]
    sizes, basis = torch.linalg.eigh(hessian)
    root = basis * sizes.clamp_min(0).sqrt()
    numbers = {
        "trace": kernel.trace().item(),
        "effective_rank": effective_rank(kernel),
        "curvature": torch.linalg.eigvalsh(root.T @ kernel @ root)[-1].item(),
    }
    numbers |= {name: align(kernel, targets) for name, align in ALIGNMENTS.items()}
    for layer, of_layer in layer_kernels(module, inputs).items():
        numbers |= {f"layer/{layer}/{name}": align(of_layer, targets) for name, align in ALIGNMENTS.items()}
    return numbers


def layer_kernels(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The part of the kernel that each layer has."""
    parameters = dict(module.named_parameters())

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(module, weights, (inputs,))
        return result.flatten()

    kernels: dict[str, Tensor] = {}
    for name, jacobian in torch.func.jacrev(outputs)(parameters).items():
        layer, rows = name.rpartition(".")[0], jacobian.detach().flatten(1)
        kernels[layer] = kernels.get(layer, torch.zeros(())) + rows @ rows.T
    return kernels


def curvatures(module: nn.Module, inputs: Tensor, targets: Tensor, loss: nn.Module) -> dict[str, float]:
    """The largest curvature, by the number of samples."""
    found: dict[str, float] = {}
    for samples in (SAMPLES, 4 * SAMPLES, len(inputs)):
        panel = RegimePanel(
            Linearization(module), Reference((inputs, targets)), loss, samples=samples, feature_samples=1
        )
        scalars = panel.measure(dict(module.named_parameters()))
        found[f"{samples} samples"] = scalars["regime/curvature"]
        if samples == SAMPLES:
            found["their halves"] = scalars["regime/curvature_of_halves"]
    return found


def main() -> None:
    """Prints one line for every network and quantity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", type=int, nargs="?", default=500)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    rows = evenly_spaced_rows(len(inputs), SAMPLES)
    makers: dict[str, tuple[Callable[[], nn.Module], int]] = {
        f"{name} {when}": (make, steps)
        for name, make in {"MLP": perceptron, "narrow MLP": narrow, "CNN": convolutional}.items()
        for when, steps in {"at initialization": 0, "after 100 steps": 100}.items()
    }
    described, results = machine(), []
    few: dict[str, dict[str, float]] = {}
    for name, (make, steps) in makers.items():
        torch.manual_seed(0)
        module = trained(make(), inputs, labels, steps)
        few[name] = curvatures(module, inputs[::FEWER], labels[::FEWER], nn.CrossEntropyLoss())
        expected = true_numbers(module, inputs[rows], labels[rows])
        for row in coverage(module, Reference((inputs, labels)), expected, options.trials):
            results.append({"network": name, **row})
            print(
                f"{name:30}{row['quantity']:26} holds in {row['holds']:.1%}, half width {row['half width']:.2%}, "
                f"largest error {row['largest error']:.2g}", flush=True,
            )  # fmt: skip
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 1)).double()
    normal, targets = torch.randn(160, 32).double(), torch.randn(160, 1).double()
    few["MLP on normal numbers"] = curvatures(module, normal, targets, nn.MSELoss())
    for name, found in few.items():
        print(f"{name:30}curvature of " + ", ".join(f"{samples}: {value:.3g}" for samples, value in found.items()))
    written = {"machine": described, "trials": options.trials, "rows": results, "curvature": few}
    options.output.write_text(json.dumps(written, indent=1) + "\n")


def coverage(module: nn.Module, reference: Reference, expected: dict[str, float], trials: int) -> list[dict[str, Any]]:
    """How often the intervals hold the expected numbers."""
    linearization = Linearization(module)
    held: dict[str, float] = defaultdict(float)
    widths: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    for seed in range(trials):
        panel = RegimePanel(linearization, reference, nn.CrossEntropyLoss(), feature_samples=1, seed=seed)
        scalars = panel.measure(dict(module.named_parameters()))
        for quantity, true in expected.items():
            value, low, high = (scalars[f"regime/{quantity}{end}"] for end in ("", "_low", "_high"))
            held[quantity] += (low * (1 - 1e-9) <= true <= high * (1 + 1e-9)) / trials
            widths[quantity] += (high - low) / 2 / value / trials
            errors[quantity] = max(errors[quantity], abs(value / true - 1))
    rows = []
    for shown in ["trace", "effective_rank", "curvature", *ALIGNMENTS, *(f"layers {name}" for name in ALIGNMENTS)]:
        kind, _, name = shown.rpartition(" ")
        same = [key for key in expected if key.startswith("layer/") and key.endswith(f"/{name}")] if kind else [name]
        rows.append({
            "quantity": shown,
            "holds": min(held[key] for key in same),
            "half width": max(widths[key] for key in same),
            "largest error": max(errors[key] for key in same),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
