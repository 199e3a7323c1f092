r"""Replays minibatch SGD of the linearized network in function space.

Every step of `torch.optim.SGD` stays in the span of what it has seen: the rows of the Jacobian, and the vectors :math:`e_j` that
it carries along, which are the initial weights where they decay and the momentum buffer of a late start. So

.. math:: w_{lin} = w_0 + \sum_j s_j e_j + J^\top a, \qquad f_{lin} = f_0 + \sum_j s_j\, J e_j + \Theta a,

and a step needs the loss gradient at the batch's own predictions and its product with the batch's rows of the kernel: no pass
through the network.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Start
from lightning_ntk.dynamics.sgd import LinearSGD, SGDSettings
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.utilities.contexts import full_precision
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.shapes import Float, Float64, Int, Shaped

# Numbers of the kernel a sample from which a CPU reads them where they lie, three times faster than gathered ones.
_DIRECT_NUMBERS = 8192
# Samples that are summed in the kernel's own type, before float64 takes over: fewer passes over the result.
_SUMMED_SAMPLES = 8
# Bytes that are gathered at once: what stays in a processor's cache, and what keeps a GPU busy.
_GATHERED_BYTES = {"cpu": 2**20, "cuda": 2**28}


class FunctionSpaceSGD:
    r"""SGD on the linearized network, with the batches and steps of a run.

    All state is in float64 on the kernel's device, and nothing waits for that device before a result is read. It is made of plain
    tensors also inside `torch.inference_mode`, so that a replay may be used inside and outside of it.

    Args:
        kernel: Theta, `(N K, N K)`, symmetric, rows in sample-major order; read in its own type and never copied as a whole.
        predictions: f0, `(N, K)`.
        objective: The loss, of outputs `(B, K)` and the targets of their samples.
        carried: For every carried vector e its coefficients at step 0, and its image J e, `(N, K)`.
        decays: Whether steps may have weight decay. It pulls the weights to zero if w0 is carried, and else to w0.
        processes: The processes whose gradients a step averages, as distributed training does; each accumulates its own batches.

    Raises:
        ValueError: If shapes do not match.

    Example:
        >>> from torch import nn
        >>> outputs, targets = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> replay = FunctionSpaceSGD(torch.eye(3), outputs, Objective(nn.MSELoss(), outputs, targets))
        >>> replay.accumulate(torch.tensor([2, 0]), targets[[2, 0]])
        >>> replay.step(SGDSettings(lr=0.5))
        >>> replay.predictions.flatten()
        tensor([0.5000, 0.0000, 1.5000], dtype=torch.float64)
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        kernel: Float[Tensor, "N*K N*K"],
        predictions: Float[Tensor, "N K"],
        objective: Objective,
        *,
        carried: Sequence[tuple[Start, Float[Tensor, "N K"]]] = (),
        decays: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        size, shape = predictions.numel(), predictions.shape
        shapes = [tuple(shape), tuple(kernel.shape), *(tuple(image.shape) for _, image in carried)]
        if len(shape) != 2 or shapes != [shape, (size, size), *[shape] * len(carried)]:
            raise ValueError(
                "Expected predictions of shape (N, K), a kernel of shape (N K, N K) and images of the shape of the predictions "
                f"but got {', '.join(map(str, shapes))}."
            )
        self.num_samples, self.num_outputs = predictions.shape
        self._objective = objective
        self._processes = processes
        self._products = _KernelProducts(kernel, *predictions.shape)
        self._decays = decays
        outputs = predictions.detach().to(kernel.device, torch.float64)
        zeros = torch.zeros_like(outputs)
        images = [image.detach().to(zeros) for _, image in carried]
        self._starts = zeros.new_tensor([start.weight for start, _ in carried])
        # J (w_lin - w0), or J w_lin where w0 is carried: it obeys the recurrence of the weights themselves.
        self._image = sum(
            (start.weight * image for (start, _), image in zip(carried, images, strict=True)), zeros.clone()
        )
        self._offset = outputs - self._image
        self._coefficients, self._scales = zeros.clone(), self._starts.clone()
        buffers = None
        if any(start.buffer for start, _ in carried):
            buffer = sum((start.buffer * image for (start, _), image in zip(carried, images, strict=True)), zeros)
            buffers = [zeros, buffer, zeros.new_tensor([start.buffer for start, _ in carried])]
        self._sgd = LinearSGD([self._coefficients, self._image, self._scales], buffers)
        self._rows: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self.steps = 0

    @torch.inference_mode(False)
    def accumulate(self, rows: Int[Tensor, "B"], target: Shaped[Tensor, "B ..."], *, scale: float = 1.0) -> None:
        """Adds the gradient of a batch to the gradient of the next step.

        It is the gradient of the loss at the linearized predictions.

        Args:
            rows: Which samples the batch holds, `(B,)` integers; a sample may come more than once, and counts as often.
            target: Targets of the batch, as the data gives them, `(B, ...)`.
            scale: Factor of the loss, `1 / accumulate_grad_batches` for example.

        Raises:
            ValueError: If rows and targets do not fit each other or the samples.
        """
        require_rows(rows, self.num_samples)
        if target.dim() == 0 or len(target) != len(rows):
            raise ValueError(
                f"Expected the targets of {len(rows)} samples but got a tensor of shape {tuple(target.shape)}."
            )
        # Prepared where they are: class labels are checked by their values, for which a GPU would have to be waited for.
        prepared = self._objective.prepare(target, torch.empty(len(rows), self.num_outputs, device=target.device))
        index = rows.to(self._image.device, torch.int64, non_blocking=True)
        outputs = self._offset[index] + self._image[index]
        gradient = self._objective.gradient(outputs, prepared.to(outputs.device, non_blocking=True))
        self._rows.append(rows.to(torch.int64))
        self._gradients.append(gradient * scale)  # not in place: a loss such as a sum has an expanded gradient

    @torch.inference_mode(False)
    def step(
        self,
        settings: SGDSettings,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        factor: float = 1.0,
    ) -> None:
        r"""One optimizer step along the accumulated gradient, which is then forgotten.

        Args:
            settings: Learning rate, momentum and decay of this step.
            clip_norm: The gradient J^T g is first scaled by :math:`\min(1, C / (\sqrt{g^\top \Theta g} + 10^{-6}))`, the
                formula of `torch.nn.utils.clip_grad_norm_`.
            clip_value: Refused: the clipped gradient leaves the span of the Jacobian's rows.
            factor: The factor of the gradient before it is clipped.

        Raises:
            ValueError: If a setting has no meaning in function space, or an image that it needs was not given.
            RuntimeError: If nothing was accumulated.
        """
        require_prepared_decay(settings, self._decays)
        if clip_value is not None:
            raise ValueError(
                "Expected clipping by norm but got clipping by value, which depends on single weights: the clipped gradient "
                "has no coefficients in function space. Clip by norm, or use dynamics that follow the weights themselves."
            )
        if clip_norm is not None and not clip_norm >= 0:
            raise ValueError(f"Expected argument `clip_norm` to be at least 0 but got {clip_norm}.")
        if not self._rows:
            raise RuntimeError(
                "Expected a call of `accumulate` before `step`, as no gradient has come since the last step."
            )
        rows, gradients = torch.cat(self._rows), torch.cat(self._gradients) * factor
        self.discard()
        image = self._products.image(rows, gradients)
        index = rows.to(image.device, non_blocking=True)
        coefficients = torch.zeros_like(image).index_add_(0, index, gradients)
        if self._processes.size > 1:
            coefficients, image = self._processes.sum_(torch.stack([coefficients, image])) / self._processes.size
        if clip_norm is not None:
            norm = (coefficients * image).sum().clamp_min(0).sqrt()
            clipped = (clip_norm / (norm + 1e-6)).clamp(max=1)
            coefficients, image = coefficients * clipped, image * clipped
        self._sgd.step([coefficients, image, torch.zeros_like(self._scales)], settings)
        self.steps += 1

    def discard(self) -> None:
        """Drops what was accumulated since the last step."""
        self._rows, self._gradients = [], []

    @property
    def coefficients(self) -> Float64[Tensor, "N K"]:
        """The coefficients a of the Jacobian's rows, `(N, K)` in float64.

        Raises:
            OverflowError: If the linearized network has diverged.
        """
        return self._finite(self._coefficients).clone()

    @property
    def predictions(self) -> Float64[Tensor, "N K"]:
        """f_lin on all samples, `(N, K)` in float64.

        Raises:
            OverflowError: If the linearized network has diverged.
        """
        return self._finite(self._offset + self._image)

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor of every carried vector in w_lin - w0."""
        return tuple((self._scales - self._starts).tolist())

    def _finite(self, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise OverflowError(
                f"The linearized network has diverged: after {self.steps} steps its values are not finite any more. "
                "The learning rate is above what it can be trained with; the real network, whose kernel changes, may be stable."
            )
        return values

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load_state_dict` continues.

        They leave out what was accumulated since the last step.
        """
        return {
            "coefficients": self._coefficients.clone(),
            "image": self._image.clone(),
            "scales": self._scales.clone(),
            "buffers": [None if buffer is None else buffer.clone() for buffer in self._sgd.buffers],
            "steps": self.steps,
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of a replay of the same samples.

        It discards what was accumulated here.

        Raises:
            ValueError: If the state belongs to another number of samples or outputs.
        """
        values = (self._coefficients, self._image, self._scales)
        saved = [state["coefficients"], state["image"], state["scales"]]
        if saved[0].shape != self._coefficients.shape:
            raise ValueError(
                f"Expected a state of {tuple(self._coefficients.shape)} samples and outputs but got {tuple(saved[0].shape)}."
            )
        for value, tensor in zip(values, saved, strict=True):
            value.copy_(tensor)
        buffers = state["buffers"]
        known = not any(buffer is None for buffer in buffers)
        self._sgd = LinearSGD(values, [b.to(v) for b, v in zip(buffers, values, strict=True)] if known else None)
        self.discard()
        self.steps = int(state["steps"])


def require_rows(rows: Tensor, samples: int, what: str = "argument `rows`") -> None:
    """Raises a ValueError unless these are rows of samples, `(B,)`.

    The values of a tensor on a GPU are not checked.
    """
    valid = rows.dim() == 1 and len(rows) > 0 and not rows.is_floating_point() and rows.dtype != torch.bool
    if not valid or (rows.device.type == "cpu" and not 0 <= int(rows.min()) <= int(rows.max()) < samples):
        raise ValueError(
            f"Expected {what} to be rows of the training set, integers (B,) from 0 to {samples - 1}, but got {rows.tolist()}."
        )


def require_prepared_decay(settings: SGDSettings, decays: bool) -> None:
    """Raises a ValueError for weight decay that the training was not prepared for."""
    if settings.weight_decay != 0 and not decays:
        raise ValueError(
            f"Expected steps without weight decay but got {settings.weight_decay}: the initial weights shrink then, for "
            "which they have to be prepared. Give `weight_decay` from the start."
        )


class _KernelProducts:
    """Theta[:, rows] g for few rows, read from the kernel's contiguous rows."""

    def __init__(self, kernel: Tensor, samples: int, outputs: int) -> None:
        self._blocks = torch.unflatten(kernel.detach(), 0, (samples, outputs))  # (N, K, N K)
        numbers = outputs * kernel.shape[1]
        direct = kernel.device.type == "cpu" and kernel.dtype in (torch.float32, torch.float64)
        self._views = self._blocks.mT.unbind(0) if direct and numbers >= _DIRECT_NUMBERS else ()
        self._chunk = max(1, _GATHERED_BYTES.get(kernel.device.type, 2**24) // (8 * numbers))

    def image(self, rows: Tensor, gradients: Tensor) -> Tensor:
        """Sum over i of Theta[:, rows[i]] gradients[i], `(N, K)` in float64.

        Long rows are multiplied where they lie, in the kernel's own type, with errors below those of its entries. Short rows are
        gathered and multiplied in float64.
        """
        result = gradients.new_zeros(self._blocks.shape[2])
        if self._views:
            pairs = list(zip(rows.tolist(), gradients.to(self._blocks.dtype).unbind(0), strict=True))
            with full_precision("cpu"):
                for start in range(0, len(pairs), _SUMMED_SAMPLES):
                    partial = torch.zeros_like(result, dtype=self._blocks.dtype)
                    for row, gradient in pairs[start : start + _SUMMED_SAMPLES]:
                        partial.addmv_(self._views[row], gradient)
                    result += partial
        else:
            index = rows.to(self._blocks.device, non_blocking=True)
            for part, gradient in zip(
                torch.split(index, self._chunk), torch.split(gradients, self._chunk), strict=True
            ):
                block = self._blocks.index_select(0, part).flatten(0, 1).double()
                result.addmv_(block.T, gradient.flatten())
        return result.reshape(-1, gradients.shape[1])
