"""The empirical neural tangent kernel."""

from lightning_ntk.kernel.ntk import compute_kernel, empirical_ntk

__all__ = ["compute_kernel", "empirical_ntk"]
