"""Classes of samples, where targets stand for classes, and the accuracy of outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """What the targets of a classification say.

    Attributes:
        labels: The class of every sample, `(N,)`.
        threshold: For a single output, the value above which it means class 1; None where the largest output decides.
    """

    labels: Tensor
    threshold: float | None = None

    @classmethod
    def of(cls, targets: Tensor, outputs: int, *, squared: bool) -> "Classes | None":
        """The classes that targets stand for, or None where they are no classes.

        Classes are integer labels `(N,)` or one-hot rows of at least two outputs; and, of a single output, targets with two
        values. The threshold between these is half way for a squared loss, and 0 for losses of logits.

        Args:
            targets: `(N, K)`, `(N, 1)` or `(N,)`.
            outputs: K.
            squared: Whether the loss is a squared one.

        Example:
            >>> Classes.of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2, squared=True).labels
            tensor([1, 0])
            >>> Classes.of(torch.tensor([[0.3, 0.7], [1.0, 0.0]]), 2, squared=True) is None
            True
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
        threshold = values.double().mean().item() if squared else 0.0
        return cls((targets.flatten() == values[1]).long(), threshold)

    def accuracy(self, outputs: Tensor) -> float:
        """The share of samples whose outputs `(N, K)` mean their class."""
        predicted = outputs.argmax(1) if self.threshold is None else (outputs.flatten() > self.threshold).long()
        return (predicted.cpu() == self.labels).double().mean().item()
