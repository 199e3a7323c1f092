r"""A last linear layer with more outputs than features.

Its kernel needs no output gradients.

For outputs :math:`f = W h + b` of features h, `(N, d)`, with a kernel :math:`\Theta_h`,

    Theta = (H H^T + 1) (x) I + (I (x) W) Theta_h (I (x) W^T),

so that d backward passes take the place of K. Where the weight is an embedding too, with the Jacobian E of the outputs in
that use, the terms E (H (x) I)^T and its transpose are added. What the outputs choose of the layer's, a position or some
words of a vocabulary, is known from their gradients (the structured head of Novak et al., 2022, for any choice of outputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True, eq=False)
class Readout:
    """The outputs `features[n, slots[k]] @ weight[columns[k]] + bias[columns[k]]`.

    Attributes:
        weight: The layer's weight `(V, d)`.
        features: What it is applied to, at the P positions of a sample that are chosen, `(N, P, d)`.
        slots: The position of each output, `(K,)`.
        columns: The word of each output, `(K,)`.
        scales: Elements of D for weight and bias, 0 for one that is not trained.
        tokens: Where the weight is an embedding too, the rows that a sample looks up, `(N, T)`.
        gradients: Those of the features with respect to what was looked up, `(N, T, P d, d)`.
    """

    weight: Tensor
    features: Tensor
    slots: Tensor
    columns: Tensor
    scales: tuple[float, float] = (1.0, 1.0)
    tokens: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The outputs' Jacobian with respect to the features, `(K, P d)`."""
        chosen = self.weight[self.columns]
        places = F.one_hot(self.slots, self.features.shape[1]).to(chosen)
        return (places.unsqueeze(2) * chosen.unsqueeze(1)).flatten(1)

    def narrow(self, start: int, stop: int) -> "Readout":
        """The samples `start` to `stop`."""
        if self.tokens is None or self.gradients is None:
            return replace(self, features=self.features[start:stop])
        parts = {name: getattr(self, name)[start:stop] for name in ("features", "tokens", "gradients")}
        return replace(self, **parts)

    def to(self, dtype: torch.dtype) -> "Readout":
        """The same numbers in another floating-point type."""
        gradients = None if self.gradients is None else self.gradients.to(dtype)
        return replace(self, weight=self.weight.to(dtype), features=self.features.to(dtype), gradients=gradients)

    def add_outputs(self, tile: Tensor, inner: Tensor, other: "Readout") -> None:
        """Adds the kernel of the outputs to `tile`, `(N1, K, N2, K)`.

        It is computed from that of the features, `(N1, P d, N2, P d)`.
        """
        matrix = self.matrix
        right = inner @ matrix.T
        if self.tokens is not None:
            right += self._cross(other)
            tile += torch.einsum("kf,jfil->iljk", matrix, other._cross(self))
        tile += torch.matmul(matrix, right.flatten(2)).view(tile.shape)
        same = (self.columns[:, None] == self.columns).to(matrix)
        products = torch.einsum("ipa,jqa->ipjq", self.features, other.features)
        for p in range(products.shape[1]):
            for q in range(products.shape[3]):
                pairs = same * torch.outer(self.slots == p, self.slots == q)
                weights = self.scales[0] * products[:, p, :, q] + self.scales[1]
                tile.addcmul_(weights[:, None, :, None], pairs[None, :, None, :])

    def _cross(self, other: "Readout") -> Tensor:
        """The cross term of the embedding and the layer, `(N1, P d, N2, K)`.

        It is the embedding's Jacobian of the features times the layer's own of the other samples' outputs.
        """
        assert self.tokens is not None
        assert self.gradients is not None
        words = (self.tokens.unsqueeze(2) == self.columns).to(self.gradients)
        samples, width = len(self.tokens), self.gradients.shape[2]
        total = self.gradients.new_zeros(samples, width, len(other.features), len(self.columns))
        for slot in range(self.features.shape[1]):
            here = words * (self.slots == slot)
            products = self.gradients @ other.features[:, slot].T
            total += torch.einsum("itfj,itl->ifjl", products, here)
        return self.scales[0] * total


def cat_readouts(parts: Sequence[Readout]) -> Readout:
    """Concatenates consecutive samples.

    Shorter sequences look up a row with a gradient of zero.
    """
    features = torch.cat([part.features for part in parts])
    if parts[0].tokens is None:
        return replace(parts[0], features=features)
    looked_up = [(p.tokens, p.gradients) for p in parts if p.tokens is not None and p.gradients is not None]
    most = max(tokens.shape[1] for tokens, _ in looked_up)
    tokens = torch.cat([F.pad(tokens, (0, most - tokens.shape[1])) for tokens, _ in looked_up])
    gradients = torch.cat([F.pad(g, (0, 0, 0, 0, 0, most - g.shape[1])) for _, g in looked_up])
    return replace(parts[0], features=features, tokens=tokens, gradients=gradients)


class Choice:
    """Which of a linear layer's outputs the network's outputs are.

    Attributes:
        positions: Where in the layer's inputs the P positions of each sample are, `(N, P)`.
        slots: As in `Readout`.
        columns: As in `Readout`.
    """

    def __init__(self, positions: Tensor, slots: Tensor, columns: Tensor) -> None:
        self.positions, self.slots, self.columns = positions, slots, columns

    def features(self, inputs: Tensor) -> Tensor:
        """Those inputs `(N, ..., d)` that are read, `(N, P, d)`."""
        return inputs.reshape(len(inputs), -1, inputs.shape[-1]).take_along_dim(self.positions.unsqueeze(2), 1)

    def cotangents(self, inputs: Tensor) -> Tensor:
        """One for each feature, the same for all samples, `(P d, *inputs.shape)`."""
        samples, positions = self.positions.shape
        size = inputs.shape[-1]
        flat = inputs.new_zeros(positions, size, samples, inputs[0].numel() // size, size)
        position, index, sample = (torch.arange(n, device=inputs.device) for n in (positions, size, samples))
        index = index[:, None]
        flat[position[:, None, None], index, sample, self.positions.T.unsqueeze(1), index] = 1
        return flat.flatten(0, 1).view(-1, *inputs.shape)


def find_choice(outputs: Tensor, result: Tensor) -> Choice | None:
    """Finds what `outputs`, `(N, K)`, choose of a layer's `result`.

    The result is `(N, ..., V)`. None if they choose nothing, or not alike in all samples.
    """
    samples, count = outputs.shape
    if len(result) != samples or result.dim() < 2 or not outputs.requires_grad:
        return None
    codes = torch.arange(1, count + 1, device=outputs.device, dtype=outputs.dtype).expand(samples, -1)
    if outputs is result:
        found = codes
    else:
        (gradient,) = torch.autograd.grad(
            outputs, result, codes, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found = gradient.reshape(samples, -1)
    sample, place = found.nonzero(as_tuple=True)
    if len(sample) != samples * count or not (sample.bincount(minlength=samples) == count).all():
        return None
    values, order = found[sample, place].view(samples, count).sort(1)
    place = place.view(samples, count).take_along_dim(order, 1)
    if not torch.equal(values, codes) or not torch.equal(result.reshape(samples, -1).take_along_dim(place, 1), outputs):
        return None
    position, column = place // result.shape[-1], place % result.shape[-1]
    distinct = [torch.unique(row) for row in position]
    if len({len(row) for row in distinct}) > 1:
        return None
    positions = torch.stack(distinct)
    slots = torch.searchsorted(positions, position)
    if not ((slots == slots[0]).all() and (column == column[0]).all()):
        return None
    return Choice(positions, slots[0], column[0])
