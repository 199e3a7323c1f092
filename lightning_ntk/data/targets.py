"""What targets mean: numbers beside the outputs, or classes of samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ntk.utilities.shapes import Float, Float64, Int, Shaped

# Distances from a threshold at which a loss is tested for symmetry about it, in units of the distance of the two targets.
_OFFSETS = (-0.3, 0.1, 0.4)


def match_targets(
    targets: Shaped[Tensor, "N ..."], outputs: Float[Tensor, "N K"], *, flat: bool
) -> Float64[Tensor, "N K"]:
    """Converts the targets of the data to `(N, K)` in float64.

    They may have this shape, be class labels `(N,)`, or be `(N,)` if the network is `flat`.

    Shapes that differ from the outputs' are refused: subtracting `(N,)` from `(N, 1)` would broadcast.
    """
    count, classes = outputs.shape
    if targets.is_complex():
        raise ValueError(
            f"Expected real targets but got {targets.dtype}. Give their real and imaginary parts as two outputs."
        )
    targets = targets.to(outputs.device)
    if not flat and classes > 1 and targets.shape == (count,) and not targets.is_floating_point():
        if targets.min() < 0 or targets.max() >= classes:
            raise ValueError(
                f"Expected class labels from 0 to {classes - 1}, as the network has {classes} outputs, "
                f"but got labels from {int(targets.min())} to {int(targets.max())}."
            )
        return torch.nn.functional.one_hot(targets.long(), classes).double()
    expected = (count,) if flat else (count, classes)
    if tuple(targets.shape) != expected:
        raise ValueError(
            f"Expected targets of the shape of the outputs, {expected}, but got {tuple(targets.shape)}. "
            "Reshape the targets, or the outputs with `predict`; only integer class labels are converted."
        )
    return targets.double().reshape(count, classes)


@dataclass(frozen=True)
class Classes:
    """The class of every sample."""

    labels: Int[Tensor, "N"]
    threshold: float | None = None  # above which a single output means class 1; None if the largest output decides

    @classmethod
    def of(cls, targets: Tensor, outputs: int, gradient: Callable[[Tensor, Tensor], Tensor]) -> "Classes | None":
        r"""The classes that targets stand for, or None if they are not classes.

        Classes are integer labels `(N,)`, one-hot rows for several outputs, and two target values :math:`y_0 < y_1` for a single
        one. There the threshold is the :math:`\theta` about which the loss is symmetric,
        :math:`\ell'(\theta + d, y_1) = -c\,\ell'(\theta - d, y_0)` for all d: midway between the targets for squared losses and
        losses of probabilities, 0 for losses of logits and margins, whatever the weights c of the classes are. `gradient` maps
        outputs `(N, K)` and targets to the gradient of the loss in the outputs.

        Example:
            >>> Classes.of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2, lambda f, y: f - y).labels
            tensor([1, 0])
            >>> Classes.of(torch.tensor([3.0, 1.0]), 1, lambda f, y: f.flatten() - y).threshold
            2.0
        """
        if outputs > 1:
            if targets.dim() == 1 and not targets.is_floating_point():
                return cls(targets.long())
            one_hot = targets.dim() == 2 and bool(
                (((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) == 1)).all()
            )
            return cls(targets.argmax(1)) if one_hot else None
        values: Tensor = torch.unique(targets)
        if targets.numel() != len(targets) or len(values) != 2:
            return None
        low, high = values.tolist()

        def slope(output: float, target: float) -> Tensor:
            point = torch.full((len(targets), 1), output, dtype=torch.float64, device=targets.device)
            return gradient(point, torch.full_like(targets, target)).sum()

        def is_symmetric(center: float) -> bool:
            offsets = [(high - low) * offset for offset in _OFFSETS]
            try:
                ratios = torch.stack([slope(center + d, high) / slope(center - d, low) for d in offsets])
            except (RuntimeError, ValueError):  # a loss of probabilities, outside of [0, 1]
                return False
            return torch.allclose(ratios, ratios[0], rtol=1e-4)

        middle = (low + high) / 2
        threshold = middle if is_symmetric(middle) and not is_symmetric(0.0) else 0.0
        return cls((targets.flatten() == high).long(), threshold)

    def accuracy(self, outputs: Float[Tensor, "N K"]) -> float:
        """The share of samples whose outputs `(N, K)` predict their class."""
        predicted = outputs.argmax(1) if self.threshold is None else (outputs.flatten() > self.threshold).long()
        return (predicted.cpu() == self.labels).double().mean().item()
