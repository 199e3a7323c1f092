"""Progressive sharpening to 2 / lr (Cohen et al., 2021).

A tanh network is trained by full-batch gradient descent on the mean squared error, with learning rates that are stable at
initialization. The panel of regimes says how near the edge of stability the run is: lr / 2 times the largest eigenvalue of the
Gauss-Newton matrix of 32 images. The paper's sharpness is the largest eigenvalue of the whole Hessian of the loss on all training
images. At a few steps both are computed, that one by Lanczos on Hessian-vector products.

    python examples/reproductions/sharpening.py
    python examples/reproductions/sharpening.py --lrs 0.5 --width 8 --steps 20 --samples 40    # seconds

Reference: J. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, Gradient descent on neural networks typically occurs at the
edge of stability, ICLR 2021, arXiv:2103.00065.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import COLORS, MARKERS, draw_limit, finish, grid_of_panels, markdown, one_legend, save
from late_kernels import average, log_steps
from lightning.pytorch import LightningModule
from scipy.sparse.linalg import LinearOperator, eigsh
from setting import CLASSES, AtSteps, FullBatch, digits, fit, max_learning_rate
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots.style import step_axis

History = list[dict[str, float]]
AT_EDGE = 0.95


def sharpness(module: FullBatch, data: TensorDataset) -> float:
    """The largest eigenvalue of the Hessian of the loss on all of the data."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters)
    images, targets = data.tensors
    loss = module.training_step((images, targets), 0)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])

    def product(vector: Any) -> Any:
        direction = torch.as_tensor(vector.ravel(), dtype=gradient.dtype)
        parts = torch.autograd.grad(gradient, parameters, grad_outputs=direction, retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).numpy()

    hessian = LinearOperator((size, size), matvec=product, dtype=np.float32)
    (largest,) = eigsh(hessian, k=1, which="LA", tol=1e-3, return_eigenvectors=False)
    return float(largest)


class Sharpness(AtSteps):
    """Keeps sharpness and curvature on all of the data at chosen steps.

    Args:
        data: The training set.
        steps: When.
    """

    def __init__(self, data: TensorDataset, steps: list[int]) -> None:
        super().__init__(steps)
        self.data = data
        self.hessian: dict[int, float] = {}
        self.gauss_newton: dict[int, float] = {}

    def measure(self, step: int, module: LightningModule) -> None:
        """Measures the network after so many steps."""
        assert isinstance(module, FullBatch)
        self.hessian[step] = sharpness(module, self.data)
        self.gauss_newton[step] = 2 / max_learning_rate(module, self.data)


class Run:
    """What one run left behind.

    Args:
        lr: Its learning rate.
        history: Of the monitor.
        exact: Sharpness on all of the data.
    """

    def __init__(self, lr: float, history: History, exact: Sharpness) -> None:
        self.lr = lr
        self.history = history
        self.exact = exact

    def edge_of(self, curvatures: dict[int, float]) -> dict[int, float]:
        """Curvatures in units of 2 / lr."""
        return {step: self.lr / 2 * value for step, value in curvatures.items()}


def run(options: argparse.Namespace, lr: float) -> Run:
    """Trains one network, watched."""
    torch.manual_seed(options.seed)
    data, width = digits(options.samples), options.width
    hidden = nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    module = FullBatch(nn.Sequential(*hidden, nn.Linear(width, CLASSES)), lr)
    steps = log_steps(options.steps, per_decade=8)
    exact = Sharpness(data, steps[::-3][::-1])
    monitor = LinearizationMonitor(
        steps=steps, dynamics="gradient_descent", taylor=False, regime=True, progress=False, strict=True
    )  # fmt: skip
    fit(module, data, options.steps, [monitor, exact])
    return Run(lr, monitor.history, exact)


def table(runs: list[Run]) -> str:
    """Both curvatures in units of 2 / lr, and where the run is, at the steps at which both are known."""
    lines: list[list[Any]] = []
    for r in runs:
        rows = {int(row["step"]): row for row in r.history}
        hessian, gauss_newton = r.edge_of(r.exact.hessian), r.edge_of(r.exact.gauss_newton)
        for step in hessian:
            row = rows[step]
            edges = row["regime/edge"], gauss_newton[step], hessian[step]
            lines.append(
                [f"{r.lr:g}", step, *(f"{e:.3f}" for e in edges), row["loss"], row["relative_weight_distance"]]
            )  # fmt: skip
    header = [
        "lr", "step", "edge (Gauss-Newton, 32 images)", "Gauss-Newton, all", "Hessian, all", "loss", "relative weight distance",
    ]  # fmt: skip
    return markdown(header, lines)


def summary(r: Run) -> str:
    """When the run arrived at the edge and where it was from then on."""
    first = next((i for i, row in enumerate(r.history) if row["regime/edge"] > AT_EDGE), None)
    start, end = r.history[0]["regime/edge"], r.history[-1]["regime/edge"]
    said = f"lr = {r.lr:g}: the edge goes from {start:.2f} to {end:.2f}"
    if first is None:
        return f"{said} and does not reach {AT_EDGE:g}."
    after = [row["regime/edge"] for row in r.history[first:]]
    exact = [value for step, value in r.edge_of(r.exact.hessian).items() if step >= r.history[first]["step"]]
    true = f", that of the Hessian on all images {average(exact):.2f}" if exact else ""
    return f"{said}; above {AT_EDGE:g} from step {r.history[first]['step']:.0f} on, where its mean is {average(after):.2f}{true}."


def draw(runs: list[Run], path: Path) -> None:
    """The edge over steps, and sharpness against it."""
    figure, axes = grid_of_panels(1, 3, width=4.4)
    for index, r in enumerate(runs):
        color, steps = COLORS[index], [row["step"] for row in r.history]
        style = {"color": color, "linewidth": 1.3, "label": f"lr = {r.lr:g}"}
        axes[0].plot(steps, [row["regime/curvature"] for row in r.history], "-", **style)
        draw_limit(axes[0], 2 / r.lr, f"2 / lr for lr = {r.lr:g}", color=color)
        axes[1].plot(steps, [row["regime/edge"] for row in r.history], "-", **style)
        known = r.edge_of(r.exact.hessian)
        axes[1].plot(list(known), list(known.values()), MARKERS[index], color=color, markersize=5)
        axes[2].plot(steps, [row["loss"] for row in r.history], "-", **style)
    axes[1].plot([], [], "o", color="#555555", label="Hessian, all images")
    draw_limit(axes[1], 1, "edge of stability")
    titles = ("Largest curvature (Gauss–Newton, 32 images)", "Edge: lr × curvature / 2", "Training loss")
    for axis, title, scales in zip(axes, titles, ("linear-linear", "linear-linear", "linear-log"), strict=True):
        finish(axis, "", "", scales=scales, title=title, legend=None)
        step_axis(axis, steps)
    axes[0].set_ylim(0, 1.1 * max(2 / r.lr for r in runs))
    axes[1].set_ylim(bottom=0)
    one_legend(figure, axes[1])
    save(figure, path)


def main() -> None:
    """Runs, prints the table, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.3, 0.4, 0.6])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000, help="of gradient descent")
    parser.add_argument("--samples", type=int, default=250, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("reproductions"), help="directory of the figure")
    options = parser.parse_args()
    runs = [run(options, lr) for lr in options.lrs]
    print(f"\nCurvatures times lr / 2\n\n{table(runs)}\n")
    print("\n".join(summary(r) for r in runs))
    draw(runs, options.output / "sharpening.svg")


if __name__ == "__main__":
    main()
