"""Kernel regression with the kernels before and after training, beside the network (Fort et al., 2020; Long, 2021).

A ReLU network learns by minibatch SGD whether a digit is 5 or more. Ridge regression with its neural tangent kernel, at
initialization and at later steps, asks how much of what the network knows is in its kernel. No outputs of the network enter, only
targets of the training set; the ridge is that of the least leave-one-out error.

    python examples/reproductions/after_kernel.py
    python examples/reproductions/after_kernel.py --widths 8 --seeds 0 --steps 20 --samples 64    # seconds

References: S. Fort et al., Deep learning versus kernel learning, NeurIPS 2020; P. M. Long, Properties of the after kernel,
arXiv:2105.10585, 2021.
"""

import argparse
from pathlib import Path

import torch
from drawing import COLORS, MARKERS, finish, grid_of_panels, markdown, one_legend, save
from late_kernels import average, log_steps
from lightning.pytorch import LightningModule
from setting import AtSteps, FullBatch, digits, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk.plots.style import label_plainly, step_axis
from lightning_ntk.training import kernel_regression

KINDS = ("kernel", "network")
Errors = dict[int, dict[str, float]]


class Momentum(FullBatch):
    """Trained by SGD with momentum, on batches."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with a momentum of 0.9."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Regressions(AtSteps):
    """Shares of test images that the kernel and the network get wrong, at chosen steps.

    Args:
        train: The images that regression learns from.
        test: Other images.
        steps: When.
    """

    def __init__(self, train: TensorDataset, test: TensorDataset, steps: list[int]) -> None:
        super().__init__(steps)
        self.train = train
        self.test = test
        self.errors: Errors = {}

    def measure(self, step: int, module: LightningModule) -> None:
        """Measures the network after so many steps."""
        fit = kernel_regression(module, self.train, self.test, ridge="loo", centered=True)
        assert fit.test is not None
        images, targets = self.test.tensors
        with torch.no_grad():
            wrong = module(images).sign() != targets
        assert fit.test.accuracy is not None
        self.errors[step] = {"kernel": 1 - fit.test.accuracy, "network": wrong.double().mean().item()}


def split(samples: int) -> tuple[TensorDataset, TensorDataset]:
    """Some images, in a random order, and all others; the target is 1 for a digit of 5 or more, else -1."""
    images, classes = digits(1797).tensors
    order = torch.randperm(len(images))
    targets = 2.0 * (classes.argmax(1, keepdim=True) >= 5) - 1
    train, test = ((images[rows], targets[rows]) for rows in (order[:samples], order[samples:]))
    return TensorDataset(*train), TensorDataset(*test)


def run(options: argparse.Namespace, width: int, seed: int) -> Errors:
    """Trains one network, and regresses with its kernels."""
    torch.manual_seed(seed)
    train, test = split(options.samples)
    regressions = Regressions(train, test, log_steps(options.steps, per_decade=2))
    hidden = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    network = nn.Sequential(*hidden, nn.Linear(width, 1))
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    quiet_trainer(options.steps, [regressions]).fit(Momentum(network, options.lr), loader)
    return regressions.errors


def draw(runs: dict[int, list[Errors]], path: Path) -> None:
    """Errors over steps, a panel for each width: means, and the range over seeds."""
    figure, axes = grid_of_panels(1, len(runs), sharey=True)
    for axis, (width, own) in zip(axes, runs.items(), strict=True):
        steps = list(own[0])
        for index, kind in enumerate(KINDS):
            values = [[100 * errors[step][kind] for errors in own] for step in steps]
            low, high = [min(at) for at in values], [max(at) for at in values]
            label = {"kernel": "kernel regression with its kernel", "network": "the network"}[kind]
            axis.plot(
                steps,
                [average(at) for at in values],
                color=COLORS[index],
                marker=MARKERS[index],
                markersize=5,
                label=label,
            )
            axis.fill_between(steps, low, high, color=COLORS[index], alpha=0.15, linewidth=0)
        finish(axis, "", "test error (%)", title=f"Width {width}", legend=None)
        step_axis(axis, steps)
    axes[0].set_ylim(1, 99)  # within two powers of ten, 1, 2 and 5 are labeled
    label_plainly(axes[0].yaxis)
    for axis in axes[1:]:
        axis.set_ylabel("")
    one_legend(figure, axes[0])
    save(figure, path)


def main() -> None:
    """Runs, prints the table, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=1000, help="of SGD, with batches of 32")
    parser.add_argument("--samples", type=int, default=512, help="training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("reproductions"), help="directory of the figure")
    options = parser.parse_args()
    runs = {width: [run(options, width, seed) for seed in options.seeds] for width in options.widths}
    columns = [(width, kind) for width in runs for kind in KINDS]
    lines = [
        [step, *(f"{100 * average([errors[step][kind] for errors in runs[width]]):.1f}" for width, kind in columns)]
        for step in next(iter(runs.values()))[0]
    ]
    header = ["step", *(f"{kind}, width {width}" for width, kind in columns)]
    print(f"\nTest errors in %, means over {len(options.seeds)} seeds\n\n{markdown(header, lines)}\n")
    draw(runs, options.output / "after-kernel.svg")


if __name__ == "__main__":
    main()
