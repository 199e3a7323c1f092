"""Compares functions by what the training step computes in eval mode.

It goes batch by batch and stores no outputs.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_ntk.data.batches import tensors_in
from lightning_ntk.data.reference import Reference
from lightning_ntk.functional.predictions import error_sums, root_mean, taylor_sums
from lightning_ntk.functional.weights import ratio_of_norms
from lightning_ntk.linearization.cut_pass import Evaluation
from lightning_ntk.linearization.cut_step import LossCall
from lightning_ntk.linearization.step import StepLinearization
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float64


class StepComparison:
    """Compares functions by what the training step computes in eval mode.

    The trained network has its own weights and buffers, the linearized one those of its passes in train mode. The expansion of
    the trained network is that of the run's function, with the run's buffers. Losses are means over batches with the number
    of samples as weights, accuracies and perplexities are over labels; root mean squares are over all elements of the outputs.

    Args:
        step: The linearized network of the training step.
        data: The data set.
        taylor: Whether to expand the trained network around w0, at the cost of a forward-mode pass.
        keeps_outputs: Whether to keep outputs `(samples, K)` of the last comparison.
        announce: Called with the number of each batch before the step gets it.
        processes: The processes that share the batches.
    """

    outputs: tuple[Float64[Tensor, "N K"], Float64[Tensor, "N K"]] | None = None
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
        """A digest of the first batch and the number of samples.

        Where samples are drawn at random it is the number alone.
        """
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
        predictions: Float64[Tensor, "N K"] | None = None,
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
            trained = _slim(step.evaluate(batch, weights))
            lin = _slim(step.evaluate(batch, None, linearized))
            if trained is None or lin is None:  # a batch that the step leaves out
                continue
            size = rows.stop - rows.start
            sums.add_loss("", trained, size)
            sums.add_loss("linearized_", lin, size)
            for own, other in zip(trained.outputs, lin.outputs, strict=True):
                sums.add("rmse", *error_sums(own, other))
            if self._keeps_outputs and [(o.dim() < 3, len(o)) for o in trained.outputs] == [(True, size)]:
                pair = trained.outputs[0], lin.outputs[0]
                kept.append(tuple(o.cpu().double().reshape(len(o), -1) for o in pair))
            del lin
            if not self._taylor:
                continue
            expanded = step.evaluate(batch, around_start, displacement)
            taylor = _slim(expanded)
            if taylor is not None and expanded is not None:
                sums.add_loss("taylor_", taylor, size)
                for own, other, start in zip(trained.outputs, taylor.outputs, expanded.starts, strict=True):
                    sums.add("taylor", *taylor_sums(own, other, start))
        self.outputs = (torch.cat([own for own, _ in kept]), torch.cat([other for _, other in kept])) if kept else None
        return sums.scalars(self._processes, taylor=self._taylor)

    def __repr__(self) -> str:
        return represent(self, f"{len(self)} samples", f"{self._step}")


class _Sums:
    """Sums over batches of numerators and denominators."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[float]] = {}

    def add(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        pair = self._pairs.setdefault(name, [0.0, 0.0])
        pair[0] += float(numerator)
        pair[1] += float(denominator)

    def add_loss(self, kind: str, network: "_Network", size: int) -> None:
        self.add(f"{kind}loss", size * network.loss.double(), size)
        scores = network.scores
        if scores is not None and scores.counted:
            self.add(f"{kind}accuracy", scores.correct, scores.counted)
            if scores.log_loss is not None and scores.labels > size:
                self.add(f"{kind}perplexity", scores.log_loss, scores.counted)

    def scalars(self, processes: Processes, *, taylor: bool) -> dict[str, float]:
        by_label = [f"{kind}{name}" for name in ("accuracy", "perplexity") for kind in ("", "linearized_", "taylor_")]
        names = ["loss", "linearized_loss", "rmse", "taylor", *by_label]
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
        for name in by_label:
            if pairs[name][1] > 0:
                mean = pairs[name][0] / pairs[name][1]
                scalars[name] = (mean.exp() if name.endswith("perplexity") else mean).item()
        return scalars


class _Scores(NamedTuple):
    """What a classification loss says of its labels.

    Attributes:
        correct: How many labels have the largest output.
        counted: How many labels are not to be ignored.
        labels: How many labels there are.
        log_loss: The sum of -log p over the labels that count; None where the loss is another one.
    """

    correct: float
    counted: float
    labels: int
    log_loss: float | None = None


class _Network(NamedTuple):
    """What is kept of a network on a batch while others are evaluated.

    Their evaluation takes many times the memory of its outputs.
    """

    loss: Tensor
    outputs: list[Tensor]
    scores: _Scores | None


def _slim(evaluation: Evaluation | None) -> _Network | None:
    if evaluation is None:
        return None
    scores = [found for call in evaluation.losses if (found := _scores_of(call)) is not None]
    return _Network(evaluation.loss, evaluation.outputs, scores[0] if len(scores) == 1 else None)


def _scores_of(call: LossCall) -> _Scores | None:
    """The scores of a call of a classification loss; None for other losses."""
    if len(call.args) < 2 or not all(isinstance(tensor, Tensor) for tensor in call.args[:2]):
        return None
    outputs, target = call.args[:2]
    if call.function in (F.cross_entropy, F.nll_loss) and not target.is_floating_point():
        counts = target != call.kwargs.get("ignore_index", -100)
        correct = ((outputs.argmax(1 if outputs.dim() > 1 else 0) == target) & counts).sum().item()
        count = counts.sum().item()
        return _Scores(correct, count, target.numel(), _log_loss(call, count))
    if call.function is F.binary_cross_entropy_with_logits and bool(((target == 0) | (target == 1)).all()):
        return _Scores(((outputs > 0) == target).sum().item(), target.numel(), target.numel())
    return None


def _log_loss(call: LossCall, count: float) -> float | None:
    given, reduction = call.kwargs.get, call.kwargs.get("reduction", "mean")
    if any(given(name) is not None for name in ("weight", "size_average", "reduce")) or given("label_smoothing"):
        return None
    total = call.result.double().item()
    return {"mean": total * count, "sum": total}.get(reduction)
