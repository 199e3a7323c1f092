"""Through the edge: learning rates around the largest stable one of the linearized network (Lewkowycz et al., 2020).

A network with one hidden layer is trained with learning rates from a tenth of the largest stable one, 2 / (c lambda_max), to
twice that. Below it the linearized network converges and describes the run. Above it the linearized network diverges; the network
itself may catapult: its loss rises, then falls in a flatter place, where the largest eigenvalue of its kernel has come down. The
learning rate over the largest stable one *of the kernel at the last step* shows it.

    python examples/reproductions/learning_rate.py
    python examples/reproductions/learning_rate.py --fractions 0.5 1.2 --seeds 0 --width 16 --steps 5 --samples 20    # seconds

Run again, it resumes. In float64, in which a diverging linearized network stays a number.

Reference: A. Lewkowycz, Y. Bahri, E. Dyer, J. Sohl-Dickstein, G. Gur-Ari, The large learning rate phase of deep learning: the
catapult mechanism, 2020.
"""

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from drawing import COLORS, MARKERS, draw_limit, finish, grid_of_panels, markdown, save
from ntk_parametrization import mlp
from setting import CLASSES, FullBatch, digits, fit, max_learning_rate
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.sweep import Results, Sweep

PROBE = 32  # samples of the kernel that is followed
ACTIVATIONS = {"tanh": (nn.Tanh, 1.5), "relu": (nn.ReLU, math.sqrt(2))}  # with sigma_w
DISTANCE, RMSE, EDGE = "ntk/relative_weight_distance", "ntk/relative_rmse", "ntk/rate_over_final_limit"
SHOWN = (0.6, 0.97, 1.1, 1.5, 2.0)  # fractions whose losses are drawn
# A difference of the predictions of half of what they changed is no description any more.
DESCRIBED = 0.5


def objective(config: dict[str, Any]) -> LinearizationMonitor:
    """Trains one network."""
    torch.manual_seed(config["seed"])
    activation, sigma_w = ACTIVATIONS[config["activation"]]
    network = mlp([64, config["width"], CLASSES], activation, sigma_w=sigma_w, sigma_b=0.1).double()
    data = TensorDataset(*(tensor.double() for tensor in digits(config["samples"]).tensors))
    module = FullBatch(network, config["fraction"] * max_learning_rate(network, data))
    monitor = LinearizationMonitor(steps="log", progress=False, strict=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the largest for which")  # which is what is looked at
        fit(module, data, config["steps"], [monitor])
    training, last = monitor.training, monitor.history[-1]
    assert training is not None
    with torch.no_grad():
        change = (module(data.tensors[0]) - training.initial_predictions).square().mean().sqrt()
    last["relative_rmse"] = last["prediction_rmse"] / float(change)
    last["highest_loss"] = max(row["loss"] for row in monitor.history) / monitor.history[0]["loss"]
    if math.isfinite(last["loss"]):
        probe = KernelProbe(training.linearization, training.reference, samples=PROBE)
        last.update(probe.compare(probe.kernel(dict(module.named_parameters()))))
        last["rate_over_final_limit"] = module.lr / max_learning_rate(network, data)
    return monitor


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Geometric mean over the rows that have it; infinity where a run diverged."""
    values = [row.get(name, math.inf) for row in rows]
    return math.exp(math.fsum(math.log(v) for v in values) / len(values)) if max(values) < math.inf else math.inf


def table(results: Results, activation: str) -> str:
    """Geometric means over seeds."""
    names = ["ntk/highest_loss", "ntk/loss", "ntk/linearized_loss", RMSE, DISTANCE, "ntk/kernel_change", EDGE]
    lines: list[list[Any]] = []
    rows = results.where({"activation": activation}).final
    for fraction in sorted({row["fraction"] for row in rows}):
        kept = [row for row in rows if row["fraction"] == fraction]
        lines.append([f"{fraction:g}", *(mean(kept, name) for name in names)])
    header = [
        "lr / max", "highest loss / initial", "final loss", "linearized loss", "prediction difference / change",
        "relative weight distance", "kernel change", "lr / max at the end",
    ]  # fmt: skip
    return markdown(header, lines)


def describe_until(results: Results, activation: str) -> str:
    """The largest fraction up to which the linearized network describes the run, for every seed."""
    rows = results.where({"activation": activation}).final
    fractions = sorted({row["fraction"] for row in rows})
    good = [all(row[RMSE] < DESCRIBED for row in rows if row["fraction"] == f) for f in fractions]
    first_bad = good.index(False) if False in good else len(good)
    if first_bad == 0:
        return f"{activation}: at no learning rate the predictions differ by less than {DESCRIBED:g} of their change."
    after = f", and no longer at {fractions[first_bad]:g}" if first_bad < len(good) else ""
    return (
        f"{activation}: the linearized predictions differ by less than {DESCRIBED:g} of what they changed up to lr / max = "
        f"{fractions[first_bad - 1]:g}{after}."
    )


def draw(results: Results, path: Path) -> None:
    """Differences over the learning rate, losses over steps, and what became of the largest eigenvalue."""
    figure, axes = grid_of_panels(1, 3, width=4.5)
    for index, activation in enumerate(ACTIVATIONS):
        rows = sorted(results.where({"activation": activation}).final, key=lambda row: row["fraction"])
        name = {"relu": "ReLU"}.get(activation, activation)
        for axis, y, label, style in (
            (axes[0], RMSE, f"predictions, {name}", "-"),
            (axes[0], DISTANCE, f"weights, {name}", "--"),
            (axes[2], EDGE, name, "-"),
        ):
            fractions = sorted({row["fraction"] for row in rows})
            values = [mean([row for row in rows if row["fraction"] == f], y) for f in fractions]
            axis.plot(
                fractions, values, style, marker=MARKERS[index], color=COLORS[index], markersize=4.5, label=label,
                markerfacecolor=COLORS[index] if style == "-" else "none",
            )  # fmt: skip
    values = [row[y] for row in results.final for y in (RMSE, DISTANCE) if 0 < row[y] < math.inf]
    # Above the edge it grows without bound.
    axes[0].set(xlim=(0.55, 1.3), ylim=(min(values) / 2, 1e4))
    draw_limit(axes[0], DESCRIBED, f"described below {DESCRIBED:g}")
    every = [row for row in results.rows if row["activation"] == "relu"]
    seed = min(row["seed"] for row in every)
    for index, fraction in enumerate(f for f in SHOWN if any(row["fraction"] == f for row in every)):
        rows = [row for row in every if row["fraction"] == fraction and row["seed"] == seed and row["step"] > 0]
        steps = [row["step"] for row in rows]
        color = COLORS[index]
        axes[1].plot(steps, [row["ntk/loss"] for row in rows], color=color, label=f"lr / max = {fraction:g}")
        axes[1].plot(steps, [row["ntk/linearized_loss"] for row in rows], "--", color=color)
    axes[1].plot([], [], "--", color="#555555", label="linearized")
    highest = max((row["ntk/loss"] for row in every if math.isfinite(row["ntk/loss"])), default=1.0)
    lowest = min((row["ntk/loss"] for row in every), default=1.0)
    axes[1].set_ylim(lowest / 30, 10 * highest)
    x = "learning rate / largest stable one at initialization"
    for axis in (axes[0], axes[2]):
        draw_limit(axis, 1, "edge at initialization", vertical=True)
    draw_limit(axes[2], 1, "edge at the end")
    finish(
        axes[0], x, "difference of both networks\n/ change of the trained one", scales="linear-log",
        title="The linearized network leaves at the edge", legend="upper left",
    )  # fmt: skip
    finish(axes[1], "optimizer step", "loss", title="Losses over steps, ReLU, one seed", legend="lower left")
    finish(
        axes[2], x, "learning rate / largest stable one at the end", scales="linear-linear",
        title="The trained network ends below its edge", legend="center",
    )  # fmt: skip
    save(figure, path)


def main() -> None:
    """Runs what is missing, prints the tables, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fractions = [0.1, 0.3, 0.6, 0.9, 0.97, 1.0, 1.03, 1.1, 1.25, 1.5, 1.75, 2.0]
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=fractions, help="learning rate over the largest stable one"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150, help="steps of gradient descent")
    parser.add_argument("--samples", type=int, default=128, help="images")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one")
    parser.add_argument(
        "--output", type=Path, default=Path("reproductions"), help="directory of tables, figures, storage"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = {"width": options.width, "steps": options.steps, "samples": options.samples}
    grid = {"fraction": options.fractions, "activation": list(ACTIVATIONS), "seed": options.seeds}
    grid |= {name: [value] for name, value in chosen.items()}
    storage = options.output / "learning_rate.journal"
    sweep = Sweep(objective, grid, storage=storage, name="learning_rate", logs=options.output / "logs")
    sweep.run(workers=options.workers)
    results = sweep.results.where(chosen)
    results.to_csv(options.output / "learning_rate.csv")
    for activation in ACTIVATIONS:
        print(f"\n{activation}, width {options.width}, {options.steps} steps\n\n{table(results, activation)}\n")
        print(describe_until(results, activation))
    draw(results, options.output / "learning-rate.svg")


if __name__ == "__main__":  # worker processes import this file
    main()
