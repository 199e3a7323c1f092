"""The empirical neural tangent kernel."""

from lightning_ntk.kernel.factors import Dense, Outer
from lightning_ntk.kernel.ntk import compute_kernel, empirical_ntk
from lightning_ntk.kernel.plan import count_operations
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.kernel.rules.layers import register_rule

__all__ = ["Dense", "KernelProbe", "Outer", "compute_kernel", "count_operations", "empirical_ntk", "register_rule"]
