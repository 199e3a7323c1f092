"""The closed forms as they are published, in float32, beside this package: time and accuracy in one run.

1000 digits, even or odd as -1 and 1, a network with one hidden layer of 1024, 2000 steps of full-batch gradient descent. With the
kernel Theta, the initial residual r = f0 - Y and eta the learning rate times 2 / N, the two regimes are

    continuous    w_lin(t) = w0 - J^T Theta^-1 (I - exp(-eta t Theta)) r
    discrete      w_lin(t) = w0 - J^T Theta^-1 (I - (I - eta Theta)^t) r

Here they are computed as they stand, in float32, with `torch.linalg.inv`, `torch.matrix_exp` and `torch.linalg.matrix_power`. The
judge of both is float64 without inverse or power: every single step for the discrete regime, and for the continuous one the
action of an exponential on a vector.

Three scales of the initial weights, sqrt(2), 1 / sqrt(3) and 0.2 over the root of the fan-in: the second is that of `nn.Linear`.
The smaller they are, the closer the network is to a linear one and the larger is the condition number of its kernel.

    python examples/reproductions/closed_forms.py
    python examples/reproductions/closed_forms.py --width 16 --steps 20 --samples 30    # seconds
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import COLORS, MARKERS, finish, grid_of_panels, markdown, one_legend, save
from lightning.pytorch import Callback, LightningModule, Trainer
from ntk_parametrization import mlp
from scipy.sparse.linalg import expm_multiply
from setting import FullBatch, digits, fit, max_learning_rate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ntk import Linearization, LinearizedTraining, empirical_ntk

REGIMES = {"discrete": "gradient_descent", "continuous": "gradient_flow"}


class Snapshots(Callback):
    """Keeps the weights of some steps, as vectors in float64.

    Args:
        steps: Which.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.weights: dict[int, Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the clock."""
        if trainer.global_step in self.steps:
            self.weights[trainer.global_step] = vector(dict(pl_module.named_parameters()))


def vector(weights: dict[str, Any]) -> Tensor:
    """Weights in one row, `(P,)` in float64."""
    return torch.cat([weight.detach().double().flatten() for weight in weights.values()])


def parity(samples: int) -> TensorDataset:
    """Images of digits with 1 for odd ones and -1 for even ones: `(N, 64)`, `(N, 1)`."""
    images, targets = digits(samples).tensors
    return TensorDataset(images, 2.0 * (targets.argmax(1, keepdim=True) % 2) - 1)


def jacobian(network: nn.Module, images: Tensor) -> Tensor:
    """J, `(N, P)`: one backward pass for each sample."""
    parameters = list(network.parameters())
    rows = []
    for image in images:
        gradients = torch.autograd.grad(network(image).squeeze(), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def naive_displacement(
    j: Tensor, inverse: Tensor, kernel: Tensor, residual: Tensor, eta: float, t: int, regime: str
) -> Tensor:
    """w_lin(t) - w0, `(P,)`, by the published formula in the type of its arguments."""
    identity = torch.eye(len(kernel), dtype=kernel.dtype)
    if regime == "continuous":
        left = torch.matrix_exp(-eta * t * kernel)
    else:
        left = torch.linalg.matrix_power(identity - eta * kernel, t)
    return -j.T @ (inverse @ ((identity - left) @ residual))


def reference_coefficients(
    kernel: Tensor, residual: Tensor, eta: float, steps: list[int], regime: str
) -> dict[int, Tensor]:
    """The coefficients a of w_lin(t) = w0 + J^T a, `(N,)` in float64, without a closed form.

    Step by step a <- a - eta (r + Theta a), or the exponential of da/dt = -eta (r + Theta a) acting on a vector.
    """
    found = {}
    if regime == "discrete":
        a = torch.zeros_like(residual)
        for step in range(1, max(steps) + 1):
            a = a - eta * (residual + kernel @ a)
            if step in steps:
                found[step] = a
        return found
    # One row more makes the equation homogeneous.
    generator = np.zeros((len(kernel) + 1, len(kernel) + 1))
    generator[:-1, :-1], generator[:-1, -1] = -eta * kernel.numpy(), -eta * residual.numpy()
    state, before = np.append(np.zeros(len(kernel)), 1.0), 0
    for step in sorted(steps):
        state, before = expm_multiply(generator * (step - before), state), step
        found[step] = torch.from_numpy(state[:-1].copy())
    return found


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """A result and the seconds that it took."""
    started = time.perf_counter()
    result = work(*arguments, **options)
    return result, time.perf_counter() - started


def relative(difference: Tensor, size: Tensor) -> float:
    """Norm over norm; infinity for what is no number."""
    value = float(difference.double().norm() / size.norm())
    return value if math.isfinite(value) else math.inf


def compare(options: argparse.Namespace, sigma_w: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row for each regime, method and time; and how long the preparations took."""
    torch.manual_seed(options.seed)
    data = parity(options.samples)
    images, targets = data.tensors
    network = mlp([64, options.width, 1], nn.Tanh, "standard", sigma_w=sigma_w, sigma_b=0.1)
    lr = options.fraction * max_learning_rate(network, data)
    eta = lr * 2 / targets.numel()
    steps = sorted({t for t in (1, 10, 100, 1000) if t < options.steps} | {options.steps})

    rows_of_j, jacobian_seconds = timed(jacobian, network, images)
    kernel, product_seconds = timed(torch.matmul, rows_of_j, rows_of_j.T)
    inverse, inverse_seconds = timed(torch.linalg.inv, kernel)
    residual = (network(images) - targets).detach().flatten()
    seconds = {
        "published: Jacobian and kernel": jacobian_seconds + product_seconds,
        "published: inverse": inverse_seconds,
    }

    exact = copy.deepcopy(network).double()
    exact_kernel = empirical_ntk(exact, images.double())
    exact_residual = (exact(images.double()) - targets).detach().flatten()
    linearization = Linearization(exact)
    eigenvalues = torch.linalg.eigvalsh(exact_kernel)
    seconds["condition"] = float(eigenvalues[-1] / eigenvalues[0])

    start = vector(dict(network.named_parameters()))
    snapshots = Snapshots(steps)
    displacements: dict[tuple[str, str, int], tuple[Tensor, float]] = {}
    for regime, dynamics in REGIMES.items():
        training, seconds[f"lightning_ntk: kernel and modes, {regime}"] = timed(
            LinearizedTraining, network, data, lr=lr, dynamics=dynamics, horizon=options.steps, progress=False
        )
        coefficients = reference_coefficients(exact_kernel, exact_residual, eta, steps, regime)
        for t in steps:
            pulled = linearization.vjp(coefficients[t].unsqueeze(1), images.double())
            displacements[regime, "reference", t] = vector(pulled), math.nan
            displacements[regime, "published", t] = timed(
                naive_displacement, rows_of_j, inverse, kernel, residual, eta, t, regime
            )
            ours, spent = timed(training.displacement, t)
            displacements[regime, "lightning_ntk", t] = vector(ours), spent
    fit(FullBatch(network, lr), data, options.steps, [snapshots])
    rows = []
    for (regime, method, t), (displacement, spent) in displacements.items():
        truth, moved = displacements[regime, "reference", t][0], snapshots.weights[t] - start
        rows.append({
            "regime": regime, "method": method, "t": t, "seconds": spent, "error": relative(displacement - truth, truth),
            "distance": relative(moved - displacement, moved),
        })  # fmt: skip
    return rows, seconds


def draw(rows: list[dict[str, Any]], axes: Any, title: str, labeled: bool) -> None:
    """Errors of the weights and the distances that would be logged, over time; `labeled` names the vertical axes."""
    for regime in REGIMES:
        truths = [row for row in rows if row["method"] == "reference" and row["regime"] == regime]
        axes[1].plot(
            [row["t"] for row in truths], [row["distance"] for row in truths], color="#000000", alpha=0.3, linewidth=5,
            label="truth" if regime == "discrete" else None,
        )  # fmt: skip
    for axis, y in zip(axes, ("error", "distance"), strict=True):
        for index, method in enumerate(("lightning_ntk", "published")):
            for regime in REGIMES:
                kept = [row for row in rows if row["method"] == method and row["regime"] == regime]
                kept = [row for row in kept if 0 < row[y] < math.inf]
                axis.plot(
                    [row["t"] for row in kept], [row[y] for row in kept], "-" if regime == "discrete" else "--",
                    marker=MARKERS[index], markersize=5, color=COLORS[index],
                    label=f"{method}{' formula' if index else ''}, {regime}",
                    markerfacecolor=COLORS[index] if regime == "discrete" else "none",
                )  # fmt: skip
    error = "relative error of the weights\n" r"$\|w - w_\mathrm{lin}(t)\| \,/\, \|w_\mathrm{lin}(t) - w_0\|$"
    finish(axes[0], "", error if labeled else "", title=title, legend=None)
    distance = "relative weight distance reported\n" r"$\|w_t - w\| \,/\, \|w_t - w_0\|$"
    finish(axes[1], "optimizer step t", distance if labeled else "", legend=None)


def report(rows: list[dict[str, Any]], seconds: dict[str, float]) -> str:
    """Tables of errors and of times."""
    truths = {(row["regime"], row["t"]): row["distance"] for row in rows if row["method"] == "reference"}
    cells = [
        [r["regime"], r["t"], r["method"], r["error"], r["distance"], truths[r["regime"], r["t"]], r["seconds"]]
        for r in rows
        if r["method"] != "reference"
    ]
    header = ["regime", "t", "method", "error of the weights", "distance reported", "true one", "seconds for this t"]
    once = [[name, value] for name, value in seconds.items()]
    return f"{markdown(header, cells)}\n\n{markdown(['once', 'seconds'], once)}\n"


def main() -> None:
    """Runs, prints the tables, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of gradient descent: the last time of both formulas"
    )
    parser.add_argument("--samples", type=int, default=1000, help="images")
    parser.add_argument("--fraction", type=float, default=0.5, help="learning rate over the largest stable one")
    parser.add_argument(
        "--sigma-w",
        type=float,
        nargs="+",
        default=[2**0.5, 3**-0.5, 0.2],
        help="scales of the initial weights, times the root of the fan-in",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("reproductions"), help="directory of the figure")
    options = parser.parse_args()
    columns = len(options.sigma_w)
    figure, axes = grid_of_panels(2, columns, width=4.2, height=3.4, sharex=True, sharey="row")
    for column, sigma_w in enumerate(options.sigma_w):
        rows, seconds = compare(options, sigma_w)
        condition = seconds.pop("condition")
        print(f"\nsigma_w = {sigma_w:.3g}: condition number of the kernel {condition:.3g}\n")
        print(report(rows, seconds), flush=True)
        digits, exponent = f"{condition:.1e}".split("e")
        title = rf"$\sigma_w$ = {sigma_w:.3g}, condition number ${digits}\times10^{{{int(exponent)}}}$"
        draw(rows, axes[column::columns], title, labeled=column == 0)
    for axis in axes:
        axis.minorticks_off()
    one_legend(figure, axes[-1])
    save(figure, options.output / "closed-forms.svg")


if __name__ == "__main__":
    main()
