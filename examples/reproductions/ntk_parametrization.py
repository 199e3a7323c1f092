"""Linear layers in NTK and in standard parametrization, with the same function at initialization.

In NTK parametrization (Jacot et al., 2018; Lee et al., 2019, section 2.1) the entries of weight and bias are drawn from a
standard normal distribution, and the layer multiplies them by constants:

    y = sigma_w / sqrt(fan_in) W x + sigma_b b

In standard parametrization the constants are in the initial values instead. Outputs at initialization are the same, gradients are
not: in NTK parametrization the kernel has a limit as the width grows, and one learning rate serves every width.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Parametrization = Literal["ntk", "standard"]


class ScaledLinear(nn.Module):
    """`sigma_w / sqrt(fan_in) W x + sigma_b b`, with the constants in the layer or in the initial values.

    The bias is the weight of a layer with the constant as its input, and the constant of the weight is applied to x. So
    `empirical_ntk` sees two plain linear layers, for which it has a fast rule.

    Args:
        fan_in: Inputs.
        fan_out: Outputs.
        parametrization: "ntk" or "standard".
        sigma_w: Standard deviation of an output, for inputs of unit mean square, without the bias.
        sigma_b: Standard deviation of the bias. 0: no bias.

    Raises:
        ValueError: If the parametrization is another one.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        parametrization: Parametrization = "ntk",
        *,
        sigma_w: float = 1.0,
        sigma_b: float = 0.0,
    ) -> None:
        super().__init__()
        if parametrization not in ("ntk", "standard"):
            raise ValueError(
                f'Expected argument `parametrization` to be "ntk" or "standard" but got {parametrization!r}.'
            )
        scale_w = sigma_w / math.sqrt(fan_in)
        self.linear = nn.Linear(fan_in, fan_out, bias=False)
        self.bias = nn.Linear(1, fan_out, bias=False) if sigma_b else None
        self.scale_w, self.scale_b = (scale_w, sigma_b) if parametrization == "ntk" else (1.0, 1.0)
        with torch.no_grad():
            # The same draws in both, so that one seed gives one function.
            self.linear.weight.normal_().mul_(scale_w / self.scale_w)
            if self.bias is not None:
                self.bias.weight.normal_().mul_(sigma_b / self.scale_b)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape `(..., fan_out)` for inputs `(..., fan_in)`."""
        outputs: Tensor = self.linear(self.scale_w * x)
        return outputs if self.bias is None else outputs + self.bias(x.new_full((*x.shape[:-1], 1), self.scale_b))


def mlp(
    sizes: Sequence[int],
    activation: type[nn.Module] = nn.Tanh,
    parametrization: Parametrization = "ntk",
    *,
    sigma_w: float = 1.0,
    sigma_b: float = 0.0,
) -> nn.Sequential:
    """A fully connected network of `ScaledLinear` layers.

    Args:
        sizes: Inputs, width of each hidden layer, outputs.
        activation: Between two layers.
        parametrization: The parametrization of every layer.
        sigma_w: Scale of the weights of every layer.
        sigma_b: Scale of the biases of every layer.

    Raises:
        ValueError: If there are no two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"Expected argument `sizes` to have at least inputs and outputs but got {list(sizes)}.")
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [ScaledLinear(fan_in, fan_out, parametrization, sigma_w=sigma_w, sigma_b=sigma_b), activation()]
    return nn.Sequential(*layers[:-1])
