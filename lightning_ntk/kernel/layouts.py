"""Finds which rows of a factor belong to which sample.

It uses the gradients of one sample's outputs at a time.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.kernel.factors import Dense, Factor, Outer, Use, gradients_of

# Of so many elements of a position's output gradients at most one is not zero, where a few logits are chosen of many.
_CHOSEN = 4


class Layout(NamedTuple):
    """The axes `(before, samples, after)` into which rows split.

    None stands for the size that is left over.
    """

    before: int | None
    after: int | None


class _Regrouped(NamedTuple):
    """The gradients of a call by sample, `(N, K, G, T, O)`.

    It also has the positions `(N, T)` of a sample's rows.
    """

    gradients: Tensor
    kept: Tensor | None


def find_layout(support: Tensor) -> Layout | None:
    """Which rows belong to which sample, None if one belongs to several.

    `support`, `(R, N)`, is the size of the gradient of each sample's outputs in each row.
    """
    rows, samples = support.shape
    if rows % samples:
        return None
    repeats = rows // samples
    layouts = [Layout(1, None), Layout(None, 1)]
    layouts += [Layout(before, repeats // before) for before in range(2, repeats) if repeats % before == 0]
    threshold = 1e3 * torch.finfo(support.dtype).eps * support.max()
    for layout in layouts:
        before = repeats if layout.before is None else layout.before
        owned = support.reshape(before, samples, repeats // before, samples)
        foreign = owned.amax((0, 2)).fill_diagonal_(0)
        if foreign.max() <= threshold:
            return layout
    return None


def find_layouts(uses: Iterable[Use]) -> tuple[dict[str, Layout], set[str]]:
    """Finds each parameter's layout, and parameters with none or several.

    Element n of the gradients is that of sample n's outputs.
    """
    layouts: dict[str, Layout] = {}
    coupled: set[str] = set()
    known: dict[int, Layout | None] = {}
    for name, factor in uses:
        gradients = gradients_of(factor)
        if id(gradients) not in known:
            known[id(gradients)] = find_layout(gradients.abs().flatten(2).amax(2))
        layout = known[id(gradients)]
        if layout is None or layouts.setdefault(name, layout) != layout:
            coupled.add(name)
    return layouts, coupled


def arrange_by_sample(
    uses: Iterable[Use], layouts: Mapping[str, Layout], samples: int, chosen: Container[str] = ()
) -> dict[str, list[Factor]]:
    """Arranges factors with one row per sample.

    It covers every parameter that has a layout.

    Factors that share their gradients still share them afterwards, except for the parameters in `chosen`. The factors
    of these all have one-hot inputs, whatever the layers are.
    """
    regrouped: dict[tuple[int, Layout], _Regrouped] = {}
    arranged: dict[str, list[Factor]] = {}
    for name, factor in uses:
        if name in layouts:
            factor = _by_sample(factor, layouts[name], samples, regrouped)
            if name in chosen and isinstance(factor, Outer) and not factor.one_hot:
                factor = factor.by_columns()
            arranged.setdefault(name, []).append(factor)
    return arranged


def find_chosen(arranged: Mapping[str, Sequence[Factor]]) -> frozenset[str]:
    """Finds layers of which the network's outputs choose a few outputs.

    Label words of a vocabulary are an example. Returns the layers' parameters.
    """
    chosen = set()
    for name, factors in arranged.items():
        layers = [factor for factor in factors if isinstance(factor, Outer) and not factor.one_hot]
        tied = len(layers) < len(factors)
        if layers and all(_chooses(layer, tied=tied) for layer in layers):
            chosen.add(name)
    return frozenset(chosen)


def _chooses(layer: Outer, *, tied: bool) -> bool:
    """Whether one-hot inputs save memory.

    They are compared with the layer's own factor, or with the Jacobian of a tied weight.
    """
    size = layer.gradients.shape[4]
    if layer.gradients.shape[2] > 1 or layer.gradients.stride(0) == 0:
        return False
    count = layer.count_columns()
    return count * _CHOSEN <= size and (tied or count * layer.width <= size)


def _by_sample(factor: Factor, layout: Layout, samples: int, regrouped: dict[tuple[int, Layout], _Regrouped]) -> Factor:
    """Turns the rows of a sample into positions.

    Rows that reach no output are left out; those of a dense Jacobian are summed.
    """
    if isinstance(factor, Dense):
        return Dense(_split(factor.jacobian, layout, samples).sum((0, 2)))
    key = (id(factor.gradients), layout)
    if key not in regrouped:
        regrouped[key] = _regroup(factor.gradients, layout, samples)
    gradients, kept = regrouped[key]
    inputs = _split(factor.inputs, layout, samples)
    trailing = range(4, inputs.dim())
    inputs = inputs.permute(1, 3, 0, 2, *trailing).flatten(2, 4)
    if kept is not None:
        index = kept.reshape(samples, 1, -1, *(1,) * (inputs.dim() - 3))
        inputs = inputs.take_along_dim(index, 2)
    return Outer(inputs, gradients, factor.shape, factor.input_first)


def _regroup(gradients: Tensor, layout: Layout, samples: int) -> _Regrouped:
    split = _split(gradients, layout, samples)
    before, _, after = split.shape[:3]
    if before * after == 1:
        # They stay as they are: a last layer's are one tensor, repeated without copies.
        return _Regrouped(gradients, None)
    gradients = split.permute(1, 3, 4, 0, 2, 5, 6).flatten(3, 5)
    reaching = gradients.any(4).any(2).any(1)
    most, kept = max(1, int(reaching.sum(1).max())), None
    if most < reaching.shape[1]:
        kept = reaching.int().topk(most, 1).indices
        gradients = gradients.take_along_dim(kept[:, None, None, :, None], 3)
    return _Regrouped(gradients, kept)


def _split(rows: Tensor, layout: Layout, samples: int) -> Tensor:
    before = -1 if layout.before is None else layout.before
    after = -1 if layout.after is None else layout.after
    return rows.reshape(before, samples, after, *rows.shape[1:])
