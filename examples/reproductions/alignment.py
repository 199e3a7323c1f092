"""Which layers align with the labels (Baratin et al., 2021).

A deep ReLU network learns digits by minibatch SGD on the cross-entropy. The tangent kernel is a sum with one term for each layer.
The centered alignment of each with the labels is measured on 32 training images by the panel of regimes, without a kernel.

    python examples/reproductions/alignment.py
    python examples/reproductions/alignment.py --seeds 0 --depth 2 --width 8 --steps 20 --samples 64    # seconds

Reference: A. Baratin et al., Implicit regularization via neural feature alignment, AISTATS 2021, arXiv:2008.00938.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from drawing import COLORS, MARKERS, finish, grid_of_panels, markdown, one_legend, save
from late_kernels import Classifier, average, labeled, log_steps
from setting import quiet_trainer
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots.style import step_axis

KINDS = ("centered_alignment", "alignment")
History = list[dict[str, float]]


def run(options: argparse.Namespace, seed: int) -> History:
    """Trains one network, watched."""
    torch.manual_seed(seed)
    module = Classifier(options.width, options.lr, options.depth)
    loader = DataLoader(labeled(slice(0, options.samples)), batch_size=32, shuffle=True, drop_last=True)
    monitor = LinearizationMonitor(
        steps=log_steps(options.steps, per_decade=4), dynamics="twin", taylor=False, regime=True, progress=False, strict=True
    )  # fmt: skip
    quiet_trainer(options.steps, [monitor]).fit(module, loader)
    return monitor.history


def layers_of(history: History) -> list[str]:
    """The layers, in the order of the network."""
    start, end = "regime/layer/", "/alignment"
    return [
        key.removeprefix(start).removesuffix(end) for key in history[0] if key.startswith(start) and key.endswith(end)
    ]


def mean(runs: list[History], index: int, name: str) -> float:
    """The mean over seeds at one measurement."""
    return average([history[index][f"regime/{name}"] for history in runs])


def table(runs: list[History]) -> str:
    """Alignments at initialization and at the end, means over seeds, and by how much they grew for each seed."""
    lines: list[list[Any]] = []
    for place, name in enumerate(["", *layers_of(runs[0])]):
        line: list[Any] = [f"layer {place}" if name else "all"]
        for kind in KINDS:
            key = f"layer/{name}/{kind}" if name else kind
            growth = [history[-1][f"regime/{key}"] / history[0][f"regime/{key}"] for history in runs]
            low, high = f"{min(growth):.2f}", f"{max(growth):.2f}"
            half = average([(h[-1][f"regime/{key}_high"] - h[-1][f"regime/{key}_low"]) / 2 for h in runs])
            line += [f"{mean(runs, 0, key):.3f}", f"{mean(runs, -1, key):.3f} ± {half:.3f}", f"{low} to {high}"]
        lines.append(line)
    header = [
        "kernel of",
        *(
            f"{'centered' if k == KINDS[0] else 'not centered'}, {w}"
            for k in KINDS
            for w in ("first", "last", "last / first")
        ),
    ]
    return markdown(header, lines)


def draw(runs: list[History], path: Path) -> None:
    """Alignments over steps, centered and not, means over seeds, a curve for each layer."""
    figure, axes = grid_of_panels(1, len(KINDS), sharey=True)
    steps = [row["step"] for row in runs[0]]
    for axis, kind in zip(axes, KINDS, strict=True):
        for place, name in enumerate(layers_of(runs[0])):
            values = [mean(runs, index, f"layer/{name}/{kind}") for index in range(len(steps))]
            color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
            axis.plot(
                steps, values, "-", color=color, marker=marker, markersize=4, linewidth=1.2, label=f"layer {place + 1}"
            )
        values = [mean(runs, index, kind) for index in range(len(steps))]
        axis.plot(steps, values, "--", color="#000000", linewidth=1.5, label="all")
        title = "Centered" if kind.startswith("centered") else "Not centered"
        finish(axis, "", "", scales="linear-linear", title=title, legend=None)
        step_axis(axis, steps)
    axes[0].set_ylabel("alignment of kernel and labels")
    axes[0].set_ylim(bottom=0)
    one_legend(figure, axes[0])
    save(figure, path)


def main() -> None:
    """Runs, prints the table, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=5, help="hidden layers")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=400, help="of SGD, with batches of 32")
    parser.add_argument("--samples", type=int, default=500, help="training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("reproductions"), help="directory of the figure")
    options = parser.parse_args()
    runs = [run(options, seed) for seed in options.seeds]
    losses = ", ".join(f"{history[-1]['loss']:.2g}" for history in runs)
    print(f"\nAlignments, means over {len(runs)} seeds; training losses at the end: {losses}\n\n{table(runs)}\n")
    draw(runs, options.output / "alignment.svg")


if __name__ == "__main__":
    main()
