"""How a run is observed."""

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_ntk.data.reference import Unpack
from lightning_ntk.linearization.linearization import Predict
from lightning_ntk.linearization.objective import Loss
from lightning_ntk.solvers.selection import Solver
from lightning_ntk.training.problem import JacobianStorage

FollowedDynamics = Literal["auto", "gradient_descent", "gradient_flow", "replay", "twin"]


@dataclass(frozen=True)
class Options:
    """How a run is observed; the arguments of `LinearizationMonitor` of these names."""

    dynamics: FollowedDynamics = "auto"
    loss: Loss | None = None
    predict: Predict | None = None
    unpack: Unpack | None = None
    solver: Solver = "auto"
    jacobian: JacobianStorage = "streamed"
    batch_size: int = 256
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    twin_every: int = 1
    per_parameter: bool = False
    taylor: bool = True
    closest: bool = False
    modes: int = 0
    kernel_probe: int = 0
    progress: bool = False
