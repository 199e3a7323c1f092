"""The empirical neural tangent kernel."""

from lightning_ntk.kernel import elementwise as elementwise  # registers its rules
from lightning_ntk.kernel.factors import Dense, Outer
from lightning_ntk.kernel.layers import register_rule
from lightning_ntk.kernel.ntk import compute_kernel, empirical_ntk
from lightning_ntk.kernel.plan import count_operations

__all__ = ["Dense", "Outer", "compute_kernel", "count_operations", "empirical_ntk", "register_rule"]
