"""A run beside its linearized network: told of batches and steps, asked for scalars."""

from lightning_ntk.comparison.functions import OutputComparison
from lightning_ntk.comparison.regimes import RegimePanel
from lightning_ntk.comparison.regression import RegressionComparison
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.comparison.step_functions import StepComparison

__all__ = ["OutputComparison", "RegimePanel", "RegressionComparison", "RunComparison", "StepComparison"]
