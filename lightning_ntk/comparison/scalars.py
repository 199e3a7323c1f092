"""The scalars that compare a trained network with its linearization."""

from collections.abc import Mapping

from torch import Tensor

from lightning_ntk.functional import norm, parameter_distances, prediction_rmse, taylor_gap, weight_distances
from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.shapes import Float64


def compare_weights(
    displacement: Mapping[str, Tensor], linearized: Mapping[str, Tensor], *, per_parameter: bool = False
) -> dict[str, float]:
    r"""Compares both networks in weight space.

    The linearized weights are formed by one pass :math:`J^\top a` and subtracted in float64. The shortcut
    :math:`|w_\text{lin} - w_t|^2 = \sum_i \lambda_i a_i^2 - 2 a^\top J \Delta + |\Delta|^2` cancels: in float32 it has no correct
    digit at a relative distance of 1e-3.

    Args:
        displacement: w_t - w_0, by parameter name, in float64.
        linearized: w_lin(t) - w_0.
        per_parameter: Whether to add `parameter/<name>`, the relative distance of each tensor.
    """
    scalars = weight_distances(displacement, linearized)
    if per_parameter:
        distances = parameter_distances(displacement, linearized)
        scalars |= {f"parameter/{plain_name(name)}": value for name, value in distances.items()}
    return scalars


def outputs_of(
    data: LinearizedProblem,
    weights: Mapping[str, Tensor],
    displacement: Mapping[str, Tensor],
    predictions: Float64[Tensor, "N K"] | None = None,
) -> tuple[Float64[Tensor, "N K"], Float64[Tensor, "N K"]]:
    """Computes outputs of the trained and the linearized network, `(N, K)` each.

    They are in float64 on the CPU.

    Args:
        data: The data set.
        weights: The trained weights w_t.
        displacement: w_lin - w_0 of the linearized network.
        predictions: Its outputs on this data set, if they are known without a pass.
    """
    if predictions is None:
        predictions = data.predictions.cpu().double() + data.push_forward(displacement).cpu()
    return data.predict(weights).cpu().double(), predictions


def compare_functions(
    data: LinearizedProblem,
    trained: Float64[Tensor, "N K"],
    linearized: Float64[Tensor, "N K"],
    pushed: Float64[Tensor, "N K"] | None,
) -> dict[str, float]:
    r"""Compares three networks in function space, on one data set.

    They are the trained network f_t, the linearized network f_lin, and the first-order expansion of the trained network,
    :math:`f_0 + J (w_t - w_0)`, all with the buffers of the capture.

    Args:
        data: The data set, captured at w_0.
        trained: f_t on this data set, `(N, K)` in float64 on the CPU.
        linearized: f_lin(t) on this data set, `(N, K)` in float64 on the CPU.
        pushed: J (w_t - w_0), `(N, K)`, or None to leave out the expansion.

    Returns:
        `prediction_rmse`, `loss`, `linearized_loss` and `taylor_gap`; for classes also `accuracy`, `linearized_accuracy` and
        `taylor_accuracy`.
    """
    start = data.predictions.cpu().double()
    outputs = {"": trained, "linearized_": linearized}
    scalars = {
        "prediction_rmse": prediction_rmse(trained, linearized),
        "loss": data.loss_of(trained),
        "linearized_loss": data.loss_of(linearized),
    }
    if pushed is not None:
        outputs["taylor_"] = start + pushed
        scalars["taylor_gap"] = taylor_gap(trained, outputs["taylor_"], start)
    if data.classes is not None:
        scalars |= {f"{kind}accuracy": data.classes.accuracy(values) for kind, values in outputs.items()}
    return scalars


def compare_modes(
    training: LinearizedTraining, trained: Float64[Tensor, "N K"], linearized: Float64[Tensor, "N K"], count: int
) -> dict[str, float]:
    r"""Compares the residuals of both networks along the leading eigenvectors u_i of the kernel.

    Args:
        training: The linearized training.
        trained: Outputs of the trained network on the training set, `(N, K)` in float64 on the CPU.
        linearized: Outputs of the linearized network, likewise.
        count: How many modes.

    Returns:
        `mode/i/residual` :math:`u_i^\top (f_t - Y)` and `mode/i/linearized_residual` :math:`u_i^\top (f_\text{lin} - Y)` for
        i = 1, 2, ..., with the largest eigenvalue first.
    """
    basis = training.modes.basis[:, -count:].flip(1).cpu()
    scalars: dict[str, float] = {}
    for kind, outputs in (("residual", trained), ("linearized_residual", linearized)):
        residuals = basis.T @ (outputs - training.targets).flatten()
        scalars |= {f"mode/{i}/{kind}": value for i, value in enumerate(residuals.tolist(), 1)}
    return scalars


def compare_closest(training: LinearizedTraining, displacement: Mapping[str, Tensor], steps: int) -> dict[str, float]:
    r"""Finds how close the linearized trajectory comes to the trained weights, at any time.

    Args:
        training: The linearized training.
        displacement: w_t - w_0.
        steps: t. Without closed forms for all times, the search ends at 4 t.

    Returns:
        `closest_time` in optimizer steps at the learning rate of the capture, infinite for the limit; `closest_distance` at
        that time, relative to :math:`|w_t - w_0|`; and, with all modes, `distance_floor`, the share of :math:`w_t - w_0`
        outside what linearized training can reach, a lower bound at any time.
    """
    moved = norm(displacement)
    if moved == 0:
        return {"closest_time": 0.0, "closest_distance": 0.0}
    closest = training.closest(displacement, until=None if training.knows_all_times else 4.0 * max(steps, 1))
    scalars = {"closest_time": float(closest.time), "closest_distance": closest.distance / moved}
    return scalars if closest.floor is None else scalars | {"distance_floor": closest.floor}
