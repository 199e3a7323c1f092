"""The twin's loss along stored rows of the Jacobian, where it pays."""

import warnings

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.captured_run import CapturedRun
from lightning_ntk.comparison.stored_rows import StoredSizes, require_worth
from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization.batch_loss import BatchLoss, PairLoss
from lightning_ntk.linearization.labels_of_step import labeled_pair
from lightning_ntk.linearization.pair_of_step import same_gradient
from lightning_ntk.training.stored_loss import StoredLoss
from lightning_ntk.utilities.preserved_objects import preserved_objects


def stored_loss(run: CapturedRun, streamed: BatchLoss) -> tuple[StoredLoss | None, str]:
    """The loss along stored rows of the Jacobian, and a sentence on it.

    The loss is None where the rows are not stored.
    """
    required = run.monitor.jacobian == "stored"
    try:
        with run.processes.agreement(), warnings.catch_warnings():
            if not required:  # where it is known what it costs
                warnings.filterwarnings("ignore", "Per-sample Jacobians are computed one sample at a time")
            with preserved_objects(*([] if run.step is None else [run.step.module]), skip=view.NOT_DATA):
                stored = _store(run, streamed, required=required)
    except Exception as error:  # of any kind: a way that is only cheaper must not end the run
        why = str(error).rstrip(".")
        if required:
            raise ValueError(
                f'Expected fixed samples, a loss of outputs and targets, and no noise for jacobian="stored" but {why}. Use '
                'jacobian="streamed".'
            ) from error
        return None, f"The twin takes passes through the network: {why}."
    return stored, "The twin takes products with stored rows of the Jacobian, and no pass through the network."


def _store(run: CapturedRun, streamed: BatchLoss, *, required: bool) -> StoredLoss:
    if run.data is None:
        raise ValueError(run.no_order)
    if run.monitor.network:
        raise ValueError(run.no_pair)
    free = None if required else run.processes.free_memory(next(iter(streamed.params.values())).device)
    if free is not None:
        require_worth(StoredSizes.least(streamed, len(Reference(run.data))), run.batches, free)
    pair, module = run.pair, run.module if run.step is None else run.step.module
    if pair is None:
        assert run.step is not None
        pair = labeled_pair(run.step, run.batch)
    pair = pair._replace(unpack=pair.unpack or run.monitor.unpacked)
    reference = run.on(run.data, keep_size=True, unpack=pair.unpack)
    if free is not None:
        require_worth(StoredSizes.of(streamed, pair, reference), run.batches, free)
    problem = run.problem(run.data, jacobian="stored", module=module, pair=pair, batch_size=reference.batch_size)
    stored = StoredLoss(problem, PairLoss(problem.linearization, pair.loss, unpack=pair.unpack), streamed)
    if run.batch is not None:
        stored.rows(run.batch)
    if run.step is not None and not same_gradient(run.step, stored, run.batch):
        raise ValueError("the gradient along stored rows is not that of the training step in the first batch")
    return stored
