"""A run beside its linearized network: told of batches and steps, asked for scalars."""

from lightning_ntk.comparison.run_comparison import RunComparison

__all__ = ["RunComparison"]
