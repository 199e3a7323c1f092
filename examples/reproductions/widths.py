"""Wide networks move along their tangent space: slopes over the width (Lee et al., 2019).

Networks with three hidden layers, tanh and ReLU, in NTK and in standard parametrization, are trained by full-batch gradient
descent on images of digits, each with the same fraction of its own largest stable learning rate for the same number of steps.
Then these are compared over the width:

* how far the weights are from those of the linearized network, relative to how far they moved,
* the part of the change of the outputs that is not first order in the weights (Taylor gap),
* the change of the kernel, relative to the initial one,
* the change of the weights of the input, the hidden and the output layers, relative to the initial ones.

    python examples/reproductions/widths.py
    python examples/reproductions/widths.py --widths 16 32 --seeds 0 --steps 5 --samples 20    # seconds

Run again, it resumes; with more widths or seeds only those are run.

Reference: J. Lee et al., Wide neural networks of any depth evolve as linear models under gradient descent, NeurIPS 2019.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from drawing import COLORS, draw_power_law, draw_reference, finish, grid_of_panels, markdown, number, save
from ntk_parametrization import mlp
from setting import CLASSES, FullBatch, digits, fit, max_learning_rate
from torch import Tensor, nn

from lightning_ntk import LinearizationMonitor
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.plots.style import label_at, label_plainly, mark_thresholds
from lightning_ntk.sweep import Results, Sweep, log_log_slope

ACTIVATIONS = {"tanh": (nn.Tanh, 1.5), "relu": (nn.ReLU, math.sqrt(2))}  # with sigma_w
SIGMA_B = 0.1
PROBE = 32  # samples of the kernel that is followed
GROUPS = {"input": (0,), "hidden": (2, 4), "output": (6,)}  # places of the linear layers
STEPS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)

DISTANCE, GAP, CHANGE = "ntk/relative_weight_distance", "ntk/taylor_gap", "ntk/kernel_change"
LAYERS = {f"ntk/change/{group}": f"{group} weights" for group in GROUPS}
LABELS = {
    DISTANCE: "relative weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\| \,/\, \|w_t - w_0\|$",
    GAP: "Taylor gap\n" r"$\|f_t - f_0 - J(w_t - w_0)\| \,/\, \|f_t - f_0\|$",
    CHANGE: "kernel change\n" r"$\|\Theta_t - \Theta_0\| \,/\, \|\Theta_0\|$",
}
# Exponents of the width. In standard parametrization the learning rate falls as 1 / width, and input weights with it.
EXPECTED: dict[str, dict[str, float]] = {
    "ntk/change/input": {"ntk": -0.5, "standard": -1.5},
    "ntk/change/hidden": {"ntk": -1, "standard": -1},
    "ntk/change/output": {"ntk": -0.5, "standard": -0.5},
}
# The theorem wants a smooth activation. The derivative of ReLU jumps, and a heuristic count of the jumps gives: preactivations
# move by n^(-1/2), so that a share n^(-1/2) of all units changes sign. Squares of what they change add up to n^(-1/4) in the
# weights; with random signs they leave n^(-3/4) in outputs and kernel.
EXPECTED_DISTANCES: dict[str, dict[str, float]] = {
    DISTANCE: {"tanh": -0.5, "relu": -0.25},
    GAP: {"tanh": -1, "relu": -0.75},
    CHANGE: {"tanh": -1, "relu": -0.75},
}  # fmt: skip


def relative_changes(network: nn.Sequential, initial: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the change of the weights of each group of layers over the norm of the initial ones."""
    changes = {}
    for group, places in GROUPS.items():
        pairs = [(network.get_parameter(f"{i}.linear.weight"), initial[f"network.{i}.linear.weight"]) for i in places]
        change = math.hypot(*((now - before).norm().item() for now, before in pairs))
        changes[f"change/{group}"] = change / math.hypot(*(before.norm().item() for _, before in pairs))
    return changes


def objective(config: dict[str, Any]) -> LinearizationMonitor:
    """Trains one network."""
    torch.manual_seed(config["seed"])
    activation, sigma_w = ACTIVATIONS[config["activation"]]
    sizes = [64, *[config["width"]] * 3, CLASSES]
    network = mlp(sizes, activation, config["parametrization"], sigma_w=sigma_w, sigma_b=SIGMA_B)
    data = digits(config["samples"])
    module = FullBatch(network, config["fraction"] * max_learning_rate(network, data))
    monitor = LinearizationMonitor(steps=[s for s in STEPS if s < config["steps"]], progress=False, strict=True)
    fit(module, data, config["steps"], [monitor])
    training = monitor.training
    assert training is not None
    probe = KernelProbe(training.linearization, training.reference, samples=PROBE)
    monitor.history[-1].update(probe.compare(probe.kernel(dict(module.named_parameters()))))
    monitor.history[-1].update(relative_changes(network, training.initial_weights))
    return monitor


def points(results: Results, y: str, **where: Any) -> list[tuple[float, float]]:
    """(width, y at the last step) of all seeds."""
    return [(row["width"], row[y]) for row in results.where(where).final]


def local_slopes(pairs: list[tuple[float, float]]) -> str:
    """Slopes between means of successive widths."""
    widths = sorted({x for x, _ in pairs})
    means = {w: math.fsum(math.log(y) for x, y in pairs if x == w) / sum(x == w for x, _ in pairs) for w in widths}
    slopes = [(means[b] - means[a]) / math.log(b / a) for a, b in itertools.pairwise(widths)]
    return ", ".join(number(slope) for slope in slopes)


def slope(pairs: list[tuple[float, float]]) -> str:
    """Least squares in log-log axes, with the 95 % interval."""
    law = log_log_slope([x for x, _ in pairs], [y for _, y in pairs])
    return f"{number(law.slope)} [{number(law.low)}, {number(law.high)}]"


def table(results: Results, parametrization: str) -> str:
    """Slopes with 95 % intervals, over all and over wide networks only, between successive widths, and what is expected."""
    lines = []
    for y, activation in itertools.product([*LABELS, *LAYERS], ACTIVATIONS):
        pairs = points(results, y, parametrization=parametrization, activation=activation)
        widths = sorted({x for x, _ in pairs})
        wide = [(x, value) for x, value in pairs if x >= widths[len(widths) // 3]]
        expected = EXPECTED[y][parametrization] if y in EXPECTED else EXPECTED_DISTANCES[y][activation]
        name = y.removeprefix("ntk/").replace("_", " ")
        lines.append([name, activation, slope(pairs), slope(wide), local_slopes(pairs), f"{expected:g}"])
    header = [
        "quantity", "activation", "slope over width", "without the narrowest third", "between successive widths", "expected",
    ]  # fmt: skip
    return markdown(header, lines)


def step_table(results: Results) -> str:
    """How slopes depend on how long was trained."""
    lines: list[list[str]] = []
    for step in sorted({row["step"] for row in results.rows if row["step"] > 0}):
        cells = [f"{step:.0f}"]
        for y, activation in itertools.product((DISTANCE, GAP), ACTIVATIONS):
            cells.append(str(results.slope("width", y, where={"activation": activation}, step=step)))
        lines.append(cells)
    names = [f"{y.removeprefix('ntk/').replace('_', ' ')}, {a}" for y in (DISTANCE, GAP) for a in ACTIVATIONS]
    return markdown(["steps", *names], lines)


def draw(results: Results, parametrization: str, path: Path) -> None:
    """One panel for each distance, one for the layers of the tanh network."""
    figure, axes = grid_of_panels(2, 2)
    name = "NTK parametrization" if parametrization == "ntk" else "Standard parametrization"
    for axis, (y, label) in zip(axes, LABELS.items(), strict=False):
        for index, activation in enumerate(ACTIVATIONS):
            pairs = points(results, y, parametrization=parametrization, activation=activation)
            draw_power_law(axis, pairs, {"relu": "ReLU"}.get(activation, activation), index)
            draw_reference(axis, pairs, EXPECTED_DISTANCES[y][activation], color=COLORS[index])
        finish(axis, "width", label)
        label_at(axis, {x for x, _ in pairs})
        label_plainly(axis.yaxis)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(low / 2, 2 * high)  # room for the names of the thresholds
    mark_thresholds(axes[0])
    for index, (y, label) in enumerate(LAYERS.items()):
        pairs = points(results, y, parametrization=parametrization, activation="tanh")
        draw_power_law(axes[3], pairs, label, index + 2)
        draw_reference(axes[3], pairs, EXPECTED[y][parametrization], color=COLORS[index + 2])
    finish(axes[3], "width", "change of weights, tanh\n" r"$\|W_t - W_0\| \,/\, \|W_0\|$", legend="lower left")
    label_at(axes[3], {x for x, _ in pairs})
    axes[3].set_ylim(bottom=axes[3].get_ylim()[0] / 5)  # room for the legend
    figure.suptitle(f"{name}: slopes over the width with 95 % intervals; dotted: the expected slopes", fontsize=11)
    save(figure, path)


def main() -> None:
    """Runs what is missing, prints the tables, draws the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50, help="steps of gradient descent")
    parser.add_argument("--samples", type=int, default=128, help="images")
    parser.add_argument("--fraction", type=float, default=0.5, help="learning rate over the largest stable one")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one")
    parser.add_argument(
        "--output", type=Path, default=Path("reproductions"), help="directory of tables, figures, storage"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    grid = {
        "width": sorted(options.widths, reverse=True),  # the longest first, so that workers finish together
        "parametrization": ["ntk", "standard"],
        "activation": list(ACTIVATIONS),
        "seed": options.seeds,
        "steps": [options.steps],
        "samples": [options.samples],
        "fraction": [options.fraction],
    }
    sweep = Sweep(
        objective, grid, storage=options.output / "widths.journal", name="widths", logs=options.output / "logs"
    )
    sweep.run(workers=options.workers)
    chosen = {"steps": options.steps, "samples": options.samples, "fraction": options.fraction}
    results = sweep.results.where(chosen)
    results.to_csv(options.output / "widths.csv")
    for parametrization in ("ntk", "standard"):
        print(f"\n{parametrization} parametrization, {options.steps} steps\n\n{table(results, parametrization)}")
        draw(results, parametrization, options.output / f"widths-{parametrization}.svg")
    print("\nntk parametrization, slopes over the width after fewer steps\n")
    print(step_table(results.where({"parametrization": "ntk"})))


if __name__ == "__main__":  # worker processes import this file
    main()
