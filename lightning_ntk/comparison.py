"""The scalars that compare a trained network with its linearised twin at one time."""

from collections.abc import Mapping

from torch import Tensor

from lightning_ntk.distances import difference, parameter_distances, root_mean_square, weight_distances
from lightning_ntk.training import LinearizedState, LinearizedTraining


def compare(
    training: LinearizedTraining, state: LinearizedState, weights: Mapping[str, Tensor], *, per_parameter: bool = False
) -> dict[str, float]:
    r"""Distances in weight and function space between trained weights and the linearised network.

    The linearised weights are formed, by one pass :math:`J^\top a`, and subtracted in float64. The shortcut
    :math:`|w_\text{lin} - w_t|^2 = \sum_i \lambda_i a_i^2 - 2 a^\top J \Delta + |\Delta|^2` cancels: at a relative distance of
    1e-3 float32 leaves no correct digit of it.

    Args:
        training: The captured problem.
        state: The linearised network at the time of comparison.
        weights: The trained weights w_t, with the names of `training.initial_weights`.
        per_parameter: Whether to add `parameter/<name>`, the relative distance of each tensor.

    Returns:
        The weight distances of `weight_distances`, then `prediction_rmse`, the root mean square of
        :math:`f(X; w_t) - f_\text{lin}(X; t)`, `loss` and `linearized_loss`, on the training set, at the buffers of the capture.
    """
    displacement = difference(weights, training.initial_weights)
    linearized = training.displacement_of(state)
    outputs = training.capture.predict(weights)
    scalars = weight_distances(displacement, linearized) | {
        "prediction_rmse": root_mean_square(outputs.cpu().double() - state.predictions),
        "loss": training.capture.loss_of(outputs),
        "linearized_loss": training.capture.loss_of(state.predictions),
    }
    if per_parameter:
        distances = parameter_distances(displacement, linearized)
        scalars |= {f"parameter/{name}": value for name, value in distances.items()}
    return scalars
