"""Error bounds on random problems, against the linearized network in extended precision.

The reference is the explicit Jacobian of a small network and the optimizer's recurrence, both in `numpy.longdouble`: 64 bits
of mantissa on x86. Run as `python benchmarks/bounds.py 2000` for the shares of bounds that hold and of those that are sharp.
"""

import argparse
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.dynamics.sgd import SGDSettings

Array = NDArray[np.longdouble]


class Patches(nn.Module):
    """The 2 x 2 patches of 4 x 4 images."""

    def forward(self, inputs: Tensor) -> Tensor:
        """From images `(B, 16)` to patches `(B, 9, 4)`."""
        return nn.functional.unfold(inputs.reshape(-1, 1, 4, 4), 2).mT


class Network(nn.Module):
    """Linear layers with an activation between them; the first one may act on patches, which makes it a convolution."""

    def __init__(self, sizes: Sequence[int], outputs: int, activation: str, *, convolution: bool) -> None:
        super().__init__()
        self.convolution, self.activation = convolution, activation
        widths = list(sizes)
        layers = []
        if convolution:
            layers.append(nn.Linear(4, widths[1]))
            widths = [9 * widths[1], *widths[2:]]
        layers += [nn.Linear(a, b) for a, b in zip(widths, [*widths[1:], outputs], strict=True)]
        self.layers = nn.ModuleList(layers)
        self.patches = Patches()

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs `(B, K)`."""
        values = self.patches(inputs) if self.convolution else inputs
        for number, layer in enumerate(self.layers):
            if number:
                values = (values.tanh() if self.activation == "tanh" else values.relu()).flatten(1)
            values = layer(values)
        return values.flatten(1)


def explicit(network: Network, inputs: Tensor) -> tuple[Array, Array]:
    """The outputs `(N K,)` and the Jacobian `(N K, P)` in extended precision, by hand."""
    weights = [(wide(layer.weight), wide(layer.bias)) for layer in network.layers]  # type: ignore[arg-type]
    # Inputs of every layer as (N, L, d), with L > 1 positions in a convolution only.
    values = wide(network.patches(inputs) if network.convolution else inputs.unsqueeze(1))
    entering, slopes = [], []
    for number, (weight, bias) in enumerate(weights):
        if number:
            slope = 1 - np.tanh(values) ** 2 if network.activation == "tanh" else (values > 0).astype(np.longdouble)
            slopes.append(slope)
            values = np.tanh(values) if network.activation == "tanh" else np.maximum(values, 0)
            values = values.reshape(len(values), 1, -1)
        entering.append(values)
        values = np.einsum("nld,cd->nlc", values, weight) + bias
    samples, outputs = len(values), values.shape[2]
    delta = np.broadcast_to(np.eye(outputs, dtype=np.longdouble), (samples, outputs, outputs))[:, :, None, :]
    blocks: list[Array] = []
    for number in reversed(range(len(weights))):
        gradient = np.einsum("nklc,nld->nkcd", delta, entering[number])
        rows = samples * outputs
        blocks = [gradient.reshape(rows, -1), delta.sum(2).reshape(rows, -1), *blocks]
        if number:
            delta = np.einsum("nklc,cd->nkld", delta, weights[number][0])
            slope = slopes[number - 1]
            delta = delta.reshape(samples, outputs, slope.shape[1], slope.shape[2]) * slope[:, None]
    return values.reshape(-1), np.concatenate(blocks, axis=1)


def wide(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


class Carried(NamedTuple):
    """A vector of weights with coefficients of its own: the decaying w0, or an old momentum buffer."""

    vector: Array
    weight: float
    buffer: float


class Reference:
    """Linearized training in extended precision.

    The state holds the coefficients of J^T and of the carried vectors in the weights and in the momentum buffer, and 1: a
    step is a matrix, and equal steps are a power of it.
    """

    def __init__(self, jacobian: Array, residual: Array, factor: float, carried: Sequence[Carried]) -> None:
        self.jacobian, self.kernel, self.residual = jacobian, jacobian @ jacobian.T, residual
        self.factor, self.carried = np.longdouble(factor), carried
        self.rows = len(residual)

    def descent(self, steps: Sequence[tuple[SGDSettings, int]], *, toward_start: bool) -> Array:
        """The displacement w - w0 after steps of SGD, given with their numbers."""
        state = self._start()
        first = not any(vector.buffer for vector in self.carried)
        for settings, count in steps:
            if first and settings.momentum and count:
                state = self._step(settings, toward_start=toward_start, first=True) @ state
                count, first = count - 1, False
            state = power(self._step(settings, toward_start=toward_start), count, state)
        return self._displacement(state)

    def flow(self, time: float, ridge: float) -> Array:
        """The displacement after gradient flow."""
        generator = -self._gradient()
        size, count = self.rows, len(self.carried)
        for row in range(size + count):
            generator[row, row] -= np.longdouble(ridge)
        for row, vector in enumerate(self.carried, start=size):
            generator[row, -1] -= np.longdouble(ridge) * np.longdouble(vector.weight)
        scale = max(0, math.ceil(math.log2(max(float(np.abs(generator).sum(1).max()) * time, 1e-30)))) + 4
        small = generator * (np.longdouble(time) / np.longdouble(2) ** scale)
        term: Array = np.eye(len(generator), dtype=np.longdouble)
        total = term
        for order in range(1, 16):
            term = (term @ small / order).astype(np.longdouble)
            total = total + term
        return self._displacement(power(total, 2**scale, self._start()))

    def limit(self, ridge: float, changes: Sequence[float]) -> Array:
        """The displacement at t = infinity, by Gaussian elimination."""
        target = self.residual.copy()
        for vector, change in zip(self.carried, changes, strict=True):
            target += np.longdouble(change) * (self.jacobian @ vector.vector)
        matrix = self.kernel + np.longdouble(ridge) * np.eye(self.rows, dtype=np.longdouble)
        displacement = -self.jacobian.T @ solve(matrix, target)
        for vector, change in zip(self.carried, changes, strict=True):
            displacement += np.longdouble(change) * vector.vector
        return displacement

    def _start(self) -> Array:
        # [a, s, b, p, 1]: weights and then buffers; the s are changes of the coefficients.
        zeros = np.zeros(self.rows, dtype=np.longdouble)
        buffers = np.array([vector.buffer for vector in self.carried], dtype=np.longdouble)
        return np.concatenate([zeros, 0 * buffers, zeros, buffers, np.ones(1, dtype=np.longdouble)])

    def _gradient(self) -> Array:
        """The loss gradient over c as a matrix on [a, s, b, p, 1], its rows those of [a, s]; the others are zero."""
        size, count = self.rows, len(self.carried)
        width = 2 * (size + count) + 1
        gradient = np.zeros((width, width), dtype=np.longdouble)
        gradient[:size, :size] = self.kernel
        for column, vector in enumerate(self.carried, start=size):
            gradient[:size, column] = self.jacobian @ vector.vector
        gradient[:size, -1] = self.residual
        return gradient

    def _step(self, settings: SGDSettings, *, toward_start: bool, first: bool = False) -> Array:
        inner = self.rows + len(self.carried)
        lr, momentum, dampening, decay = (
            np.longdouble(v) for v in (settings.lr, settings.momentum, settings.dampening, settings.weight_decay)
        )
        identity = np.eye(2 * inner + 1, dtype=np.longdouble)
        gradient = (self.factor * self._gradient())[:inner]
        # The weights themselves: their coefficients, which for carried vectors start at `weight`.
        weights = identity[:inner].copy()
        if not toward_start:
            for row, vector in enumerate(self.carried, start=self.rows):
                weights[row, -1] = vector.weight
        if not settings.decoupled_weight_decay:
            gradient = gradient + decay * weights
        old = identity[inner : 2 * inner]
        buffer = gradient if first or not momentum else momentum * old + (1 - dampening) * gradient
        moved = gradient + momentum * buffer if settings.nesterov else buffer
        shrunk = lr * decay * weights if settings.decoupled_weight_decay else 0 * weights
        result = identity.copy()
        result[:inner] = identity[:inner] - shrunk - lr * moved
        result[inner : 2 * inner] = buffer if momentum else old
        return result

    def _displacement(self, state: Array) -> Array:
        displacement = self.jacobian.T @ state[: self.rows]
        for position, vector in enumerate(self.carried, start=self.rows):
            displacement += state[position] * vector.vector
        return displacement


def power(matrix: Array, exponent: int, state: Array) -> Array:
    """`matrix^exponent state` by repeated squaring."""
    while exponent:
        if exponent & 1:
            state = matrix @ state
        exponent >>= 1
        if exponent:
            matrix = matrix @ matrix
    return state


def solve(matrix: Array, target: Array) -> Array:
    """Gaussian elimination without pivots, for a positive definite matrix."""
    matrix, target = matrix.copy(), target.copy()
    for row in range(len(matrix)):
        factors = matrix[row + 1 :, row] / matrix[row, row]
        matrix[row + 1 :] -= factors[:, None] * matrix[row]
        target[row + 1 :] -= factors * target[row]
    for row in reversed(range(len(matrix))):
        target[row] = (target[row] - matrix[row, row + 1 :] @ target[row + 1 :]) / matrix[row, row]
    return target


@dataclass
class Problem:
    """A random problem: a network, its data, a way to train it and a way to solve it.

    Attributes:
        times: When to look, None for infinity.
        options: Those of `LinearizedTraining` but for the learning rate.
        fraction: The learning rate, in units of the largest stable one.
        cosine: The period of its schedule, None for a constant rate.
        words: What it is, for the tables.
    """

    network: Network
    inputs: Tensor
    targets: Tensor
    times: list[float | None]
    options: dict[str, Any]
    fraction: float
    cosine: float | None
    words: dict[str, str] = field(default_factory=dict)


class Case(NamedTuple):
    """One answer: its true error, its bound, both in units of |w - w0|, and what it belongs to."""

    error: float
    bound: float
    words: dict[str, str]
    seed: int


def random_problem(seed: int, longest: int = 1000) -> Problem:
    """A small network of one of several shapes, data from well to badly conditioned, and any kind of dynamics.

    Args:
        seed: The problem's number.
        longest: The last step of a recurrence; closed forms go to 100,000.
    """
    generator = np.random.default_rng(seed)

    def pick(*options: Any) -> Any:
        return options[int(generator.integers(len(options)))]

    torch.manual_seed(seed)
    kind, outputs, samples = pick("linear", "mlp", "mlp", "deep", "convolution"), pick(1, 1, 2, 3), pick(3, 8, 14)
    features = 16 if kind == "convolution" else pick(3, 6, 12)
    hidden = {"linear": [], "mlp": [pick(6, 24)], "deep": [10, 8, 10], "convolution": [pick(3, 5)]}[kind]
    network = Network([features, *hidden], outputs, pick("tanh", "relu"), convolution=kind == "convolution")
    inputs = torch.randn(samples, features)
    data = pick("plain", "plain", "offset", "columns", "near duplicates", "duplicates", "samples of different size")
    if data == "offset":
        inputs = inputs + 10
    elif data == "columns":
        inputs = inputs * torch.logspace(0, -3, features)
    elif data == "near duplicates":
        inputs[samples // 2 :] = inputs[: samples - samples // 2].clone() + 1e-5 * torch.randn(
            samples - samples // 2, features
        )
    elif data == "duplicates":
        inputs[samples // 2 :] = inputs[: samples - samples // 2].clone()
    elif data == "samples of different size":
        inputs = inputs * torch.logspace(0, -4, samples).unsqueeze(1)
    targets = torch.randn(samples, outputs) * pick(1.0, 1.0, 100.0, 1e-3)
    dtype = pick(torch.float32, torch.float32, torch.float64)
    optimizer = pick("plain", "plain", "flow", "momentum", "dampening", "nesterov")
    options: dict[str, Any] = {
        "plain": {},
        "flow": {"dynamics": "gradient_flow"},
        "momentum": {"momentum": pick(0.5, 0.9)},
        "dampening": {"momentum": 0.8, "dampening": pick(0.1, 0.6)},
        "nesterov": {"momentum": pick(0.5, 0.9), "nesterov": True},
    }[optimizer]
    decay = pick(None, None, "coupled", "decoupled", "initial")
    if decay:
        options |= {"decay": decay, "weight_decay": pick(1e-4, 1e-2)}
    if optimizer in ("momentum", "nesterov") and pick(True, False, False):
        options["momentum_buffers"] = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    fraction, cosine = pick(0.02, 0.3, 0.9, 0.99, 1.2), pick(None, None, 30.0)
    solver = pick("eigh", "dense", "free", "free", "given")
    options |= {"solver": "eigh" if solver == "eigh" else "lanczos", "dtype": dtype}
    if solver in ("dense", "free"):
        options["matrix_free"] = solver == "free"
    elif solver == "given":
        options["solver"] = pick("eigh", "lanczos")
    recurrence = bool(cosine) or (optimizer != "flow" and (optimizer != "plain" or decay in ("coupled", "decoupled")))
    long = [1, 10, longest] if recurrence else [1, 100, 10_000, 100_000]
    unstable = fraction > 1 and optimizer != "flow"
    times: list[float | None] = [1, 8, 40] if unstable else sorted({pick(*long), long[-1]})
    if cosine is None and not unstable:
        times.append(None)
    words = {
        "type": str(dtype).removeprefix("torch."),
        "solver": solver,
        "optimizer": optimizer,
        "decay": decay or "none",
        "schedule": "cosine" if cosine else "constant",
        "data": data,
        "network": kind,
        "rate": "unstable" if unstable else "stable",
        "started": "late" if "momentum_buffers" in options else "fresh",
    }
    return Problem(network, inputs, targets, times, options, fraction, cosine, words)


def judge(seed: int, longest: int = 1000) -> Iterator[Case]:
    """The errors and bounds of a random problem."""
    problem = random_problem(seed, longest)
    network, inputs, targets, options = problem.network, problem.inputs, problem.targets, dict(problem.options)
    initial, jacobian = explicit(network, inputs)
    start = np.concatenate([wide(p).reshape(-1) for p in network.parameters()])
    largest = float(np.linalg.eigvalsh((jacobian @ jacobian.T).astype(np.float64))[-1])
    factor = 2 / targets.numel()
    if "weight_decay" in options:
        options["weight_decay"] *= factor * largest
    flow = options.get("dynamics") == "gradient_flow"
    template = SGDSettings(
        0.0, options.get("momentum", 0.0), options.get("dampening", 0.0), options.get("nesterov", False),
        options.get("weight_decay", 0.0), decoupled_weight_decay=options.get("decay") == "decoupled",
    )  # fmt: skip
    lr = problem.fraction * (2 / (factor * largest) if flow else stable_rate(template, factor * largest))
    rates: Any = lr
    if problem.cosine:
        rates = [lr * 0.5 * (1 + math.cos(step / problem.cosine)) for step in range(int(problem.times[-1] or 1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if problem.words["solver"] == "given":
            computed = LinearizedTraining(
                network, (inputs, targets), lr=lr, dtype=torch.float32, solver="eigh", progress=False
            )
            assert computed.ntk is not None
            single = seed % 2 or options.get("dtype") != torch.float32
            options["ntk"] = computed.ntk.float() if single else computed.ntk
        training = LinearizedTraining(network, (inputs, targets), lr=rates, batch_size=5, progress=False, **options)
    toward_start = options.get("decay") == "initial"
    carried = [Carried(start, 1.0, 0.0)] if template.weight_decay and not toward_start else []
    if "momentum_buffers" in options:
        buffers = np.concatenate([wide(p).reshape(-1) for p in options["momentum_buffers"].values()])
        carried.append(Carried(buffers, 0.0, 1.0))
    reference = Reference(jacobian, initial - wide(targets).reshape(-1), factor, carried)
    ridge = template.weight_decay / factor
    for t in problem.times:
        if t is None:
            expected = limit(reference, training, template, lr, flow=flow)
        elif flow:
            time = factor * (sum(rates[: int(t)]) if problem.cosine else lr * t)
            expected = reference.flow(time, ridge)
        else:
            steps = (
                [(template._replace(lr=rate), 1) for rate in rates[: int(t)]]
                if problem.cosine
                else [(template._replace(lr=lr), int(t))]
            )
            expected = reference.descent(steps, toward_start=toward_start)
        weights = np.concatenate([wide(value).reshape(-1) for value in training.weights(t).values()])
        bound = training.error_bound(t)
        moved = float(np.linalg.norm(expected)) if expected is not None else math.nan
        error = math.nan if expected is None else float(np.linalg.norm(weights - start - expected))
        time_word = "infinity" if t is None else f"{t:g}"
        yield Case(error / moved, bound / moved, problem.words | {"time": time_word}, seed)


def limit(
    reference: Reference, training: LinearizedTraining, template: SGDSettings, lr: float, *, flow: bool
) -> Array | None:
    """The limit of training, None where extended precision does not determine it either."""
    ridge = template.weight_decay / float(reference.factor)
    if template.decoupled_weight_decay and not flow:
        gain = 1 - template.dampening if template.momentum else 1.0
        ridge *= (1 - template.momentum) / gain
    changes = []
    for vector in reference.carried:
        along = template.momentum**2 if template.nesterov else template.momentum
        without = 0.0 if template.weight_decay else -lr * along / (1 - template.momentum)
        changes.append(-1.0 if vector.weight else without)
    eigenvalues = np.linalg.eigvalsh(reference.kernel.astype(np.float64))
    if ridge == 0 and eigenvalues[0] < 1e-12 * eigenvalues[-1]:
        return None
    return reference.limit(ridge, changes)


def stable_rate(template: SGDSettings, curvature: float) -> float:
    """The largest stable learning rate, found by bisection on the companion matrix."""

    def radius(lr: float) -> float:
        def step(state: NDArray[np.float64]) -> NDArray[np.float64]:
            weight, buffer = state
            gradient = curvature * weight + (0 if template.decoupled_weight_decay else template.weight_decay * weight)
            buffer = template.momentum * buffer + (1 - template.dampening) * gradient if template.momentum else gradient
            moved = gradient + template.momentum * buffer if template.nesterov else buffer
            shrunk = lr * template.weight_decay * weight if template.decoupled_weight_decay else 0
            return np.array([weight - shrunk - lr * moved, buffer])

        return float(np.abs(np.linalg.eigvals(np.stack([step(row) for row in np.eye(2)], axis=1))).max())

    low, high = 0.0, 100 / curvature
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) < 1 else (low, middle)
    return low


def summary(cases: Sequence[Case], least: float = 1e-13) -> str:
    """A Markdown table: by kind, how often the bound holds, and how often it is within 100 times the error."""
    rows = [
        "| | value | answers | bound below error | no finite bound | within 100 x | median ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        groups["all", ""].append(case)
        for name, value in case.words.items():
            groups[name, value].append(case)
    for (name, value), members in sorted(groups.items()):
        judged = [c for c in members if c.error > least]
        wrong = sum(c.error > c.bound for c in members)
        endless = sum(math.isinf(c.bound) for c in members)
        sharp = sum(c.bound <= 100 * c.error for c in judged) / max(len(judged), 1)
        median = float(np.median([c.bound / c.error for c in judged])) if judged else math.nan
        rows.append(f"| {name} | {value} | {len(members)} | {wrong} | {endless} | {sharp:.1%} | {median:.3g} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", type=int, nargs="?", default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    cases = [case for seed in range(options.first, options.first + options.problems) for case in judge(seed)]
    print(summary(cases))
    judged = sorted((c for c in cases if c.error > 0), key=lambda c: c.bound / c.error)
    for case in judged[:8] + judged[-8:]:
        print(f"{case.bound / case.error:.3g} at an error of {case.error:.2e}: seed {case.seed}, {case.words}")


if __name__ == "__main__":
    main()
