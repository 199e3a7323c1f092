"""How the kernel of a network is computed: which rule for which parameters, verified on a few samples."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.costs import (
    PASS_COST,
    Cost,
    Method,
    cheapest_method,
    forward_cost,
    kernel_size,
    same_for_all_samples,
)
from lightning_ntk.kernel.factors import Dense, Factor, Factors, Gram, Outer, add_block, gram_of
from lightning_ntk.kernel.per_sample import sample_jacobians
from lightning_ntk.kernel.recorder import (
    Layout,
    Usage,
    UsedParameter,
    by_sample,
    find_layout,
    gradient_support,
    one_hot_cotangents,
    record_usage,
)
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors

# Samples on which a plan is made and verified: enough to see what belongs to which sample.
_PROBE_SAMPLES = 3
# Relative tolerance of the verification, in roundings of the type of the passes.
_PROBE_ROUNDINGS = 1e4
# Elements of a parameter whose Jacobian is joined with others.
_SMALL = 1024


class PlanChangedError(Exception):
    """A batch uses the parameters in another way than the samples on which the plan was made."""


class Unit(NamedTuple):
    """Parameters whose part of the kernel is computed as one.

    Attributes:
        names: Several only where they share their output gradients.
        method: "gram" of positions; "shared" Gram, where all samples have the same output gradients; "dense" Jacobians.
    """

    names: tuple[str, ...]
    method: Method


class Operations(NamedTuple):
    """Floating-point operations, two for a multiply-add of a long matrix product.

    Attributes:
        kernel: Of the kernel of a data set with itself.
        forward: Of one forward pass over the data set.
    """

    kernel: float
    forward: float


@dataclass(frozen=True)
class Plan:
    """How the kernel of a network is computed.

    Attributes:
        layouts: For every parameter with a rule, where the samples are in its rows.
        units: Parameters computed by rules.
        contracted: Parameters whose Jacobians are made by vmap.
        cost: Operations, from the passes to the kernel.
        factor_bytes: Memory for the factors of one sample.
        pass_bytes: Memory for one sample during the passes that make them.
    """

    layouts: dict[str, Layout]
    units: tuple[Unit, ...]
    contracted: tuple[str, ...]
    cost: Cost
    factor_bytes: int
    pass_bytes: int


def make_plan(linearization: Linearization, rows: Reference, columns: Reference | None) -> Plan:
    """Decides, for every parameter, how its part of the kernel between two data sets is computed.

    Each part is verified on the first samples: u^T Theta_p u = |J_p^T u|^2 for a random u, the right-hand side by plain
    autograd.

    Warns:
        UserWarning: If they disagree, with the names of the parameters, which are then contracted.
    """
    inputs, samples = _probe_inputs(rows)
    cotangent: list[Tensor] = []

    def cotangents(outputs: Tensor) -> list[Tensor]:
        cotangent.append(_random_cotangent(outputs))
        return [one_hot_cotangents(outputs), _one_sample_each(cotangent[0])]

    usage = record_usage(linearization, inputs, cotangents)
    if len(usage.outputs) != samples:
        raise PlanChangedError(f"Expected outputs for {samples} samples but got {len(usage.outputs)}.")
    layouts, coupled = _find_layouts(usage.factors[1])
    used = {name for name, _ in usage.factors[0]}
    merged = _merge(_by_parameter(usage.factors[0], layouts, samples, usage.uncovered | coupled))
    outputs = usage.outputs.shape[1]
    sizes = len(rows), len(columns or rows)
    choices = {
        names: cheapest_method(factors, outputs, *sizes, symmetric=columns is None) for names, factors in merged.items()
    }
    units = tuple(Unit(names, method) for names, (method, _) in choices.items())

    expected = linearization.predict_and_vjp([cotangent[0]], inputs)[1][0]
    parts = [pack([unit], merged, {}) for unit in units]
    unused = linearization.params.keys() - used - usage.uncovered
    culprits = {name for name in unused if expected[name].any()}
    for unit, part in zip(units, parts, strict=True):
        if not _agrees(part, cotangent[0], [expected[name] for name in unit.names]):
            culprits |= set(unit.names)
    if culprits:
        warnings.warn(
            f"The rules for {', '.join(f'`{name}`' for name in sorted(culprits))} disagree with plain autograd: the network "
            "uses these parameters in a way that its layers do not show. They are computed by contraction instead.",
            stacklevel=4,
        )
    contracted = usage.uncovered | coupled | culprits
    kept = [not contracted.intersection(unit.names) for unit in units]
    itemsize = linearization.dtype.itemsize
    direct = sum(linearization.params[name].numel() for name in contracted) * outputs * itemsize
    factor_bytes = direct + sum(part.nbytes for part, keep in zip(parts, kept, strict=True) if keep) // samples
    tensors = {id(t): t for _, factor in usage.factors[0] for t in _tensors(factor)}
    return Plan(
        layouts,
        tuple(unit for unit, keep in zip(units, kept, strict=True) if keep),
        tuple(name for name in linearization.params if name in contracted),
        _total_cost(
            linearization,
            usage,
            [cost for names, (_, cost) in choices.items() if not contracted.intersection(names)],
            contracted,
        ),
        factor_bytes,
        factor_bytes + 2 * sum(t.numel() * t.element_size() for t in tensors.values()) // samples,
    )


def count_operations(linearization: Linearization, reference: Reference) -> Operations:
    """What the kernel of a data set with itself and a pass over it would cost, from two backward passes over few samples.

    The plan is made as for the kernel, but not verified.
    """
    inputs, samples = _probe_inputs(reference)

    def cotangents(outputs: Tensor) -> list[Tensor]:
        # One row for all samples, as the one-hot cotangents are: what a last layer makes of it is seen.
        return [outputs.new_ones(1, 1, 1).expand(1, *outputs.shape), _one_sample_each(_random_cotangent(outputs))]

    usage = record_usage(linearization, inputs, cotangents)
    size = len(reference)
    if len(usage.outputs) != samples:  # for the first pass over the data to complain about
        return Operations(float(size) ** 2 * linearization.num_parameters, float(size) * linearization.num_parameters)
    layouts, coupled = _find_layouts(usage.factors[1])
    contracted = usage.uncovered | coupled
    merged = _merge(_by_parameter(usage.factors[0], layouts, samples, contracted))
    outputs = usage.outputs.shape[1]
    costs = [cheapest_method(factors, outputs, size, size, symmetric=True)[1] for factors in merged.values()]
    total = _total_cost(linearization, usage, costs, contracted)
    return Operations(
        2 * total.total(*kernel_size(size, size, symmetric=True)),
        2 * size * _forward_cost(linearization, usage, contracted),
    )


def _forward_cost(linearization: Linearization, usage: Usage, contracted: set[str]) -> float:
    """Multiply-adds of a forward pass of one sample, as far as they are with parameters."""
    covered = [factor for name, factor in usage.factors[0] if name not in contracted]
    rest = sum(linearization.params[name].numel() for name in contracted)
    return forward_cost(covered, len(usage.outputs)) + rest


def _total_cost(linearization: Linearization, usage: Usage, costs: Sequence[Cost], contracted: set[str]) -> Cost:
    """That of the passes, of all units, and of the parameters without a rule."""
    outputs = usage.outputs.shape[1]
    passes = PASS_COST * (1 + 2 * outputs) * _forward_cost(linearization, usage, contracted)
    direct = sum(linearization.params[name].numel() for name in contracted)
    return sum(costs, Cost((2 if contracted else 1) * passes, outputs**2 * direct))


def collect(linearization: Linearization, inputs: Any, plan: Plan) -> Factors:
    """The factors of a batch, from K backward passes and, for parameters without a rule, their Jacobians.

    Raises:
        PlanChangedError: If the batch uses parameters in another way than the plan foresees.
    """
    usage = record_usage(linearization, inputs, lambda outputs: [one_hot_cotangents(outputs)])
    skipped = set(plan.contracted)
    if usage.uncovered - skipped:
        raise PlanChangedError(
            f"Some samples use the parameters {sorted(usage.uncovered - skipped)} differently from others."
        )
    merged = _merge(_by_parameter(usage.factors[0], plan.layouts, len(usage.outputs), skipped))
    if merged.keys() != {unit.names for unit in plan.units}:
        raise PlanChangedError("Some samples use the parameters differently from others.")
    jacobians = sample_jacobians(linearization, inputs, plan.contracted) if plan.contracted else {}
    return pack(plan.units, merged, jacobians)


def pack(units: Sequence[Unit], merged: dict[tuple[str, ...], list[Factor]], jacobians: Tensors) -> Factors:
    """The factors laid out for products: a Gram for each unit that has one, and the dense Jacobians."""
    grams: list[Gram] = []
    dense: list[Tensor] = [_by_row(jacobian) for jacobian in jacobians.values()]
    for unit in units:
        factors = merged[unit.names]
        if unit.method == "dense":
            dense += [_by_row(factor.dense()) for factor in factors]
            continue
        outers = [factor for factor in factors if isinstance(factor, Outer)]
        shared = unit.method == "shared"
        if len(outers) < len(factors) or (shared and not same_for_all_samples(outers[0])):
            raise PlanChangedError(f"Some samples use the parameters {sorted(unit.names)} differently from others.")
        grams.append(gram_of(outers, shared=shared))
    small = [jacobian for jacobian in dense if jacobian.shape[2] < _SMALL]
    # Many short products cost more than one long one; copies of large Jacobians cost more than they save.
    joined = [torch.cat(small, 2)] if small else []
    return Factors(tuple(grams), (*joined, *(jacobian for jacobian in dense if jacobian.shape[2] >= _SMALL)))


def _by_row(jacobian: Tensor) -> Tensor:
    """`(N, K, P)`, also for a parameter without axes."""
    return jacobian.reshape(*jacobian.shape[:2], -1)


def _probe_inputs(rows: Reference) -> tuple[Any, int]:
    inputs = rows.read(0, _PROBE_SAMPLES).inputs
    if len(rows) > 1:
        return inputs, min(_PROBE_SAMPLES, len(rows))
    # One sample alone would not show which axis is the samples'.
    return pytree.tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]), inputs), 2


def _random_cotangent(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Drawn on the CPU, so that the numbers are the same on every device.
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def _one_sample_each(cotangent: Tensor) -> Tensor:
    """A stack of `(N, K)` for every sample, zero for the others."""
    return torch.eye(len(cotangent), dtype=cotangent.dtype, device=cotangent.device).unsqueeze(2) * cotangent


def _find_layouts(factors: Iterable[UsedParameter]) -> tuple[dict[str, Layout], set[str]]:
    """Where the samples are in the rows of every parameter, and the parameters for which there is no answer."""
    layouts: dict[str, Layout] = {}
    without: set[str] = set()
    known: dict[int, Layout | None] = {}
    for name, factor in factors:
        gradients = factor.gradients if isinstance(factor, Outer) else factor.jacobian
        if id(gradients) not in known:
            known[id(gradients)] = find_layout(gradient_support(factor))
        layout = known[id(gradients)]
        if layout is None or layouts.setdefault(name, layout) != layout:
            without.add(name)
    return layouts, without


def _by_parameter(
    factors: Iterable[UsedParameter], layouts: dict[str, Layout], samples: int, skipped: set[str]
) -> dict[str, list[Factor]]:
    regrouped: dict[tuple[int, Layout], Tensor] = {}
    uses: dict[str, list[Factor]] = {}
    for name, factor in factors:
        if name in skipped:
            continue
        if name not in layouts:
            raise PlanChangedError(f"Some samples use the parameter `{name}` and others do not.")
        uses.setdefault(name, []).append(by_sample(factor, layouts[name], samples, regrouped))
    return uses


def _merge(uses: dict[str, list[Factor]]) -> dict[tuple[str, ...], list[Factor]]:
    """One factor a parameter: several uses become positions of one, and parameters with the same gradients one group."""
    joined: dict[tuple[int, ...], Tensor] = {}
    groups: dict[int, dict[str, Factor]] = {}
    for name, factors in uses.items():
        outers = [factor for factor in factors if isinstance(factor, Outer)]
        kinds = {(f.one_hot, f.input_first, f.gradients.shape[2], f.gradients.shape[4]) for f in outers}
        factor: Factor
        if len(outers) < len(factors) or len(kinds) > 1:
            factor = factors[0] if len(factors) == 1 else _sum_of(factors)
            groups[id(factor)] = {name: factor}
            continue
        key = tuple(id(f.gradients) for f in outers)
        if len(outers) == 1:
            factor = outers[0]
            gradients = factor.gradients
        else:
            if key not in joined:
                joined[key] = torch.cat([f.gradients for f in outers], 3)
            gradients = joined[key]
            factor = Outer(torch.cat([f.inputs for f in outers], 2), gradients, outers[0].shape, outers[0].input_first)
        groups.setdefault(id(gradients), {})[name] = factor
    return {tuple(group): list(group.values()) for group in groups.values()}


def _sum_of(factors: Sequence[Factor]) -> Dense:
    """The Jacobian through uses of different kinds, of which at most two are in memory at a time."""
    total = factors[0].dense().clone()
    for factor in factors[1:]:
        total += factor.dense()
    return Dense(total)


def _agrees(part: Factors, cotangent: Tensor, expected: Sequence[Tensor]) -> bool:
    kernel = cotangent.new_zeros(*cotangent.shape, *cotangent.shape)
    add_block(kernel, part, part)
    kernel, u = kernel.flatten(2).flatten(0, 1), cotangent.flatten()
    quadratic = u @ kernel @ u
    squares = torch.stack([value.square().sum() for value in expected]).sum()
    scale = u.abs() @ kernel.abs() @ u.abs()
    tolerance = _PROBE_ROUNDINGS * torch.finfo(cotangent.dtype).eps
    return bool((quadratic - squares).abs() <= tolerance * torch.maximum(scale, squares))


def _tensors(factor: Factor) -> tuple[Tensor, ...]:
    return (factor.inputs, factor.gradients) if isinstance(factor, Outer) else (factor.jacobian,)
