"""Jacobians of parameters in factored form.

A layer that multiplies its input by a weight, at T positions, has the per-sample Jacobian

    d f_k(x_i) / dW = sum_t (output gradient)_ikt (x) (input)_it

(Goodfellow, 2015, for T = 1; Rochette et al., 2019, for convolutions). Its block of the kernel,

    Theta[i k, j l] = sum_ts <input_it, input_js> <output gradient_ikt, output gradient_jls>,

needs Gram matrices and no Jacobian, see `blocks` (Novak et al., 2022, "Fast finite width neural tangent kernel").
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_ntk.kernel.readout import Readout, cat_readouts
from lightning_ntk.utilities.shapes import Float, Int

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Outer:
    """A Jacobian `sum_t gradients (x) inputs` for R rows and K outputs.

    Rows are samples, or parts of samples.

    Attributes:
        inputs: `(R, G, T, I)` for G groups and T positions; or integers `(R, G, T)` that index one-hot inputs.
        gradients: `(R, K, G, T, O)`.
        shape: The parameter's shape, whose elements are in the order `(G, O, I)`.
        input_first: Whether they are in the order `(G, I, O)` instead.
    """

    inputs: Float[Tensor, "R G T I"] | Int[Tensor, "R G T"]
    gradients: Float[Tensor, "R K G T O"]
    shape: torch.Size
    input_first: bool = False

    @property
    def one_hot(self) -> bool:
        """Whether the inputs are the positions of ones."""
        return self.inputs.dim() == 3

    @property
    def width(self) -> int:
        """I, the length of an input vector."""
        return self.shape.numel() // (self.gradients.shape[2] * self.gradients.shape[4])

    def count_columns(self) -> int:
        """Elements of a position's output gradients that are not zero, at most."""
        return int(self.gradients[:, :, 0].any(1).sum(2).max())

    def by_columns(self) -> "Outer":
        """The same Jacobian, for one group, without zero output gradients.

        The elements of the output gradients that are not zero become positions.

        The inputs are one-hot then, as those of an embedding, and the gradients are products with the inputs.
        """
        columns = self.gradients[:, :, 0].any(1).int().topk(max(1, self.count_columns()), 2).indices
        index = columns[:, None, None].expand(-1, self.gradients.shape[1], -1, -1, -1)
        products = self.gradients.gather(4, index).unsqueeze(5) * self.inputs[:, None, :, :, None]
        return Outer(columns.unsqueeze(1).flatten(2), products.flatten(3, 4), self.shape, not self.input_first)

    def dense(self) -> Float[Tensor, "R K *shape"]:
        """The Jacobian `(R, K, *shape)`."""
        rows, outputs, groups, positions, size = self.gradients.shape
        gradients = self.gradients.permute(0, 2, 1, 4, 3)
        if self.one_hot:
            index = self.inputs[:, :, None, None, :].expand(gradients.shape)
            jacobian = gradients.new_zeros(*gradients.shape[:-1], self.width).scatter_add_(-1, index, gradients)
        else:
            # A batch of matrix products: a broadcast matmul would copy the inputs K times.
            flat = gradients.reshape(rows * groups, outputs * size, positions)
            jacobian = flat @ self.inputs.reshape(rows * groups, positions, self.width)
            jacobian = jacobian.view(rows, groups, outputs, size, self.width)
        order = (0, 2, 1, 4, 3) if self.input_first else (0, 2, 1, 3, 4)
        return jacobian.permute(order).reshape(rows, outputs, *self.shape)


@dataclass(frozen=True, eq=False)
class Dense:
    """A Jacobian `(R, K, *shape)` that is not factored.

    The R rows are samples, or parts of samples.
    """

    jacobian: Float[Tensor, "R K *shape"]

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return self.jacobian.shape[2:]

    def dense(self) -> Float[Tensor, "R K *shape"]:
        """The Jacobian `(R, K, *shape)`."""
        return self.jacobian


Factor: TypeAlias = Outer | Dense
Use: TypeAlias = tuple[str, Factor]
"""A parameter, and its Jacobian through one call."""


def gradients_of(factor: Factor) -> Float[Tensor, "R K ..."]:
    """The output gradients `(R, K, ...)`.

    Where they are not kept apart, it is the Jacobian.
    """
    return factor.gradients if isinstance(factor, Outer) else factor.jacobian


def scaled(factor: Factor, scale: float) -> Factor:
    """Multiplies the Jacobian by a number.

    Output gradients that may be shared with other factors are kept.
    """
    if scale == 1:
        return factor
    if isinstance(factor, Dense):
        return Dense(scale * factor.jacobian)
    if factor.one_hot:
        return replace(factor, gradients=scale * factor.gradients)
    return replace(factor, inputs=scale * factor.inputs)


@dataclass(frozen=True, eq=False)
class Gram:
    """What makes a kernel block of parameters that share output gradients.

    A weight and its bias are an example.

    Attributes:
        inputs: One tensor a parameter: `(N, G, T, I)`, or `(N, G, T)` for one-hot inputs.
        gradients: `(N, G, T, K, O)`; or `(K, O)` when they are the same for all samples, as those of a last layer are.
    """

    inputs: tuple[Tensor, ...]
    gradients: Tensor

    def narrow(self, start: int, stop: int) -> "Gram":
        """The samples `start` to `stop`."""
        shared = self.gradients.dim() == 2
        gradients = self.gradients if shared else self.gradients[start:stop]
        return Gram(tuple(x[start:stop] for x in self.inputs), gradients)

    def jacobian(self, start: int, stop: int, used: Sequence[Tensor | None]) -> Tensor:
        """Elements `start` to `stop` of the output gradients times all inputs.

        The result is `(N K, G * (stop - start) * I)`.

        With one-hot inputs, it has only those in `used`, which are sorted.
        """
        gradients = self.gradients[..., start:stop].permute(0, 1, 3, 4, 2).flatten(2, 3)
        parts = []
        for inputs, kept in zip(self.inputs, used, strict=True):
            if kept is None:
                parts.append(gradients @ inputs)
                continue
            index = torch.searchsorted(kept, inputs).unsqueeze(2).expand(gradients.shape)
            parts.append(gradients.new_zeros(*gradients.shape[:3], len(kept)).scatter_add_(3, index, gradients))
        part = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
        return part.reshape(*part.shape[:2], -1, stop - start, part.shape[3]).transpose(1, 2).flatten(0, 1).flatten(1)

    def to(self, dtype: torch.dtype) -> "Gram":
        """The factors in another floating-point type; the indices of one-hot inputs stay integers."""
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
        return Gram(inputs, self.gradients.to(dtype))


def gram_of(factors: Sequence[Outer], *, shared: bool) -> Gram:
    """Factors that share their gradients, one for each parameter, laid out for products.

    `shared` says that the gradients are the same for all samples, as those of a last layer are.
    """
    gradients = factors[0].gradients
    gradients = gradients[0, :, 0, 0] if shared else gradients.permute(0, 2, 3, 1, 4)
    # Of several dense inputs, one product: the bias is a column of ones.
    columns = [factor.inputs for factor in factors if not factor.one_hot]
    one_hot = [factor.inputs.contiguous() for factor in factors if factor.one_hot]
    joined = [torch.cat(columns, -1).contiguous()] if columns else []
    return Gram((*joined, *one_hot), gradients.contiguous())


def cat_grams(grams: Sequence[Gram]) -> Gram:
    """Concatenates consecutive samples.

    Sequences of unequal length are padded with positions whose gradient is zero.
    """
    if len(grams) == 1:
        return grams[0]
    positions = max(gram.inputs[0].shape[2] for gram in grams)

    def pad(tensor: Tensor, trailing: int) -> Tensor:
        missing = positions - tensor.shape[2]
        return F.pad(tensor, (0, 0) * trailing + (0, missing)) if missing else tensor

    inputs = tuple(
        torch.cat([pad(x, x.dim() - 3) for x in parts]) for parts in zip(*(g.inputs for g in grams), strict=True)
    )
    if grams[0].gradients.dim() == 2:
        return Gram(inputs, grams[0].gradients)
    return Gram(inputs, torch.cat([pad(gram.gradients, 2) for gram in grams]))


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a block of samples.

    Attributes:
        grams: For parameters whose part of the kernel is made of Gram matrices.
        unexpanded: For parameters whose Jacobians are made a piece at a time, when they are multiplied: those of consecutive
            samples, which are never joined.
        jacobians: For all others, their Jacobians `(N, K, P)`, those of small parameters side by side.
        readout: If there is one, the others are factors of its features, which have the place of the outputs.
    """

    grams: tuple[Gram, ...]
    unexpanded: tuple[tuple[Gram, ...], ...]
    jacobians: tuple[Tensor, ...]
    readout: Readout | None = None

    def narrow(self, start: int, stop: int) -> "Factors":
        """The samples `start` to `stop`, without Jacobians that were not made."""
        grams = tuple(gram.narrow(start, stop) for gram in self.grams)
        readout = self.readout and self.readout.narrow(start, stop)
        return Factors(grams, (), tuple(jacobian[start:stop] for jacobian in self.jacobians), readout)

    def to(self, dtype: torch.dtype) -> "Factors":
        """The factors in another floating-point type."""
        grams = tuple(gram.to(dtype) for gram in self.grams)
        unexpanded = tuple(tuple(gram.to(dtype) for gram in grams) for grams in self.unexpanded)
        readout = self.readout and self.readout.to(dtype)
        return Factors(grams, unexpanded, tuple(jacobian.to(dtype) for jacobian in self.jacobians), readout)


def cat_factors(parts: list[Factors]) -> Factors:
    """Concatenates consecutive blocks of samples.

    `parts` is emptied, so that only one factor at a time is in memory twice.
    """
    if len(parts) == 1:
        return parts.pop()
    jacobians = [list(blocks) for blocks in zip(*(part.jacobians for part in parts), strict=True)]
    grams = [list(grams) for grams in zip(*(part.grams for part in parts), strict=True)]
    unexpanded = [tuple(chain(*grams)) for grams in zip(*(part.unexpanded for part in parts), strict=True)]
    readouts = [part.readout for part in parts if part.readout]
    parts.clear()
    return Factors(
        tuple(_cat_once(cat_grams, grams)),
        tuple(unexpanded),
        tuple(_cat_once(torch.cat, jacobians)),
        cat_readouts(readouts) if readouts else None,
    )


def _cat_once(cat: Callable[[list[_T]], _T], pieces: list[list[_T]]) -> Iterator[_T]:
    for index in range(len(pieces)):
        yield cat(pieces[index])
        pieces[index] = []
