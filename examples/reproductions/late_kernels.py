"""When the kernel settles: kernels through training, and linearizations captured late (Fort et al., 2020).

A ReLU network in standard parametrization is trained on digits by minibatch SGD with the cross-entropy. The kernel of a few
test images is computed at many steps. The distances between these kernels show when it turns, its velocity shows how fast. The
network is linearized at the start and at later steps, and each linearized network trains on the same minibatches to the end. How
far does it get from the run, and how many test images does it recognize?

    python examples/reproductions/late_kernels.py
    python examples/reproductions/late_kernels.py --seeds 0 --width 8 --steps 20 --captures 0 4 --samples 40    # seconds

Reference: S. Fort et al., Deep learning versus kernel learning: an empirical study of loss landscape geometry and the time
evolution of the neural tangent kernel, NeurIPS 2020.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from drawing import COLORS, MARKERS, finish, grid_of_panels, markdown, save
from lightning.pytorch import LightningModule
from ntk_parametrization import mlp
from setting import CLASSES, AtSteps, digits, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor, empirical_ntk
from lightning_ntk.functional import kernel_distance
from lightning_ntk.plots.style import label_plainly, mark_thresholds

PROBE = 24  # test images whose kernel is followed
TEST = 500  # images after those of training


class Classifier(LightningModule):
    """A ReLU network, trained by SGD on the cross-entropy.

    Args:
        width: Units in each hidden layer.
        lr: Learning rate.
        depth: Number of hidden layers.
    """

    def __init__(self, width: int, lr: float, depth: int = 3) -> None:
        super().__init__()
        self.lr = lr
        self.layers = mlp([64, *[width] * depth, CLASSES], nn.ReLU, "standard", sigma_w=math.sqrt(2))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes."""
        logits: Tensor = self.layers(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Kernels(AtSteps):
    """Keeps the kernel of a few images at chosen steps.

    Args:
        images: The images, `(n, 64)`.
        steps: When.
    """

    def __init__(self, images: Tensor, steps: list[int]) -> None:
        super().__init__(steps)
        self.images = images
        self.kernels: dict[int, Tensor] = {}

    def measure(self, step: int, module: LightningModule) -> None:
        """Computes the kernel."""
        self.kernels[step] = empirical_ntk(module, self.images)


class Run:
    """What one run left behind.

    Args:
        seed: Seed of the run.
        kernels: By step.
        monitors: By the step of their capture.
    """

    def __init__(self, seed: int, kernels: dict[int, Tensor], monitors: dict[int, LinearizationMonitor]) -> None:
        self.seed = seed
        self.kernels = kernels
        self.histories = {captured: monitor.history for captured, monitor in monitors.items()}
        pairs = itertools.pairwise(sorted(kernels))
        self.velocity = {math.sqrt(max(a, 1) * b): kernel_distance(kernels[a], kernels[b]) / (b - a) for a, b in pairs}


def labeled(samples: slice) -> TensorDataset:
    """Images of digits and their labels."""
    images, targets = digits(samples.stop).tensors
    return TensorDataset(images[samples], targets.argmax(1)[samples])


def run(options: argparse.Namespace, seed: int, steps: list[int]) -> Run:
    """Trains one network, watched."""
    torch.manual_seed(seed)
    data, test = labeled(slice(0, options.samples)), labeled(slice(options.samples, options.samples + TEST))
    module = Classifier(options.width, options.lr)
    loader = DataLoader(data, batch_size=options.batch_size, shuffle=True, drop_last=True)
    kernels = Kernels(test.tensors[0][:PROBE], steps)
    monitors = {
        captured: LinearizationMonitor(
            data,
            evaluation=test,
            capture_at=captured,
            name=f"from_{captured}",
            taylor=False,
            progress=False,
            strict=True,
        )
        for captured in options.captures
    }
    trainer = quiet_trainer(options.steps, [*monitors.values(), kernels])
    trainer.fit(module, loader)
    return Run(seed, kernels.kernels, monitors)


def log_steps(last: int, per_decade: int = 5) -> list[int]:
    """Roughly logarithmic steps, 0 and the last among them."""
    count = math.ceil(per_decade * math.log10(last) - 0.5)  # none close to the last
    return sorted({0, last} | {round(10 ** (i / per_decade)) for i in range(count)})


def average(values: list[float]) -> float:
    """The mean."""
    return math.fsum(values) / len(values)


def kernel_table(runs: list[Run], steps_per_epoch: int) -> str:
    """Where the kernel is, from the start and from the end, means over seeds."""
    steps = sorted(runs[0].kernels)
    velocities = [average([list(r.velocity.values())[i] for r in runs]) for i in range(len(steps) - 1)]
    lines: list[list[Any]] = []
    for index, step in enumerate(steps):
        from_start = average([kernel_distance(r.kernels[0], r.kernels[step]) for r in runs])
        to_end = average([kernel_distance(r.kernels[step], r.kernels[steps[-1]]) for r in runs])
        velocity = f"{velocities[index - 1] * steps_per_epoch:.3g}" if index else ""
        lines.append([step, f"{step / steps_per_epoch:.2f}", from_start, to_end, velocity])
    header = [
        "step",
        "epoch",
        "distance from the first kernel",
        "distance to the last kernel",
        "velocity since the row above, per epoch",
    ]
    return markdown(header, lines)


def capture_table(runs: list[Run], last: int) -> str:
    """Linearized networks at the end of training, means over seeds."""
    lines: list[list[Any]] = []
    for captured in runs[0].histories:
        final = [r.histories[captured][-1] for r in runs]
        names = (
            "relative_weight_distance",
            "loss",
            "linearized_loss",
            "evaluation/accuracy",
            "evaluation/linearized_accuracy",
        )
        start = average([r.histories[captured][0]["evaluation/accuracy"] for r in runs])
        lines.append([captured, last - captured, start, *(average([row[name] for row in final]) for name in names)])
    header = [
        "captured at", "steps since", "test accuracy then", "relative weight distance at the end", "training loss", "linearized",
        "test accuracy at the end", "linearized",
    ]  # fmt: skip
    return markdown(header, lines)


def draw(runs: list[Run], last: int, steps_per_epoch: int, path: Path) -> None:
    """Distances between all pairs of kernels, velocity, and the linearized networks."""
    figure, axes = grid_of_panels(2, 2)
    steps = sorted(runs[0].kernels)
    distances = [[average([kernel_distance(r.kernels[a], r.kernels[b]) for r in runs]) for a in steps] for b in steps]
    image = axes[0].imshow(distances, origin="lower", cmap="viridis", aspect="auto")
    shown = range(len(steps) - 1, -1, -max(1, len(steps) // 7))
    axes[0].set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes[0].set_yticks(list(shown), [str(steps[i]) for i in shown])
    axes[0].set_xlabel("optimizer step")
    axes[0].set_ylabel("optimizer step")
    axes[0].set_title("How far the kernels of two steps are apart", fontsize=10)
    figure.colorbar(image, ax=axes[0], label=r"kernel distance $1 - \cos(\Theta_s, \Theta_t)$")

    for index, r in enumerate(runs):
        style = {"color": COLORS[index], "marker": MARKERS[index], "markersize": 4, "linewidth": 1}
        axes[1].plot(
            list(r.velocity), [v * steps_per_epoch for v in r.velocity.values()], "-", label=f"seed {r.seed}", **style
        )
    finish(axes[1], "optimizer step", "kernel distance per epoch", title="How fast the kernel turns")

    for index, captured in enumerate(runs[0].histories):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        rows = list(zip(*(r.histories[captured] for r in runs), strict=True))
        since = [row[0]["step"] - captured for row in rows if row[0]["step"] > captured]
        means = [average([x["relative_weight_distance"] for x in row]) for row in rows if row[0]["step"] > captured]
        kept = [(s, m) for s, m in zip(since, means, strict=True) if m > 1e-4]
        axes[2].plot(
            *zip(*kept, strict=True), marker=marker, markersize=4, color=color, label=f"at step {captured}",
        )  # fmt: skip
    finish(
        axes[2],
        "steps since the capture",
        "relative weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\| \,/\, \|w_t - w_s\|$",
        title="Linearized (captured) at a later step",
        legend=None,
    )
    axes[2].legend(loc="lower right", ncols=2, frameon=False, fontsize=8)
    axes[2].set(xlim=(0.7, None), ylim=(0.015, None))  # room for names of the thresholds, and for the legend
    label_plainly(axes[2].yaxis)
    mark_thresholds(axes[2])

    captures = list(runs[0].histories)
    places = range(len(captures))
    for index, (key, place, label) in enumerate((
        ("evaluation/linearized_accuracy", -1, "linearized there, trained to the end"),
        ("evaluation/accuracy", 0, "the network at the capture"),
        ("evaluation/accuracy", -1, "the network at the end"),
    )):  # fmt: skip
        values = [100 * average([r.histories[c][place][key] for r in runs]) for c in captures]
        axes[3].plot(places, values, "-", marker=MARKERS[index], markersize=5, color=COLORS[index], label=label)
    finish(
        axes[3], "step of the capture", "test accuracy (%)", scales="linear-linear",
        title="Test accuracy before and after",
    )  # fmt: skip
    axes[3].set_xticks(list(places), [str(c) for c in captures])
    save(figure, path)


def main() -> None:
    """Runs, prints the tables, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=640, help="steps of SGD")
    parser.add_argument(
        "--captures", type=int, nargs="+", default=[0, 4, 8, 16, 32, 64, 128], help="steps at which to linearize"
    )
    parser.add_argument("--samples", type=int, default=256, help="training images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("reproductions"), help="directory of the figure")
    options = parser.parse_args()
    steps_per_epoch = options.samples // options.batch_size
    runs = [run(options, seed, log_steps(options.steps)) for seed in options.seeds]
    print(
        f"\nEpochs of {steps_per_epoch} steps; means over {len(runs)} seeds\n\n{kernel_table(runs, steps_per_epoch)}\n"
    )
    print(f"{capture_table(runs, options.steps)}\n")
    draw(runs, options.steps, steps_per_epoch, options.output / "late-kernels.svg")


if __name__ == "__main__":
    main()
