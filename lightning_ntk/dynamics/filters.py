"""What the dynamics leave of every mode: filters of the residual and of the vectors that the weights carry along."""

from typing import NamedTuple

from torch import Tensor


class Start(NamedTuple):
    """Where a carried vector is when training starts.

    Attributes:
        weight: Its coefficient q in the weights: 1 for the initial weights, which decay toward zero shrinks.
        buffer: Its coefficient in the momentum buffer: 1 for the buffer that the optimizer brings along.
    """

    weight: float
    buffer: float


class Filters(NamedTuple):
    r"""The linearized weights at one time, :math:`w_0 + \sum_j s_j e_j - J^\top U (\phi \tilde r + \sum_j \chi_j \tilde h_j)`.

    Here :math:`h_j = J e_j` for the carried vectors :math:`e_j`, and a tilde stands for coefficients in the modes U.

    Attributes:
        values: :math:`\phi, \chi_1, \ldots`, each `(m,)` on the modes of its own vector.
        scales: :math:`s_1, \ldots`, the change of each carried vector's coefficient in the weights.
    """

    values: tuple[Tensor, ...]
    scales: tuple[float, ...] = ()
