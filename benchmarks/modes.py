"""The linearized network at later times: modes of the kernel, with and without one."""

import resource
from collections.abc import Iterator

import torch
from models import MODELS, digits
from peers.plain_torch import descent_by_inverse, flow_by_inverse, row_by_row_jacobian
from timing import Comparison, interleaved, seconds
from torch import Tensor, nn

from lightning_ntk import LinearizedTraining, empirical_ntk

TIMES = [1, 10, 100, 1000, 10000]


def matrix_free() -> Comparison:
    """A complete capture for 1000 steps without a kernel, on all images, next to 150 plain epochs."""
    module, inputs, targets = _problem(1797)

    def epoch() -> None:
        for start in range(0, len(inputs), 256):
            loss = nn.functional.mse_loss(module(inputs[start : start + 256]), targets[start : start + 256])
            module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]

    probe = LinearizedTraining(module, (inputs, targets), lr=1e-3, solver="lanczos", matrix_free=True, progress=False)
    rate = probe.max_learning_rate / 2

    def capture() -> LinearizedTraining:
        return LinearizedTraining(
            module, (inputs, targets), lr=rate, solver="lanczos", matrix_free=True, horizon=1000, tolerance=1e-4, progress=False
        )  # fmt: skip

    bound = capture().error_bound(1000, relative=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = interleaved({"capture": capture, "epoch": epoch}, 9)
    case, other = "capture without a kernel, MLP, N = 1797", "150 plain training epochs"
    notes = {"relative bound at t = 1000": bound, "peak GiB of the process": peak}
    return Comparison(case, times["capture"], other, 150 * times["epoch"], notes)


def lanczos() -> Comparison:
    """Modes for 1000 steps at eta * lambda_max = 1 on a given kernel of 5120 rows."""
    module, inputs, targets = _problem(512)
    kernel = empirical_ntk(module, inputs)
    largest: list[float] = []
    double = kernel.double()
    eigh = seconds(lambda: largest.append(torch.linalg.eigh(double)[0][-1].item()), 1, warm_up=False)
    rate = targets.numel() / (2 * largest[0])

    def capture(horizon: float | None) -> object:
        return LinearizedTraining(
            module, (inputs, targets), lr=rate, ntk=kernel, solver="lanczos", horizon=horizon, progress=False
        )

    times = interleaved({"modes": lambda: capture(1000), "without": lambda: capture(None)}, 3)
    return Comparison(
        "modes for t <= 1000, 5120 rows", times["modes"] - times["without"], "torch.linalg.eigh, float64", eigh,
        {"whole capture": times["modes"]},
    )  # fmt: skip


def against_the_inverse(samples: int = 64) -> Iterator[Comparison]:
    """Weights at several times: kernel, modes and passes here; stacked gradients, inverse, power or exponential there."""
    module, inputs, targets = _problem(samples)
    with torch.no_grad():
        residual = (module(inputs) - targets).flatten()
    jacobian = row_by_row_jacobian(module, inputs)
    exact = jacobian.double() @ jacobian.double().T
    rate = 1 / torch.linalg.eigvalsh(exact)[-1].item()
    lr = rate * targets.numel() / 2

    def ours(dynamics: str) -> list[Tensor]:
        training = LinearizedTraining(module, (inputs, targets), lr=lr, dynamics=dynamics, progress=False)  # type: ignore[arg-type]
        changes = [training.displacement(t) for t in TIMES]
        return [torch.cat([value.flatten() for value in change.values()]) for change in changes]

    def theirs(dynamics: str) -> list[Tensor]:
        rows = row_by_row_jacobian(module, inputs)
        kernel = rows.mm(rows.T)
        solve = descent_by_inverse if dynamics == "gradient_descent" else flow_by_inverse
        return [rows.T @ solve(kernel, residual, rate, t) for t in TIMES]

    for dynamics, other in (("gradient_descent", "matrix power"), ("gradient_flow", "matrix exponential")):
        expected = _exact(exact, jacobian, residual, rate, dynamics)
        notes = {
            "largest relative error": _largest_error(ours(dynamics), expected),
            "theirs": _largest_error(theirs(dynamics), expected),
        }
        times = interleaved(
            {"ours": lambda d=dynamics: ours(d), "theirs": lambda d=dynamics: theirs(d)},  # type: ignore[misc]
            1,
            warm_up=False,
        )
        case = f"{dynamics.replace('_', ' ')}, {len(TIMES)} times, MLP, N = {samples}"
        yield Comparison(case, times["ours"], f"stacked rows, float32 inverse and {other}", times["theirs"], notes)


def _largest_error(values: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(values, expected, strict=True)
    return max(float((value.double() - right).norm() / right.norm()) for value, right in pairs)


def _exact(kernel: Tensor, jacobian: Tensor, residual: Tensor, rate: float, dynamics: str) -> list[Tensor]:
    """Displacements at all times by a float64 eigendecomposition."""
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp_min(values[-1] * 1e-14)
    exponent = (
        torch.log1p(-rate * values.clamp_max((1 - 1e-12) / rate)) if dynamics == "gradient_descent" else -rate * values
    )
    projected = vectors.T @ residual.double()
    return [
        jacobian.double().T @ (vectors @ (torch.expm1(t * exponent) / values * projected)) for t in TIMES
    ]  # fmt: skip


def _problem(samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return MODELS["MLP"](), *digits("MLP", samples)
