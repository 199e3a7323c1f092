"""Decides and verifies the plan of a kernel, on a few samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.blocks import PIECE_NUMBERS, add_block, expand
from lightning_ntk.kernel.collection import merge, pack, readout_of, record
from lightning_ntk.kernel.costs import cheapest_method, forward_cost, readout_cost
from lightning_ntk.kernel.factors import Factors, gradients_of
from lightning_ntk.kernel.layouts import arrange_by_sample, find_chosen, find_layouts
from lightning_ntk.kernel.per_sample import random_cotangent
from lightning_ntk.kernel.plan import Plan, PlanChangedError, Unit
from lightning_ntk.kernel.recorder import Usage, record_usage
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.verification import require_dependent
from lightning_ntk.utilities.user_warnings import warn_user

# Samples on which a plan is made and verified: enough to see what belongs to which sample.
_PROBE_SAMPLES = 3
# Relative tolerance of the verification, in roundings of the type of the passes.
_PROBE_ROUNDINGS = 1e4


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
    merged = merge(arrange_by_sample(uses, layouts, samples, chosen), plan.roots)
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
    readout = readout_of(usage.head, merged := merge(arranged, plan.roots), plan.roots)
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


def verify(plan: Plan) -> Plan:
    """Compares each unit with plain autograd, on three samples.

    The test is |D^(1/2) J^T u|^2 = u^T J D J^T u for a random u.

    Warns:
        UserWarning: If they disagree. The parameters are named, and go through vmap in the plan that is returned.
    """
    if all(unit.method == "vmap" for unit in plan.units):
        return plan
    inputs, _ = _probe_inputs(plan.rows)
    merged, outputs, head = record(plan, inputs)
    cotangent = random_cotangent(outputs.shape, outputs)
    expected = plan.linearization.predict_and_vjp([cotangent], inputs)[1][0]
    planned = {name for unit in plan.units for name in unit.names}
    own = {name for name in (head.weight, head.bias) if name} if head else set()
    culprits = {name for name, value in expected.items() if name not in planned | own and value.any()}
    reaching = cotangent @ head.readout.matrix if head else cotangent
    for unit in plan.units:
        scaled_back = [plan.roots[name] * expected[name] for name in unit.names]
        kept = unit.method != "vmap" and own.isdisjoint(unit.names)
        if kept and not _agrees(pack([unit], merged, {}), reaching, scaled_back):
            culprits.update(unit.names)
    if head and own:
        tied = [unit for unit in plan.units if not own.isdisjoint(unit.names)]
        factors = replace(pack(tied, merged, {}), readout=head.readout)
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
