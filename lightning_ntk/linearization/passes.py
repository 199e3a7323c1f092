"""A network on a whole data set: every loop over its batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Batch, Reference
from lightning_ntk.data.sample_index import SampleIndex
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.progress import track
from lightning_ntk.utilities.shapes import Float, Shaped


@dataclass(frozen=True)
class DataPasses:
    """Passes of a network over a data set.

    Batches come in order, under a progress bar, and are divided among processes.
    """

    linearization: Linearization
    reference: Reference
    progress: bool = False
    processes: Processes = ALONE

    @property
    def rows(self) -> range:
        """The samples of this process."""
        return self.processes.rows(len(self.reference))

    def batches(self, description: str, *ranges: range) -> Iterator[Batch]:
        """The batches of this process's samples, under a progress bar.

        They may be restricted to some ranges.
        """
        ranges = ranges or (self.rows,)
        description = f"{description} of {len(self.reference)} samples"
        total = sum(-(-len(part) // self.reference.batch_size) for part in ranges)
        return track(self.reference.batches(*ranges), description, total=total, enabled=self.progress)

    def predict(self, params: Mapping[str, Tensor] | None = None) -> Float[Tensor, "N K"]:
        """The outputs of all samples, `(N, K)`, at the captured weights or at `params`."""
        network = self.linearization if params is None else self.linearization.at(params)
        return self._join([network.predict(batch.inputs) for batch in self.batches("predictions")])

    def first(self) -> tuple[Float[Tensor, "N K"], Shaped[Tensor, "N ..."], SampleIndex]:
        """The first pass: outputs `(N, K)`, targets, and samples by content.

        Targets are on the CPU as the data gives them.

        Every process reads all samples and predicts its own. Anything missing, not finite or not the same in all of them raises
        a ValueError.
        """
        outputs, targets, samples = [], [], SampleIndex()
        around = range(self.rows.start), self.rows, range(self.rows.stop, len(self.reference))
        for batch in self.batches("initial predictions", *around):
            if batch.target is None:
                raise ValueError("Expected the training set to have targets but its batches hold inputs only.")
            rows = range(len(self.reference))[batch.rows]
            for name, value in (("inputs", batch.inputs), ("targets", batch.target)):
                require_finite(name, value, rows)
            samples.add(batch)
            targets.append(batch.target.detach().cpu())
            if batch.rows.start in self.rows:
                outputs.append(self.linearization.predict(batch.inputs))
                require_finite("outputs", outputs[-1], rows)
        # Before the outputs are joined: their shape depends on the number of samples.
        self.processes.require_same(samples.fingerprint, "reference data")
        joined = self._join(outputs)
        if not close(joined, joined[samples.first_rows.to(joined.device)]):
            raise ValueError(
                "Expected equal outputs for samples with equal tensors but they differ: the inputs hold something besides "
                "tensors. Put all that the network reads into tensors."
            )
        return joined, torch.cat(targets), samples

    def _join(self, own: list[Tensor]) -> Tensor:
        if self.processes.size == 1:
            return torch.cat(own)
        if not own:  # more processes than samples
            own = [self.linearization.predict(self.reference.read(0, 1).inputs)[:0]]
        joined = own[0].new_zeros(len(self.reference), own[0].shape[1])
        joined[self.rows.start : self.rows.stop] = torch.cat(own)
        return self.processes.sum_(joined)


def close(actual: Tensor, expected: Tensor, *, roundings: float = 1e4) -> bool:
    """Whether outputs agree up to rounding, relative to the largest of them."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return bool((actual - expected).abs().max() <= roundings * torch.finfo(expected.dtype).eps * scale)


def require_finite(name: str, tree: object, rows: Sequence[int]) -> None:
    """Raises a ValueError for tensors with NaN or infinity.

    It names one of the samples `rows` that they are made of.
    """
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and not leaf.isfinite().all():
            finite = leaf.isfinite().reshape(len(leaf), -1).all(1)
            raise ValueError(
                f"Expected finite {name} but sample {rows[int(finite.int().argmin())]} has NaN or infinity."
            )
