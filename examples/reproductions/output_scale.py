"""Lazy training at any width: the slope over the output scale alpha (Chizat et al., 2019).

The output of one network is multiplied by alpha. The learning rate is the same fraction of the largest stable one, so that it
falls as 1 / alpha^2 and the linearized network does the same thing at every alpha. The model is trained twice: centered,
alpha (h(w) - h(w0)), as the theory wants it, and not centered, alpha h(w), where the initial outputs grow with alpha and training
has to undo them. Everything is in float64: at alpha = 1000 weights move by so little that float32 rounds it away.

    python examples/reproductions/output_scale.py
    python examples/reproductions/output_scale.py --scales 1 10 --seeds 0 --width 16 --steps 5 --samples 20    # seconds

Run again, it resumes; with more scales or seeds only those are run.

Reference: L. Chizat, E. Oyallon, F. Bach, On lazy training in differentiable programming, NeurIPS 2019.
"""

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from drawing import draw_power_law, draw_reference, finish, grid_of_panels, markdown, save
from ntk_parametrization import mlp
from setting import CLASSES, FullBatch, digits, fit, max_learning_rate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.plots.style import mark_thresholds
from lightning_ntk.sweep import Results, Sweep

PROBE = 32  # samples of the kernel that is followed
QUANTITIES = {
    "ntk/relative_weight_distance": "relative weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\| \,/\, \|w_t - w_0\|$",
    "ntk/taylor_gap": "Taylor gap",
    "ntk/kernel_change": "kernel change",
    "ntk/relative_displacement": "relative displacement",
}
EXPECTED = -1  # of every one, for the centered model


class Scaled(nn.Module):
    """alpha h(w), or alpha (h(w) - h(w0)).

    Args:
        network: h, at its initial weights.
        alpha: The scale.
        centered: Whether the outputs at initialization are subtracted.
    """

    def __init__(self, network: nn.Module, alpha: float, centered: bool) -> None:
        super().__init__()
        self.trained = network
        self.initial = copy.deepcopy(network).requires_grad_(False) if centered else None
        self.alpha = alpha

    def forward(self, images: Tensor) -> Tensor:
        """Scaled outputs."""
        outputs: Tensor = self.trained(images)
        return self.alpha * (outputs if self.initial is None else outputs - self.initial(images))


def objective(config: dict[str, Any]) -> LinearizationMonitor:
    """Trains one network."""
    torch.manual_seed(config["seed"])
    network = mlp([64, *[config["width"]] * 3, CLASSES], nn.Tanh, sigma_w=1.5, sigma_b=0.1)
    model = Scaled(network, config["alpha"], config["centered"]).double()
    data = TensorDataset(*(tensor.double() for tensor in digits(config["samples"]).tensors))
    module = FullBatch(model, config["fraction"] * max_learning_rate(model, data))
    monitor = LinearizationMonitor(steps=[0], progress=False, strict=True)
    fit(module, data, config["steps"], [monitor])
    training = monitor.training
    assert training is not None
    probe = KernelProbe(training.linearization, training.reference, samples=PROBE)
    last = monitor.history[-1]
    last.update(probe.compare(probe.kernel({name: w for name, w in module.named_parameters() if w.requires_grad})))
    size = sum(float(weight.square().sum()) for weight in training.initial_weights.values()) ** 0.5
    last["relative_displacement"] = last["displacement"] / size
    return monitor


def points(results: Results, y: str, centered: bool) -> list[tuple[float, float]]:
    """(alpha, y at the last step) of all seeds."""
    return [(row["alpha"], row[y]) for row in results.where({"centered": centered}).final]


def table(results: Results) -> str:
    """Slopes with 95 % intervals."""
    lines = []
    for y, centered in itertools.product(QUANTITIES, (True, False)):
        law = results.slope("alpha", y, where={"centered": centered})
        kind = "centered" if centered else "not centered"
        interval = f"{law.slope:.3f} [{law.low:.3f}, {law.high:.3f}]"
        lines.append([y.removeprefix("ntk/").replace("_", " "), kind, interval, f"{EXPECTED}" if centered else "none"])
    return markdown(["quantity", "model", "slope over alpha", "stated"], lines)


def means(results: Results) -> str:
    """The relative weight distance and both losses, means over seeds."""
    lines: list[list[Any]] = []
    rows = results.final
    for alpha, centered in itertools.product(sorted({row["alpha"] for row in rows}), (True, False)):
        kept = [row for row in rows if row["alpha"] == alpha and row["centered"] == centered]
        names = ("ntk/relative_weight_distance", "ntk/loss", "ntk/linearized_loss")
        cells = [sum(row[name] for row in kept) / len(kept) for name in names]
        lines.append([f"{alpha:g}", "centered" if centered else "not centered", *cells])
    return markdown(["alpha", "model", "relative weight distance", "loss", "linearized loss"], lines)


def draw(results: Results, path: Path) -> None:
    """The relative weight distance of both models; the other quantities of the centered one."""
    figure, axes = grid_of_panels(1, 2)
    (first, label), *rest = QUANTITIES.items()
    for index, (centered, name) in enumerate(((True, "centered"), (False, "not centered"))):
        draw_power_law(axes[0], points(results, first, centered), name, index, filled=centered)
    draw_reference(axes[0], points(results, first, True), EXPECTED, offset=0.5)
    finish(axes[0], r"output scale $\alpha$", label, title="Both models", legend="lower left")
    mark_thresholds(axes[0])
    for index, (y, name) in enumerate(rest):
        draw_power_law(axes[1], points(results, y, True), name, index + 2, filled=index != 1)
    draw_reference(axes[1], points(results, rest[-1][0], True), EXPECTED, offset=0.5)
    finish(axes[1], r"output scale $\alpha$", "relative size", title="Centered model", legend="upper right")
    figure.suptitle("Slopes over the output scale with 95 % intervals; dotted: the stated slope −1", fontsize=11)
    save(figure, path)


def main() -> None:
    """Runs what is missing, prints the tables, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 3, 10, 30, 100, 300, 1000], help="alpha")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="steps of gradient descent")
    parser.add_argument("--samples", type=int, default=128, help="images")
    parser.add_argument("--fraction", type=float, default=0.5, help="learning rate over the largest stable one")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one")
    parser.add_argument(
        "--output", type=Path, default=Path("reproductions"), help="directory of tables, figures, storage"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = {
        "width": options.width, "steps": options.steps, "samples": options.samples, "fraction": options.fraction,
    }  # fmt: skip
    grid = {"alpha": options.scales, "centered": [True, False], "seed": options.seeds}
    grid |= {name: [value] for name, value in chosen.items()}
    storage = options.output / "output_scale.journal"
    sweep = Sweep(objective, grid, storage=storage, name="output_scale", logs=options.output / "logs")
    sweep.run(workers=options.workers)
    results = sweep.results.where(chosen)
    results.to_csv(options.output / "output_scale.csv")
    print(f"\nWidth {options.width}, {options.steps} steps\n\n{table(results)}\n\n{means(results)}\n")
    draw(results, options.output / "output-scale.svg")


if __name__ == "__main__":  # worker processes import this file
    main()
