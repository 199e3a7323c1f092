"""Functions compared through the training step: what it computes in eval mode, batch by batch, and nothing kept."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_ntk.data.batches import tensors_in
from lightning_ntk.data.reference import Reference
from lightning_ntk.functional.predictions import error_sums, root_mean, taylor_sums
from lightning_ntk.functional.weights import ratio_of_norms
from lightning_ntk.linearization.cut_step import LossCall
from lightning_ntk.linearization.step import Evaluation, StepLinearization
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes


class StepComparison:
    """Functions compared by what the training step computes of them in eval mode.

    The trained network has its own weights and buffers, the linearized one those of its passes in train mode. The expansion of
    the trained network is that of the run's function, with the run's buffers. Losses are means over batches with the number
    of samples as weights; root mean squares are over all elements of the outputs.

    Args:
        step: The linearized network of the training step.
        data: The data set.
        taylor: Whether to expand the trained network around w0, at the cost of a forward-mode pass.
        keeps_outputs: Whether to keep outputs `(samples, K)` of the last comparison.
        announce: Called with the number of each batch before the step gets it.
        processes: The processes that share the batches.
    """

    outputs: tuple[Tensor, Tensor] | None = None
    """Outputs of both networks at the last comparison, `(N, K)` in float64 on the CPU each; None where they are not kept."""

    def __init__(
        self,
        step: StepLinearization,
        data: Reference,
        *,
        taylor: bool = True,
        keeps_outputs: bool = False,
        announce: Callable[[int], None] = lambda number: None,
        processes: Processes = ALONE,
    ) -> None:
        self._step = step
        self._data = data
        self._taylor = taylor
        self._announce = announce
        self._keeps_outputs = keeps_outputs and processes.size == 1
        self._processes = processes
        self._fingerprint = ""
        if processes.size > 1:
            processes.require_same(self.fingerprint, "reference data")

    def __len__(self) -> int:
        return len(self._data)

    @property
    def fingerprint(self) -> str:
        """A digest of the first batch and the number of samples; of the number alone where samples are drawn at random."""
        if not self._fingerprint:
            with preserved_rng():  # around both, so that random samples differ
                first, again = self._digest(), self._digest()
            number = hashlib.sha256(str(len(self)).encode()).hexdigest()
            self._fingerprint = first if first == again else number
        return self._fingerprint

    def _digest(self) -> str:
        digest = hashlib.sha256(str(len(self)).encode())
        for tensor in tensors_in(next(self._data.whole())[1]):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def compare(
        self,
        weights: Mapping[str, Tensor],
        displacement: Mapping[str, Tensor],
        linearized: Mapping[str, Tensor],
        predictions: Tensor | None = None,
    ) -> dict[str, float]:
        """Compares trained weights and buffers with the linearized network, see `FunctionComparison`.

        Raises:
            ValueError: If the training step has no loss in eval mode.
        """
        step, sums = self._step, _Sums()
        kept: list[tuple[Tensor, ...]] = []
        if self._processes.size > 1:  # the first process's buffers count, as in distributed training
            names = [name for name, _ in step.module.named_buffers()]
            weights = {**weights, **{name: self._processes.broadcast_(weights[name].clone()) for name in names}}
            for buffer in step.module.buffers():
                self._processes.broadcast_(buffer)
        around_start = {**weights, **step.params}  # the buffers of the run
        for number, (rows, batch) in enumerate(self._data.whole()):
            if number % self._processes.size != self._processes.rank:
                continue
            self._announce(number)
            trained = step.evaluate(batch, weights)
            lin = step.evaluate(batch, None, linearized)
            if trained is None or lin is None:  # a batch that the step leaves out
                continue
            size = rows.stop - rows.start
            sums.add_loss("", trained, size)
            sums.add_loss("linearized_", lin, size)
            for own, other in zip(trained.outputs, lin.outputs, strict=True):
                sums.add("rmse", *error_sums(own, other))
            if self._keeps_outputs and [output.dim() for output in trained.outputs] in ([1], [2]):
                pair = trained.outputs[0], lin.outputs[0]
                kept.append(tuple(o.cpu().double().reshape(len(o), -1) for o in pair))
            del lin
            taylor = step.evaluate(batch, around_start, displacement) if self._taylor else None
            if taylor is not None:
                sums.add_loss("taylor_", taylor, size)
                for own, other, start in zip(trained.outputs, taylor.outputs, taylor.starts, strict=True):
                    sums.add("taylor", *taylor_sums(own, other, start))
        self.outputs = (torch.cat([own for own, _ in kept]), torch.cat([other for _, other in kept])) if kept else None
        return sums.scalars(self._processes, taylor=self._taylor)


class _Sums:
    """Sums over batches of numerators and denominators."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[float]] = {}

    def add(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        pair = self._pairs.setdefault(name, [0.0, 0.0])
        pair[0] += float(numerator)
        pair[1] += float(denominator)

    def add_loss(self, kind: str, evaluation: Evaluation, size: int) -> None:
        self.add(f"{kind}loss", size * evaluation.loss.double(), size)
        counted = _correct(evaluation.losses)
        if counted is not None:
            self.add(f"{kind}accuracy", *counted)

    def scalars(self, processes: Processes, *, taylor: bool) -> dict[str, float]:
        names = ["loss", "linearized_loss", "rmse", "taylor", "accuracy", "linearized_accuracy", "taylor_accuracy"]
        flat = torch.tensor([self._pairs.get(name, [0.0, 0.0]) for name in names], dtype=torch.float64)
        pairs = dict(zip(names, processes.sum_(flat), strict=True))
        if pairs["loss"][1] == 0:
            raise ValueError(
                "Expected a training step that computes a loss in eval mode, to compare functions, but it returned None for "
                "all batches. Use reference=None to compare weights only."
            )
        scalars = {"prediction_rmse": root_mean(*pairs["rmse"]).item()}
        for name in ("loss", "linearized_loss"):
            scalars[name] = (pairs[name][0] / pairs[name][1]).item()
        if taylor:
            scalars["taylor_gap"] = ratio_of_norms(*pairs["taylor"]).item()
        for name in ("accuracy", "linearized_accuracy", "taylor_accuracy"):
            if pairs[name][1] > 0:
                scalars[name] = (pairs[name][0] / pairs[name][1]).item()
        return scalars


def _correct(losses: list[LossCall]) -> tuple[float, float] | None:
    """How many labels the only classification loss of a batch finds right, and how many there are; None without one."""
    counted = [pair for call in losses if (pair := _correct_of(call)) is not None]
    return counted[0] if len(counted) == 1 else None


def _correct_of(call: LossCall) -> tuple[float, float] | None:
    if len(call.args) < 2 or not all(isinstance(tensor, Tensor) for tensor in call.args[:2]):
        return None
    outputs, target = call.args[:2]
    if call.function in (F.cross_entropy, F.nll_loss) and not target.is_floating_point():
        predicted = outputs.argmax(1 if outputs.dim() > 1 else 0)
        counts = target != call.kwargs.get("ignore_index", -100)
    elif call.function is F.binary_cross_entropy_with_logits and bool(((target == 0) | (target == 1)).all()):
        predicted, counts = outputs > 0, torch.ones_like(target, dtype=torch.bool)
    else:
        return None
    return ((predicted == target) & counts).sum().item(), counts.sum().item()
