"""The plan of a kernel: which method computes which parameters.

It is decided and verified on a few samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.costs import (
    Cost,
    Method,
    cheapest_method,
    forward_cost,
    readout_cost,
    same_for_all_samples,
    vmap_cost,
)
from lightning_ntk.kernel.factors import (
    PIECE_NUMBERS,
    Dense,
    Factor,
    Factors,
    Gram,
    Outer,
    add_block,
    expand,
    gradients_of,
    gram_of,
    scaled,
)
from lightning_ntk.kernel.layouts import Layout, arrange_by_sample, find_chosen, find_layouts
from lightning_ntk.kernel.per_sample import random_cotangent, sample_jacobians
from lightning_ntk.kernel.readout import Readout
from lightning_ntk.kernel.recorder import Head, Usage, one_hot_cotangents, record_usage
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.linearization.verification import require_dependent
from lightning_ntk.utilities.user_warnings import warn_user

# Samples on which a plan is made and verified: enough to see what belongs to which sample.
_PROBE_SAMPLES = 3
# Relative tolerance of the verification, in roundings of the type of the passes.
_PROBE_ROUNDINGS = 1e4
# Elements of a parameter whose Jacobian is joined with others.
_SMALL = 1024


class PlanChangedError(Exception):
    """A batch uses the parameters in another way than the plan."""


class Unit(NamedTuple):
    """Parameters whose part of the kernel is computed as one.

    Attributes:
        names: Several only where they share their output gradients.
        method: "gram" matrices of inputs and output gradients; "shared" where all samples have the same output
            gradients; "dense" Jacobians made from these, or "expanded" from these when they are multiplied; Jacobians by
            "vmap" where no rule applies.
        cost: The unit's part of the kernel's cost.
    """

    names: tuple[str, ...]
    method: Method
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """What is to be computed, J D J^T between two data sets, and how.

    Attributes:
        linearization: The network, with the parameters of which D is not zero as its variables.
        rows: The first data set.
        columns: The second one, or None for the first one again, with half of the work.
        roots: Square roots of the elements of D, by parameter.
        outputs: K.
        layouts: For every parameter with a rule, where the samples are in its rows.
        chosen: Parameters of layers of which the outputs choose a few outputs.
        readout: The cost of a last linear layer with more outputs than features, where the units are those of the features.
        pass_bytes: Memory for the outputs and output gradients of all calls that have rules, per sample.
        units: The parameters by method.
    """

    linearization: Linearization
    rows: Reference
    columns: Reference | None
    roots: Mapping[str, float]
    outputs: int
    layouts: Mapping[str, Layout]
    chosen: frozenset[str] = frozenset()
    readout: Cost | None = None
    pass_bytes: int = 0
    units: tuple[Unit, ...] = ()

    @property
    def size(self) -> tuple[float, float]:
        """Samples, and pairs of samples of which the kernel is computed."""
        samples = len(self.rows)
        if self.columns is None:
            return samples, samples**2 / 2
        return samples + len(self.columns), samples * len(self.columns)

    @property
    def cost(self) -> Cost:
        """The cost of all units."""
        return sum((unit.cost for unit in self.units), self.readout or Cost())

    @property
    def contracted(self) -> tuple[str, ...]:
        """Parameters without a rule, whose Jacobians are made by vmap."""
        return tuple(name for unit in self.units if unit.method == "vmap" for name in unit.names)

    def contract(self, names: Iterable[str]) -> "Plan":
        """Returns the plan with these parameters computed through vmap.

        The other parameters of their units go with them.
        """
        chosen = set(names)
        split = {name for unit in self.units if chosen.intersection(unit.names) for name in unit.names}
        contracted = tuple(
            Unit((name,), "vmap", vmap_cost(parameter, self.outputs))
            for name, parameter in self.linearization.params.items()
            if name in chosen | split
        )
        kept = tuple(unit for unit in self.units if not split.intersection(unit.names))
        # Only all parameters are ever contracted where there is a readout: their outputs are the network's.
        return replace(self, units=kept + contracted, readout=None if chosen else self.readout)


def make_plan(
    linearization: Linearization,
    rows: Reference,
    columns: Reference | None = None,
    *,
    structured: bool = True,
    roots: Mapping[str, float] | None = None,
) -> Plan:
    """Decides how each parameter's part of the kernel is computed.

    It takes four backward passes over three samples.

    With `structured=False` no rule is used. Raises a ValueError if the outputs are not one row per sample, or depend on no
    trainable parameter. The other arguments are those of the plan.
    """
    inputs, samples = _probe_inputs(rows)

    def cotangents(outputs: Tensor) -> list[Tensor]:
        # One row for all samples, as the one-hot cotangents are: what a last layer makes of it is seen.
        together = random_cotangent(outputs[:1].shape, outputs).expand(1, *outputs.shape)
        one_sample_each = torch.eye(len(outputs)).unsqueeze(2).to(outputs) * random_cotangent(outputs.shape, outputs)
        return [together, one_sample_each]

    params = set(linearization.params)
    usage = (
        record_usage(linearization, inputs, cotangents)
        if structured
        else Usage([[], []], params, linearization.predict(inputs), 0)
    )
    if len(usage.outputs) != samples:
        raise ValueError(
            f"Expected one row of outputs per sample but got {len(usage.outputs)} rows for {samples} samples. "
            "Give `predict=lambda module, inputs: ...` that returns outputs (batch, outputs)."
        )
    uses, of_each_sample = usage.factors
    seen = any(gradients_of(factor).any() for _, factor in of_each_sample)
    if not seen:
        require_dependent(linearization, inputs)
    layouts, coupled = find_layouts(of_each_sample)
    contracted = usage.uncovered | coupled
    layouts = {name: layout for name, layout in layouts.items() if name not in contracted}
    forward = dict.fromkeys(params, 0.0)
    for name, factor in uses:
        forward[name] += forward_cost(factor) / samples
    roots = roots or dict.fromkeys(params, 1.0)
    chosen = find_chosen(arrange_by_sample(uses, layouts, samples))
    outputs = usage.outputs.shape[1]
    pass_bytes = (2 + outputs) * usage.output_bytes // samples
    plan = Plan(linearization, rows, columns, roots, outputs, layouts, chosen, pass_bytes=pass_bytes)
    merged = _merge(arrange_by_sample(uses, layouts, samples, chosen), plan.roots)
    units = []
    for names, factors in merged.items():
        method, cost = cheapest_method(factors, plan.outputs, sum(forward[name] for name in names), plan.size)
        units.append(Unit(names, method, cost))
    plan = replace(plan, units=tuple(units))
    if contracted:
        return plan.contract(contracted)
    by_features = _from_features(plan, inputs, forward) if usage.wide else None
    return min((plan, by_features or plan), key=lambda plan: plan.cost.total(*plan.size))


def _from_features(plan: Plan, inputs: Any, forward: Mapping[str, float]) -> Plan | None:
    """Replaces the outputs of a last linear layer by its features.

    The plan does so where the layer has more outputs than features.
    """
    usage = record_usage(plan.linearization, inputs, lambda _: [], from_features=True)
    if usage.head is None:
        return None
    arranged = arrange_by_sample(usage.factors[0], plan.layouts, len(usage.outputs))
    readout = _readout(usage.head, merged := _merge(arranged, plan.roots), plan.roots)
    if readout is None:
        return None
    units, width = [], readout.matrix.shape[1]
    for names, factors in merged.items():
        passes = sum(forward[name] for name in names if name != usage.head.weight)
        units.append(Unit(names, *cheapest_method(factors, width, passes, plan.size, expand=False)))
    pass_bytes = (2 + width) * usage.output_bytes // len(usage.outputs)
    return replace(
        plan, chosen=frozenset(), readout=readout_cost(readout, plan.outputs), units=tuple(units), pass_bytes=pass_bytes
    )


def _readout(
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


def verify(plan: Plan) -> Plan:
    """Compares each unit with plain autograd, on three samples.

    The test is |D^(1/2) J^T u|^2 = u^T J D J^T u for a random u.

    Warns:
        UserWarning: If they disagree. The parameters are named, and go through vmap in the plan that is returned.
    """
    if all(unit.method == "vmap" for unit in plan.units):
        return plan
    inputs, _ = _probe_inputs(plan.rows)
    merged, outputs, head = _record(plan, inputs)
    cotangent = random_cotangent(outputs.shape, outputs)
    expected = plan.linearization.predict_and_vjp([cotangent], inputs)[1][0]
    planned = {name for unit in plan.units for name in unit.names}
    own = {name for name in (head.weight, head.bias) if name} if head else set()
    culprits = {name for name, value in expected.items() if name not in planned | own and value.any()}
    reaching = cotangent @ head.readout.matrix if head else cotangent
    for unit in plan.units:
        scaled_back = [plan.roots[name] * expected[name] for name in unit.names]
        kept = unit.method != "vmap" and own.isdisjoint(unit.names)
        if kept and not _agrees(_pack([unit], merged, {}), reaching, scaled_back):
            culprits.update(unit.names)
    if head and own:
        tied = [unit for unit in plan.units if not own.isdisjoint(unit.names)]
        factors = replace(_pack(tied, merged, {}), readout=head.readout)
        if not _agrees(factors, cotangent, [plan.roots[name] * expected[name] for name in own]):
            culprits.update(own)
    if head and culprits:
        raise PlanChangedError(f"The parameters {sorted(culprits)} are used in another way than it seemed.")
    if culprits:
        warn_user(
            f"The rules for {', '.join(f'`{name}`' for name in sorted(culprits))} disagree with plain autograd: the network "
            "uses these parameters outside the operations that have rules. Their Jacobians are computed by vmap instead."
        )
    return plan.contract(culprits)


def collect(plan: Plan, inputs: Any) -> Factors:
    """Computes the factors of a batch.

    It takes K backward passes, and Jacobians for parameters without a rule.

    Raises:
        PlanChangedError: If the batch uses parameters in another way than the plan foresees.
    """
    contracted = plan.contracted
    recorded = plan.readout is not None or len(contracted) < len(plan.units)
    merged, _, head = _record(plan, inputs) if recorded else ({}, None, None)
    jacobians = sample_jacobians(plan.linearization, inputs, contracted) if contracted else {}
    factors = _pack(plan.units, merged, {name: plan.roots[name] * value for name, value in jacobians.items()})
    return replace(factors, readout=head.readout) if head else factors


def _record(plan: Plan, inputs: Any) -> tuple[dict[tuple[str, ...], list[Factor]], Tensor, Head | None]:
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
    merged = _merge(arrange_by_sample(usage.factors[0], layouts, len(usage.outputs), plan.chosen), plan.roots)
    if merged.keys() != {unit.names for unit in plan.units if unit.method != "vmap"}:
        raise PlanChangedError("Some samples use the parameters differently from others.")
    if plan.readout is None:
        return merged, usage.outputs, None
    readout = _readout(usage.head, merged, plan.roots) if usage.head else None
    if usage.head is None or readout is None:
        raise PlanChangedError("Some samples choose other outputs of the last layer than others.")
    return merged, usage.outputs, usage.head._replace(readout=readout)


def _pack(units: Sequence[Unit], merged: Mapping[tuple[str, ...], list[Factor]], jacobians: Tensors) -> Factors:
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


def _merge(uses: Mapping[str, list[Factor]], roots: Mapping[str, float]) -> dict[tuple[str, ...], list[Factor]]:
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


def _probe_inputs(rows: Reference) -> tuple[Any, int]:
    inputs = rows.read(0, _PROBE_SAMPLES).inputs
    if len(rows) > 1:
        return inputs, min(_PROBE_SAMPLES, len(rows))
    # One sample alone would not show which axis is the samples'.
    return pytree.tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]), inputs), 2


def _agrees(part: Factors, cotangent: Tensor, expected: Sequence[Tensor]) -> bool:
    square = torch.stack([value.square().sum() for value in expected]).sum()
    kernel = cotangent.new_zeros(*cotangent.shape, *cotangent.shape)
    add_block(kernel, part, part)
    kernel, u = kernel.flatten(2).flatten(0, 1), cotangent.flatten()
    for left, right in expand(part, part, PIECE_NUMBERS):
        kernel.addmm_(left, right.T)
    scale = u.abs() @ kernel.abs() @ u.abs()
    tolerance = _PROBE_ROUNDINGS * torch.finfo(cotangent.dtype).eps
    return bool((u @ kernel @ u - square).abs() <= tolerance * torch.maximum(scale, square))
