"""Products with the Jacobian J of all outputs on a whole data set, at frozen weights.

J has N K rows, in sample-major order (row n K + k), and P columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_ntk.data.reference import Batch, Reference
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.distributed import ALONE, Processes, sum_over
from lightning_ntk.utilities.progress import track

_BATCHES_PER_PARTIAL_SUM = 8


class Jacobian(Protocol):
    """What the dynamics need of J, however it is held."""

    def jvp(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """J v, `(N, K)` in float64, for a tangent with the names and shapes of the parameters."""

    def vjp(self, cotangents: Tensor) -> Tensors:
        """J^T u for cotangents `(T, N, K)`: for every parameter a float64 tensor `(T, *shape)`."""


class StreamedJacobian:
    """J through passes over minibatches: memory O(P + N K), and J is never stored.

    Every pass recomputes the predictions as a by-product and compares them with those of the capture, so that data which
    changed order or content cannot give a plausible wrong answer.

    Args:
        linearization: The network at its captured weights.
        reference: The data set.
        predictions: The outputs at capture, `(N, K)`.
        progress: Whether passes show a progress bar.
        processes: The processes that share every pass, each one's rows being its own.
    """

    def __init__(
        self,
        linearization: Linearization,
        reference: Reference,
        predictions: Tensor,
        *,
        progress: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.linearization = linearization
        self.reference = reference
        self.predictions = predictions
        self.progress = progress
        self.processes = processes
        self._rows = processes.rows(len(reference))

    def jvp(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """J v, `(N, K)` in float64: one forward-mode pass."""
        product = torch.zeros_like(self.predictions, dtype=wide_dtype(self.predictions.device))
        outputs = torch.empty_like(self.predictions)
        for batch in self._stream("Jacobian-vector product"):
            outputs[batch.rows], product[batch.rows] = self.linearization.predict_and_jvp(tangent, batch.inputs)
        self._compare(outputs)
        return self.processes.sum_(product)

    def vjp(self, cotangents: Tensor) -> Tensors:
        """J^T u for cotangents `(T, N, K)`: one forward and T backward passes, results `(T, *shape)` in float64."""
        wide = wide_dtype(self.linearization.device)
        cotangents = cotangents.to(self.linearization.device)
        outputs = torch.empty_like(self.predictions)
        sums: list[Tensors] = []
        # Adding float32 to float64 costs a tenth of a small network's pass: a few batches are summed before it.
        partial: list[Tensors] = []
        for number, batch in enumerate(self._stream("vector-Jacobian product"), 1):
            outputs[batch.rows], gradients = self.linearization.predict_and_vjp(cotangents[:, batch.rows], batch.inputs)
            # Copies: gradients of different parameters may be one tensor, which adding in place would corrupt.
            partial = _add(partial, gradients) if partial else _copy(gradients, self.linearization.dtype)
            if number % _BATCHES_PER_PARTIAL_SUM == 0 or batch.rows.stop == self._rows.stop:
                sums = _add(sums, partial) if sums else _copy(partial, wide)
                partial = []
        self._compare(outputs)
        params = self.linearization.params
        if not sums:  # more processes than samples
            sums = [{name: torch.zeros_like(p, dtype=wide) for name, p in params.items()} for _ in cotangents]
        return sum_over(self.processes, {name: _stack([total[name] for total in sums]) for name in params})

    def _stream(self, description: str) -> Iterator[Batch]:
        batches, total = self.reference.batches(self._rows), self.reference.count_batches(self._rows)
        return track(batches, description, total=total, enabled=self.progress)

    def _compare(self, outputs: Tensor) -> None:
        own = slice(self._rows.start, self._rows.stop)
        outputs, expected = outputs[own], self.predictions[own]
        if len(outputs) and not close(outputs, expected):
            sample = self._rows.start + int((outputs - expected).abs().amax(1).argmax())
            raise RuntimeError(
                f"The predictions at the initial weights are not those of the capture, most of all for sample {sample}: "
                "the reference data changed its content or order in between, or the network is not deterministic."
            )


def _stack(values: list[Tensor]) -> Tensor:
    # A single result is not copied again.
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)


def _copy(gradients: list[Tensors], dtype: torch.dtype) -> list[Tensors]:
    return [{name: value.to(dtype, copy=True) for name, value in gradient.items()} for gradient in gradients]


def _add(totals: list[Tensors], gradients: list[Tensors]) -> list[Tensors]:
    """Adds in place, one gradient for each cotangent."""
    for total, gradient in zip(totals, gradients, strict=True):
        torch._foreach_add_(list(total.values()), list(gradient.values()))
    return totals


class StoredJacobian:
    """J kept in memory, for small models: N K P numbers.

    Args:
        blocks: For every parameter the Jacobian `(N, K, *shape)`.
    """

    def __init__(self, blocks: Tensors) -> None:
        self.blocks = blocks

    def jvp(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """J v, `(N, K)` in float64."""
        products = [
            (block.reshape(*block.shape[:2], -1) @ tangent[name].to(block).reshape(-1)).to(wide_dtype(block.device))
            for name, block in self.blocks.items()
        ]
        return torch.stack(products).sum(0)

    def vjp(self, cotangents: Tensor) -> Tensors:
        """J^T u for cotangents `(T, N, K)`, results `(T, *shape)` in float64."""
        return {
            name: (cotangents.flatten(1).to(block) @ block.reshape(block.shape[:2].numel(), -1))
            .reshape(len(cotangents), *block.shape[2:])
            .to(wide_dtype(block.device))
            for name, block in self.blocks.items()
        }


def predict(
    linearization: Linearization,
    reference: Reference,
    *,
    params: Mapping[str, Tensor] | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Tensor:
    """Outputs of the network on all of a data set, `(N, K)`, at the captured weights or at `params`."""
    params = linearization.params if params is None else params
    rows = processes.rows(len(reference))
    batches = track(reference.batches(rows), "predictions", total=reference.count_batches(rows), enabled=progress)
    own = [linearization.predict_at(params, batch.inputs) for batch in batches]
    return join_outputs(own, linearization, reference, processes)


def join_outputs(
    own: Sequence[Tensor], linearization: Linearization, reference: Reference, processes: Processes
) -> Tensor:
    """Outputs `(N, K)` of all samples from those of this process's batches."""
    if processes.size == 1:
        return torch.cat(list(own))
    rows = processes.rows(len(reference))
    if not own:  # more processes than samples
        own = [linearization.predict(reference.read(0, 1).inputs)[:0]]
    joined = own[0].new_zeros(len(reference), own[0].shape[1])
    joined[rows.start : rows.stop] = torch.cat(list(own))
    return processes.sum_(joined)


def close(actual: Tensor, expected: Tensor, *, roundings: float = 1e4) -> bool:
    """Whether outputs agree up to rounding, relative to the largest of them."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return bool((actual - expected).abs().max() <= roundings * torch.finfo(expected.dtype).eps * scale)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type in which sums over batches are kept: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
