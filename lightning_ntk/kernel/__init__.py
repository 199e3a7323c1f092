"""The empirical neural tangent kernel."""

from lightning_ntk.kernel.factors import Dense, Outer
from lightning_ntk.kernel.layers import register_rule
from lightning_ntk.kernel.ntk import compute_kernel, empirical_ntk

__all__ = ["Dense", "Outer", "compute_kernel", "empirical_ntk", "register_rule"]
