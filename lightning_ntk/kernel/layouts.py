"""Which rows of a factor belong to which sample, found from the gradients of one sample's outputs at a time."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.kernel.factors import Dense, Factor, Outer, Use, gradients_of


class Layout(NamedTuple):
    """The axes `(before, samples, after)` into which rows split; None stands for the size that is left over."""

    before: int | None
    after: int | None


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
    """The layout of every parameter, and those that have none or several; gradients n are those of sample n's outputs."""
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


def arrange_by_sample(uses: Iterable[Use], layouts: Mapping[str, Layout], samples: int) -> dict[str, list[Factor]]:
    """The factors of every parameter that has a layout, each with one row per sample.

    Factors that share their gradients still share them afterwards.
    """
    regrouped: dict[tuple[int, Layout], Tensor] = {}
    arranged: dict[str, list[Factor]] = {}
    for name, factor in uses:
        if name in layouts:
            arranged.setdefault(name, []).append(_by_sample(factor, layouts[name], samples, regrouped))
    return arranged


def _by_sample(factor: Factor, layout: Layout, samples: int, regrouped: dict[tuple[int, Layout], Tensor]) -> Factor:
    """The rows of a sample become positions; those of a dense Jacobian are summed."""
    if isinstance(factor, Dense):
        return Dense(_split(factor.jacobian, layout, samples).sum((0, 2)))
    key = (id(factor.gradients), layout)
    if key not in regrouped:
        gradients = _split(factor.gradients, layout, samples)
        before, _, after = gradients.shape[:3]
        # Where a row is a sample they stay as they are: a last layer's are one tensor, repeated without copies.
        whole = before * after == 1
        regrouped[key] = factor.gradients if whole else gradients.permute(1, 3, 4, 0, 2, 5, 6).flatten(3, 5)
    inputs = _split(factor.inputs, layout, samples)
    trailing = range(4, inputs.dim())
    inputs = inputs.permute(1, 3, 0, 2, *trailing).flatten(2, 4)
    return Outer(inputs, regrouped[key], factor.shape, factor.input_first)


def _split(rows: Tensor, layout: Layout, samples: int) -> Tensor:
    before = -1 if layout.before is None else layout.before
    after = -1 if layout.after is None else layout.after
    return rows.reshape(before, samples, after, *rows.shape[1:])
