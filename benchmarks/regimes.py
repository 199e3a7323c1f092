"""Whether the intervals of the panel of regimes hold, on digits: against the dense kernel and the Gauss-Newton matrix.

Run as `python benchmarks/regimes.py 500` for the share of trials in which each 95 % interval holds the true number, its mean
half width relative to the estimate, and the largest error of the largest curvature.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_ntk import Linearization, empirical_ntk
from lightning_ntk.comparison import RegimePanel
from lightning_ntk.data.reference import Reference
from lightning_ntk.functional import centered_kernel_target_alignment, effective_rank, kernel_target_alignment

SAMPLES = 32


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
    """The panel of the dense kernel."""
    kernel, targets = empirical_ntk(module, inputs), nn.functional.one_hot(labels, 10).double()
    outputs = module(inputs).detach()

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(flat.reshape(outputs.shape), labels)

    hessian: Tensor = torch.autograd.functional.hessian(loss, outputs.flatten())  # type: ignore[no-untyped-call]
    sizes, basis = torch.linalg.eigh(hessian)
    root = basis * sizes.clamp_min(0).sqrt()
    return {
        "trace": kernel.trace().item(),
        "effective_rank": effective_rank(kernel),
        "alignment": kernel_target_alignment(kernel, targets),
        "centered_alignment": centered_kernel_target_alignment(kernel, targets),
        "curvature": torch.linalg.eigvalsh(root.T @ kernel @ root)[-1].item(),
    }


def main() -> None:
    """Prints one line for every network and quantity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", type=int, nargs="?", default=500)
    trials = parser.parse_args().trials
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    rows = [i * len(inputs) // SAMPLES for i in range(SAMPLES)]
    makers: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "MLP at initialization": (perceptron, 0), "MLP after 100 steps": (perceptron, 100),
        "CNN at initialization": (convolutional, 0), "CNN after 100 steps": (convolutional, 100),
    }  # fmt: skip
    for name, (make, steps) in makers.items():
        torch.manual_seed(0)
        module = trained(make(), inputs, labels, steps)
        expected = true_numbers(module, inputs[rows], labels[rows])
        reference, linearization = Reference((inputs, labels)), Linearization(module)
        held: dict[str, int] = defaultdict(int)
        widths: dict[str, float] = defaultdict(float)
        errors: dict[str, float] = defaultdict(float)
        for seed in range(trials):
            panel = RegimePanel(linearization, reference, nn.CrossEntropyLoss(), feature_samples=1, seed=seed)
            scalars = panel.measure(dict(module.named_parameters()))
            for quantity, true in expected.items():
                value, low, high = (scalars[f"regime/{quantity}{end}"] for end in ("", "_low", "_high"))
                held[quantity] += low * (1 - 1e-9) <= true <= high * (1 + 1e-9)
                widths[quantity] += (high - low) / 2 / value / trials
                errors[quantity] = max(errors[quantity], abs(value / true - 1))
        for quantity in expected:
            share = held[quantity] / trials
            print(
                f"{name:24}{quantity:20} holds in {share:.1%}, half width {widths[quantity]:.2%}, "
                f"largest error {errors[quantity]:.2g}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
