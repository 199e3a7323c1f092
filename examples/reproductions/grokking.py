"""Grokking as lazy to rich: generalization that comes long after the fit (Kumar et al., 2024).

A network with one hidden layer, alpha / N sum_k phi(w_k x) with phi(h) = h + epsilon / 2 h^2, learns the square of one direction,
(beta x)^2, from five times as many samples as there are inputs, by full-batch gradient descent without any decay. Its first
features hardly contain the target. The larger alpha, the less do features have to change for a fit. Does the training loss fall
while training is lazy, and the test loss when it is not any more?

    python examples/reproductions/grokking.py
    python examples/reproductions/grokking.py --alphas 2 --steps 50 --inputs 8 --width 16    # seconds

Reference: T. Kumar, B. Bordelon, S. J. Gershman, C. Pehlevan, Grokking as the transition from lazy to rich training dynamics,
ICLR 2024, arXiv:2310.06110.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from drawing import COLORS, finish, grid_of_panels, markdown, save
from late_kernels import log_steps
from setting import FullBatch, fit, max_learning_rate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots.style import mark_thresholds, step_axis

SAMPLES = 5  # for each input
TEST = 500
PROBE = 32  # samples of the kernel that is followed
LEVELS = (0.5, 0.2, 0.1)  # losses, 1 being that of the zero function
History = list[dict[str, float]]


class Student(nn.Module):
    """The mean of `h + epsilon / 2 h^2` over hidden units, times alpha, less what it is at initialization.

    Args:
        inputs: Number of inputs.
        width: Number of hidden units.
        alpha: Scale of the output.
        epsilon: How much of the features is quadratic.
    """

    def __init__(self, inputs: int, width: int, alpha: float, epsilon: float) -> None:
        super().__init__()
        self.alpha, self.epsilon = alpha, epsilon
        self.hidden = nn.Linear(inputs, width, bias=False)
        nn.init.normal_(self.hidden.weight)
        self.initial = copy.deepcopy(self.hidden).requires_grad_(requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs, `(B, 1)`."""
        return self._uncentered(self.hidden(inputs)) - self._uncentered(self.initial(inputs))

    def _uncentered(self, hidden: Tensor) -> Tensor:
        return self.alpha * (hidden + self.epsilon / 2 * hidden.square()).mean(1, keepdim=True)


def squares(inputs: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set: normal inputs, and the square of one direction, of unit mean square."""
    direction = nn.functional.normalize(torch.randn(inputs), dim=0)

    def draw(samples: int) -> TensorDataset:
        x = torch.randn(samples, inputs)
        y = (x @ direction).square().unsqueeze(1)
        return TensorDataset(x / inputs**0.5, y / 3**0.5)

    return draw(SAMPLES * inputs), draw(TEST)


def run(options: argparse.Namespace, alpha: float, seed: int) -> History:
    """Trains one network, watched."""
    torch.manual_seed(seed)
    data, test = squares(options.inputs)
    network = Student(options.inputs, options.width, alpha, options.epsilon)
    module = FullBatch(network, options.fraction * max_learning_rate(network, data))
    monitor = LinearizationMonitor(
        steps=log_steps(options.steps, per_decade=10),
        loss=nn.MSELoss(),
        evaluation=test,
        kernel_probe=PROBE,
        regime=True,
        taylor=False,
        progress=False,
        strict=True,
    )
    fit(module, data, options.steps, [monitor])
    return monitor.history


def step_below(history: History, name: str, level: float) -> str:
    """The first measured step at which a loss is below a level."""
    steps = [row["step"] for row in history if row[name] < level]
    return f"{steps[0]:.0f}" if steps else f"> {history[-1]['step']:.0f}"


def delay_table(runs: dict[float, History]) -> str:
    """When each loss falls below some levels, and where the run is then."""
    lines: list[list[Any]] = []
    for alpha, history in runs.items():
        for level in LEVELS:
            names = ("loss", "evaluation/loss", "linearized_loss", "evaluation/linearized_loss")
            fitted = next((row for row in history if row["loss"] < level), history[-1])
            lines.append(
                [
                    f"{alpha:g}",
                    level,
                    *(step_below(history, name, level) for name in names),
                    fitted["relative_weight_distance"],
                ]
            )
    header = [
        "alpha", "loss below", "training", "test", "linearized, training", "linearized, test",
        "relative weight distance at the fit",
    ]  # fmt: skip
    return markdown(header, lines)


def run_table(history: History) -> str:
    """What the panel says along one run."""
    names = {
        "loss": "training loss", "linearized_loss": "linearized", "evaluation/loss": "test loss",
        "evaluation/linearized_loss": "linearized", "relative_weight_distance": "relative weight distance",
        "kernel_change": "kernel change", "kernel_distance": "kernel distance", "regime/alignment": "alignment",
    }  # fmt: skip
    rows = history[:: max(1, len(history) // 12)]
    rows += history[-1:] if rows[-1] is not history[-1] else []
    lines = [[f"{row['step']:.0f}", *(row[name] for name in names)] for row in rows]
    return markdown(["step", *names.values()], lines)


def draw(runs: dict[float, History], path: Path) -> None:
    """Losses above, and how far the run is from lazy below, a column for each alpha."""
    figure, axes = grid_of_panels(2, len(runs), width=4.2, height=3.3, sharex=True, sharey="row")
    for column, (alpha, history) in enumerate(runs.items()):
        upper, lower = axes[column], axes[len(runs) + column]
        steps = [row["step"] for row in history]
        for index, (name, label) in enumerate((("loss", "training"), ("evaluation/loss", "test"))):
            linearized = name.replace("loss", "linearized_loss")
            color = COLORS[index]
            upper.plot(steps, [row[name] for row in history], "-", color=color, label=label)
            upper.plot(
                steps,
                [row[linearized] for row in history],
                "--",
                color=color,
                linewidth=1,
                label=f"{label}, linearized",
            )
        finish(upper, "", "", scales="linear-log", title=rf"$\alpha$ = {alpha:g}", legend=None)
        later = [row for row in history if row["step"] > 1]  # at step 1 the weights are the linearized ones
        grown = {
            "relative weight distance": [row["relative_weight_distance"] for row in later],
            "kernel change": [row["kernel_change"] for row in later],
            "growth of the alignment": [row["regime/alignment"] / history[0]["regime/alignment"] - 1 for row in later],
        }
        for index, (label, values) in enumerate(grown.items()):
            lower.plot([row["step"] for row in later], values, "-", color=COLORS[2 + index], label=label)
        finish(lower, "", "", scales="linear-log", legend=None)
        step_axis(lower, steps)
    first, second = axes[0], axes[len(runs)]
    first.set(ylabel="loss / loss of the zero function", ylim=(1e-3, 2))
    second.set(ylabel="how far from lazy", ylim=(1e-4, 10))
    first.legend(frameon=False, fontsize=8, loc="lower left")
    second.legend(frameon=False, fontsize=8, loc="upper left")
    for column in range(len(runs)):
        mark_thresholds(axes[len(runs) + column], named=column == len(runs) - 1)
    save(figure, path)


def main() -> None:
    """Runs, prints the tables, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 4, 32])
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--fraction", type=float, default=0.9, help="of the largest stable learning rate")
    parser.add_argument("--steps", type=int, default=3000, help="of gradient descent")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("reproductions"), help="directory of the figure")
    options = parser.parse_args()
    runs = {alpha: run(options, alpha, options.seed) for alpha in options.alphas}
    print(f"\nFirst steps at which losses are below\n\n{delay_table(runs)}\n")
    for alpha, history in runs.items():
        print(f"alpha = {alpha:g}\n\n{run_table(history)}\n")
    draw(runs, options.output / "grokking.svg")


if __name__ == "__main__":
    main()
