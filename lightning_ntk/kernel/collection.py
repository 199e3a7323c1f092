"""The factors of a batch, collected as the plan of the kernel says."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.kernel.costs import same_for_all_samples
from lightning_ntk.kernel.factors import Dense, Factor, Factors, Gram, Outer, gradients_of, gram_of, scaled
from lightning_ntk.kernel.layouts import arrange_by_sample
from lightning_ntk.kernel.per_sample import sample_jacobians
from lightning_ntk.kernel.plan import Plan, PlanChangedError, Unit
from lightning_ntk.kernel.readout import Readout
from lightning_ntk.kernel.recorder import Head, one_hot_cotangents, record_usage
from lightning_ntk.linearization.parameters import Tensors

# Elements of a parameter whose Jacobian is joined with others.
_SMALL = 1024


def collect(plan: Plan, inputs: Any) -> Factors:
    """Computes the factors of a batch.

    It takes K backward passes, and Jacobians for parameters without a rule.

    Raises:
        PlanChangedError: If the batch uses parameters in another way than the plan foresees.
    """
    contracted = plan.contracted
    recorded = plan.readout is not None or len(contracted) < len(plan.units)
    merged, _, head = record(plan, inputs) if recorded else ({}, None, None)
    jacobians = sample_jacobians(plan.linearization, inputs, contracted) if contracted else {}
    factors = pack(plan.units, merged, {name: plan.roots[name] * value for name, value in jacobians.items()})
    return replace(factors, readout=head.readout) if head else factors


def record(plan: Plan, inputs: Any) -> tuple[dict[tuple[str, ...], list[Factor]], Tensor, Head | None]:
    """The factors of every unit that has a rule, and the outputs.

    It also has the last layer where that is kept apart.
    """
    usage = record_usage(
        plan.linearization, inputs, lambda x: [one_hot_cotangents(x)], from_features=plan.readout is not None
    )
    skipped = set(plan.contracted)
    unplanned = {name for name, _ in usage.factors[0]} - plan.layouts.keys() | usage.uncovered
    if changed := unplanned - skipped:
        raise PlanChangedError(f"Some samples use the parameters {sorted(changed)} differently from others.")
    layouts = {name: layout for name, layout in plan.layouts.items() if name not in skipped}
    merged = merge(arrange_by_sample(usage.factors[0], layouts, len(usage.outputs), plan.chosen), plan.roots)
    if merged.keys() != {unit.names for unit in plan.units if unit.method != "vmap"}:
        raise PlanChangedError("Some samples use the parameters differently from others.")
    if plan.readout is None:
        return merged, usage.outputs, None
    readout = readout_of(usage.head, merged, plan.roots) if usage.head else None
    if usage.head is None or readout is None:
        raise PlanChangedError("Some samples choose other outputs of the last layer than others.")
    return merged, usage.outputs, usage.head._replace(readout=readout)


def pack(units: Sequence[Unit], merged: Mapping[tuple[str, ...], list[Factor]], jacobians: Tensors) -> Factors:
    """Lays factors out for products.

    There is a Gram for each unit that has one, and the dense Jacobians.
    """
    grams: list[Gram] = []
    unexpanded: list[tuple[Gram, ...]] = []
    dense = list(jacobians.values())
    for unit in units:
        factors = merged.get(unit.names, [])
        if unit.method == "dense":
            dense += [factor.dense() for factor in factors]
        elif unit.method != "vmap":
            outers = [factor for factor in factors if isinstance(factor, Outer)]
            shared = unit.method == "shared"
            if len(outers) < len(factors) or (shared and not same_for_all_samples(outers[0])):
                raise PlanChangedError(f"Some samples use the parameters {sorted(unit.names)} differently from others.")
            gram = gram_of(outers, shared=shared)
            if unit.method == "expanded":
                unexpanded.append((gram,))
            else:
                grams.append(gram)
    flat = [jacobian.reshape(*jacobian.shape[:2], -1) for jacobian in dense]  # also of a parameter without axes
    small = [jacobian for jacobian in flat if jacobian.shape[2] < _SMALL]
    # Many short products cost more than one long one; copies of large Jacobians cost more than they save.
    joined = [torch.cat(small, 2)] if small else []
    large = (jacobian for jacobian in flat if jacobian.shape[2] >= _SMALL)
    return Factors(tuple(grams), tuple(unexpanded), (*joined, *large))


def merge(uses: Mapping[str, list[Factor]], roots: Mapping[str, float]) -> dict[tuple[str, ...], list[Factor]]:
    """Merges factors into one per parameter.

    Several uses become positions of one. Parameters with the same gradients become one group.
    """
    joined: dict[tuple[int, ...], Tensor] = {}
    groups: dict[int, dict[str, Factor]] = {}
    for name, factors in uses.items():
        outers = [factor for factor in factors if isinstance(factor, Outer)]
        kinds = {(f.one_hot, f.input_first, f.gradients.shape[2], f.gradients.shape[4]) for f in outers}
        factor = factors[0]
        if len(outers) < len(factors) or len(kinds) > 1:
            if len(factors) > 1:
                factor = _sum_of(factors)
        elif len(outers) > 1:
            key = tuple(id(f.gradients) for f in outers)
            if key not in joined:
                joined[key] = torch.cat([f.gradients for f in outers], 3)
            factor = replace(outers[0], inputs=torch.cat([f.inputs for f in outers], 2), gradients=joined[key])
        factor = scaled(factor, roots[name])
        groups.setdefault(id(gradients_of(factor)), {})[name] = factor
    return {tuple(group): list(group.values()) for group in groups.values()}


def _sum_of(factors: Sequence[Factor]) -> Dense:
    """Sums the Jacobian through uses of different kinds.

    At most two are in memory at a time.
    """
    total = factors[0].dense().clone()
    for factor in factors[1:]:
        total += factor.dense()
    return Dense(total)


def readout_of(
    head: Head, merged: Mapping[tuple[str, ...], Sequence[Factor]], roots: Mapping[str, float]
) -> Readout | None:
    """The readout with its elements of D; None if not applicable.

    Its weight may be an embedding too; for other uses of the weight it is None.
    """
    weight, bias = (roots.get(name or "", 0.0) for name in (head.weight, head.bias))
    readout = replace(head.readout, scales=(weight**2, bias**2))
    for names, factors in merged.items():
        if head.bias in names or (head.weight in names and len(names) > 1):
            return None
        if head.weight in names:
            (factor,) = factors
            if not isinstance(factor, Outer) or not factor.one_hot or not factor.input_first:
                return None
            # Of the two roots of D in these products, `scales` holds both.
            gradients = factor.gradients[:, :, 0].transpose(1, 2) / weight
            readout = replace(readout, tokens=factor.inputs[:, 0], gradients=gradients)
    return readout
