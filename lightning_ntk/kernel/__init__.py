"""The empirical NTK of two data sets: rules for functions, per-sample Jacobians for the rest."""

from lightning_ntk.kernel.factors import Dense, Outer
from lightning_ntk.kernel.ntk import PlannedKernel, compute_kernel, count_operations, empirical_ntk
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.kernel.rules.layers import register_rule

__all__ = [
    "Dense",
    "KernelProbe",
    "Outer",
    "PlannedKernel",
    "compute_kernel",
    "count_operations",
    "empirical_ntk",
    "register_rule",
]
