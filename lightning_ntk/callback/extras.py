"""Optional measurements on reference samples: the kernel, the regimes and kernel regression."""

from torch import nn

from lightning_ntk.callback.captured_run import CapturedRun
from lightning_ntk.comparison.regimes import RegimePanel
from lightning_ntk.comparison.regression import RegressionComparison
from lightning_ntk.data.reference import Reference, evenly_spaced
from lightning_ntk.kernel import KernelProbe
from lightning_ntk.linearization.batch_loss import BatchLoss, PairLoss
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.pair_of_step import Pair
from lightning_ntk.utilities.contexts import preserved_rng

# Rows of the kernels of kernel regression, at most: all modes of so many take 40 m^2 bytes, 640 MiB.
_REGRESSION_ROWS = 4096


@preserved_rng()
def kernel_probe(run: CapturedRun, loss: BatchLoss) -> KernelProbe | None:
    """The kernel of a few samples, to follow; None if not requested."""
    samples = run.monitor.kernel_probe
    return KernelProbe(*_samples_for(run, "kernel_probe", loss), samples=samples) if samples else None


@preserved_rng()
def regime_panel(run: CapturedRun, loss: BatchLoss) -> RegimePanel | None:
    """The panel of regimes; None if not requested."""
    if not run.monitor.regime:
        return None
    linearization, reference = _samples_for(run, "regime", loss)
    assert run.pair is not None
    return RegimePanel(linearization, reference, run.pair.loss, processes=run.processes)


def _samples_for(run: CapturedRun, argument: str, loss: BatchLoss) -> tuple[Linearization, Reference]:
    """The network at w0 and some reference samples, for an optional measurement."""
    if run.data is None or run.pair is None:
        why = run.no_pair if run.pair is None else "there is none"
        raise ValueError(
            f"Expected samples of a reference set with outputs (samples, outputs) for argument `{argument}` but {why}. "
            f"Leave out `{argument}`; or give `reference` a data set with a fixed order, and `loss`."
        )
    linearization = loss.linearization if isinstance(loss, PairLoss) else run.linearization()
    return linearization, run.on(run.data)


def regression_comparison(run: CapturedRun) -> RegressionComparison | None:
    """Kernel regression on some samples of the reference.

    It uses the squared loss of the run, or the mean squared error.
    """
    monitor, pair = run.monitor, run.eval_pair
    if not monitor.kernels:
        return None
    if run.data is None or pair is None:
        raise ValueError(
            "Expected a reference set, and a loss of outputs (samples, outputs) and targets, for argument `kernels` but "
            f"{run.no_pair if pair is None else run.no_order}. Leave out `kernels`; or give `reference` a data set with "
            "a fixed order, and `loss`."
        )
    try:
        few, most = run.problem(evenly_spaced(run.data, 2), pair), monitor.reference_samples
        if few.objective.factor is None:
            pair = Pair(nn.MSELoss(), pair.predict)
        if most is not None:
            most = min(most, max(1, _REGRESSION_ROWS // few.predictions.shape[1]))
        problem = run.problem(evenly_spaced(run.data, most), pair)
        problem.objective.require_factor()
    except ValueError as error:
        raise ValueError(f"{error} Argument `kernels` needs targets of a squared loss; or leave it out.") from error
    other = None if monitor.evaluation is None else evenly_spaced(monitor.evaluation, monitor.reference_samples)
    return RegressionComparison(problem, other, monitor.kernels)
