"""Products with the Jacobian J of all outputs on a data set.

J has N K rows, in sample-major order (row n K + k), and P columns.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.linearization.passes import DataPasses, close
from lightning_ntk.utilities.contexts import full_precision
from lightning_ntk.utilities.distributed import sum_over
from lightning_ntk.utilities.shapes import Float, Float64, Int

_BATCHES_PER_PARTIAL_SUM = 8


class Jacobian(Protocol):
    """What the dynamics need of J, however it is held."""

    def jvp(self, tangent: Mapping[str, Tensor]) -> Float64[Tensor, "N K"]:
        """Computes J v, `(N, K)` in float64.

        The tangent v has the names and shapes of the parameters.
        """

    def vjp(self, cotangents: Float[Tensor, "T N K"]) -> dict[str, Float64[Tensor, "T ..."]]:
        """Computes J^T u for cotangents `(T, N, K)`.

        Every parameter has a float64 tensor `(T, *shape)`.
        """


@dataclass(frozen=True)
class StreamedJacobian:
    """J through passes over batches, in memory O(P + N K).

    J is never stored.

    Every pass recomputes the predictions and compares them with those of the capture: data that changed its order or content
    would give a plausible wrong answer.
    """

    passes: DataPasses
    predictions: Float[Tensor, "N K"]  # at capture

    def jvp(self, tangent: Mapping[str, Tensor]) -> Float64[Tensor, "N K"]:
        """J v, `(N, K)` in float64: one forward-mode pass."""
        product = torch.zeros_like(self.predictions, dtype=torch.float64)
        outputs = []
        for batch in self.passes.batches("Jacobian-vector product"):
            found, product[batch.rows] = self.passes.linearization.predict_and_jvp(tangent, batch.inputs)
            outputs.append(found)
        self._compare(outputs)
        return self.passes.processes.sum_(product)

    def vjp(self, cotangents: Float[Tensor, "T N K"]) -> dict[str, Float64[Tensor, "T ..."]]:
        """Computes J^T u for cotangents `(T, N, K)`.

        It takes one forward and T backward passes. Results are `(T, *shape)` in float64.
        """
        linearization = self.passes.linearization
        cotangents = cotangents.to(linearization.device)
        totals = {
            name: p.new_zeros(len(cotangents), *p.shape, dtype=torch.float64)
            for name, p in linearization.params.items()
        }
        # Adding float32 to float64 costs a tenth of a small network's pass: a few batches are summed before it.
        partial: list[list[Tensor]] = []
        outputs = []
        for number, batch in enumerate(self.passes.batches("vector-Jacobian product"), 1):
            found, gradients = linearization.predict_and_vjp(cotangents[:, batch.rows], batch.inputs)
            outputs.append(found)
            for values, gradient in zip(partial, gradients, strict=False):
                torch._foreach_add_(values, list(gradient.values()))
            partial = partial or [list(gradient.values()) for gradient in gradients]
            if number % _BATCHES_PER_PARTIAL_SUM == 0:
                _add_rows(totals, partial)
                partial = []
        _add_rows(totals, partial)
        self._compare(outputs)
        return sum_over(self.passes.processes, totals)

    def _compare(self, outputs: list[Tensor]) -> None:
        if not outputs:  # more processes than samples
            return
        rows = self.passes.rows
        actual, expected = torch.cat(outputs), self.predictions[rows.start : rows.stop]
        if not close(actual, expected):
            sample = rows.start + int((actual - expected).abs().amax(1).argmax())
            raise RuntimeError(
                f"The predictions at the initial weights are not those of the capture, most of all for sample {sample}: "
                "the reference data changed its content or order in between, or the network is not deterministic."
            )


def _add_rows(totals: Tensors, rows: list[list[Tensor]]) -> None:
    for i, values in enumerate(rows):
        torch._foreach_add_([total[i] for total in totals.values()], values)


@dataclass(frozen=True)
class StoredJacobian:
    """J kept in memory, for small models: N K P numbers."""

    blocks: dict[str, Float[Tensor, "N K ..."]]  # the Jacobian of every parameter

    @classmethod
    def cat(cls, batches: Iterable[Tensors], samples: int) -> "StoredJacobian":
        """Concatenates the blocks of J of consecutive batches.

        They are written in place as they come.
        """
        blocks: Tensors = {}
        start = stop = 0
        for part in batches:
            for name, block in part.items():
                if name not in blocks:
                    blocks[name] = block.new_empty(samples, *block.shape[1:])
                stop = start + len(block)
                blocks[name][start:stop] = block
            start = stop
        return cls(blocks)

    def at(self, rows: Int[Tensor, "B"]) -> "StoredJacobian":
        """The rows of some samples, `(B,)`."""
        return StoredJacobian({name: block[rows.to(block.device)] for name, block in self.blocks.items()})

    def jvp(self, tangent: Mapping[str, Tensor]) -> Float64[Tensor, "N K"]:
        """J v, `(N, K)` in float64."""
        with self._full_precision():
            products = [
                block.reshape(*block.shape[:2], -1) @ tangent[name].to(block).reshape(-1)
                for name, block in self.blocks.items()
            ]
            return torch.stack(products).sum(0, dtype=torch.float64)

    def vjp(self, cotangents: Float[Tensor, "T N K"]) -> dict[str, Float64[Tensor, "T ..."]]:
        """J^T u for cotangents `(T, N, K)`, results `(T, *shape)` in float64."""
        with self._full_precision():
            return {
                name: (cotangents.flatten(1).to(block) @ block.reshape(block.shape[:2].numel(), -1))
                .reshape(len(cotangents), *block.shape[2:])
                .double()
                for name, block in self.blocks.items()
            }

    def _full_precision(self) -> AbstractContextManager[None]:
        return full_precision(next(iter(self.blocks.values())).device.type)
