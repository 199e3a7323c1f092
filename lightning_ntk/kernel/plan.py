"""The plan of a kernel: which method computes which parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.costs import Cost, Method, vmap_cost
from lightning_ntk.kernel.layouts import Layout
from lightning_ntk.linearization.linearization import Linearization


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
