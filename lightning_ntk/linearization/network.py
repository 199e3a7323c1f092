"""A network frozen at its present weights.

It gives outputs at these and at other weights.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ntk.linearization.parameters import Tensors, call_with, overwritten, trainable_parameters
from lightning_ntk.utilities.contexts import isolated_pass
from lightning_ntk.utilities.distributed import Processes
from lightning_ntk.utilities.errors import describe, explained
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.validation import require_callable, require_float64, require_matching, require_values

T = TypeVar("T")
Frozen = TypeVar("Frozen", bound="FrozenNetwork")
Predict: TypeAlias = Callable[[nn.Module, Any], Tensor]


def call_module(module: nn.Module, inputs: Any) -> Tensor:
    """The default `predict`: `module(inputs)`, or `module(*inputs)` if the inputs are a tuple or list."""
    outputs: Tensor = module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
    return outputs


class _Predictor(nn.Module):
    """Wraps `predict` as a module's forward, for `call_with`."""

    def __init__(self, module: nn.Module, predict: Predict) -> None:
        super().__init__()
        self.module = module
        self.predict = predict
        self.flat = False

    def forward(self, inputs: Any, then: Callable[[Tensor], T]) -> T:
        outputs = self.predict(self.module, inputs)
        if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise ValueError(
                f"Expected outputs that are a tensor of shape (batch, outputs) or (batch,) but got {got}. "
                "Give `predict=lambda module, inputs: ...` that returns such a tensor."
            )
        require_values("outputs", outputs)
        if not outputs.is_floating_point() or not outputs.numel():
            raise ValueError(
                f"Expected real floating-point outputs, at least one of each sample, but got {describe(outputs)}. "
                "Give `predict=lambda module, inputs: ...` that returns such a tensor."
            )
        self.flat = outputs.dim() == 1
        return then(outputs.unsqueeze(1) if self.flat else outputs)


class FrozenNetwork:
    """A network at clones of its weights and buffers.

    The arguments are those of `Linearization`.
    """

    module: nn.Module
    """The live module, whose forward is used but whose weights are not."""
    params: Tensors
    """Clones of the trainable parameters, under their names in `named_parameters()`."""
    buffers: Tensors
    """Clones of the buffers."""

    def __init__(
        self,
        module: nn.Module,
        *,
        predict: Predict | None = None,
        dtype: torch.dtype | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> None:
        live = trainable_parameters(module)
        require_callable("predict", predict)
        first = next(iter(live.values()))
        require_float64(first.device)
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"Expected argument `dtype` to be torch.float32, torch.float64 or None but got {dtype!r}.")
        if predict is None and type(module).forward is nn.Module.forward and "forward" not in vars(module):
            raise ValueError(
                f"Expected a module with a method `forward` but {type(module).__name__} has none. "
                "Give `predict=lambda module, inputs: ...` that returns the outputs."
            )
        self.dtype = dtype or (first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32)
        self.device = first.device
        self.module = module
        self._predictor = _Predictor(module, predict or call_module)
        # Whether a forward writes into its weights or buffers: unknown until the first `predict_at`.
        self._overwrites: bool | None = None
        start = live if params is None else require_matching(params, live, "weights")
        with torch.inference_mode(False), torch.no_grad():
            self.params = {name: self._clone(p) for name, p in start.items()}
            self._frozen = {n: self._clone(p) for n, p in module.named_parameters() if not p.requires_grad}
            self.buffers = {name: self._clone(buffer) for name, buffer in module.named_buffers()}

    @property
    def flat(self) -> bool:
        """Whether the network returned `(B,)` in the last pass (K = 1)."""
        return self._predictor.flat

    @property
    def num_parameters(self) -> int:
        """P, the number of trainable weights."""
        return sum(p.numel() for p in self.params.values())

    def at(self: Frozen, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> Frozen:
        """Returns the same network around clones of other weights.

        Frozen weights are the captured ones, and so are buffers unless given.
        """
        other = copy(self)
        with torch.inference_mode(False), torch.no_grad():
            other.params = {name: value.clone() for name, value in self._convert_all(params).items()}
            if buffers is not None:
                matching = require_matching(buffers, self.buffers, "buffers")
                other.buffers = {name: self._clone(value.to(self.device)) for name, value in matching.items()}
        return other

    def restricted(self: Frozen, names: Sequence[str]) -> Frozen:
        """The same network with only these parameters as variables, and the others as constants."""
        other = copy(self)
        other.params = {name: p for name, p in self.params.items() if name in names}
        other._frozen = self._frozen | {name: p for name, p in self.params.items() if name not in names}
        return other

    def state_dict(self) -> dict[str, Tensors]:
        """The captured tensors themselves, under "params", "frozen" and "buffers"."""
        return {"params": dict(self.params), "frozen": dict(self._frozen), "buffers": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Clones what `state_dict` returned, onto the device of the network.

        Raises:
            ValueError: If it belongs to a network with other trainable parameters, frozen ones or buffers.
        """
        own = self.state_dict()
        with torch.inference_mode(False), torch.no_grad():
            for kind, name in (("params", "params"), ("frozen", "_frozen"), ("buffers", "buffers")):
                tensors = require_matching(state[kind], own[kind], kind)
                setattr(self, name, {key: self._clone(value.to(self.device)) for key, value in tensors.items()})

    def share_buffers(self, processes: Processes) -> None:
        """Gives all processes the buffers of the first one.

        Running statistics depend on the batches of each process.
        """
        for buffer in self.buffers.values():
            processes.broadcast_(buffer)

    def predict(self, inputs: Any) -> Float[Tensor, "B K"]:
        """Outputs of the network at the captured weights, `(B, K)`."""
        return self.predict_at(self.params, inputs)

    def predict_at(self, params: Mapping[str, Tensor], inputs: Any) -> Float[Tensor, "B K"]:
        """Computes outputs `(B, K)` of the (non-linear) network at other weights.

        Buffers and frozen weights are the captured ones.
        """
        given = self._frozen | self.buffers | self._convert_all(params)
        with self.explained(inputs), isolated_pass(self.module, self.device.type), torch.no_grad():
            used = self.spare(given)
            if params is not self.params:  # those of a run, perhaps
                used |= {name: value.clone() for name, value in given.items() if name in params and used[name] is value}
            outputs = self._call(used, self.convert(inputs), lambda outputs: outputs)
            if self._overwrites is None:
                self._overwrites = bool(overwritten(used, given))
        return outputs

    def forward(self, params: Mapping[str, Tensor], inputs: Any) -> Float[Tensor, "B K"]:
        """Outputs `(B, K)` at `params`: differentiable, for use under `torch.func` inside `isolated_pass`."""
        return self.apply(self.spare(params), inputs, lambda outputs: outputs)

    def apply(self, params: Mapping[str, Tensor], inputs: Any, then: Callable[[Tensor], T]) -> T:
        """`then(outputs)`, called while `params` still stand in for the weights of the module.

        A backward pass belongs in `then`: activation checkpointing runs parts of the forward again during it. The forward may
        write into `params`, see `spare`, and gets copies of the inputs.
        """
        return self._call(self.spare(self._frozen | self.buffers) | dict(params), inputs, then)

    def spare(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Copies weights or buffers that a forward may write into.

        Otherwise returns the tensors themselves.
        """
        return dict(tensors) if self._overwrites is False else {name: value.clone() for name, value in tensors.items()}

    def explained(self, inputs: Any) -> AbstractContextManager[None]:
        """Says on which inputs a pass has failed."""
        return explained(
            lambda: f"The pass of {type(self.module).__name__} over inputs {describe(inputs)}",
            "Check that it takes such inputs, or give `unpack` or `predict`.",
        )

    def convert(self, inputs: Any) -> Any:
        """Moves inputs to the device of the weights and the passes' type.

        Only floating-point inputs change type.
        """

        def convert(leaf: Tensor) -> Tensor:
            require_values("inputs", leaf)
            # Autograd cannot save tensors made under inference_mode.
            leaf = leaf.clone() if leaf.is_inference() else leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)

        with torch.inference_mode(False):
            return pytree.tree_map_only(Tensor, convert, inputs)

    def _call(self, state: Tensors, inputs: Any, then: Callable[[Tensor], T]) -> T:
        named = {f"module.{name}": value for name, value in state.items()}
        before = self._versions()
        result: T = call_with(self._predictor, named, (pytree.tree_map_only(Tensor, torch.clone, inputs), then))
        if self._versions() != before:
            raise RuntimeError(
                "Expected a forward that writes into its weights or buffers always or never but it did so for this batch and not "
                "for the first one: the weights at which the network was captured are lost. Let it write into copies."
            )
        return result

    def _versions(self) -> list[int]:
        """How often each captured tensor was written into."""
        return [value._version for tensors in (self.params, self._frozen, self.buffers) for value in tensors.values()]

    def _clone(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype if tensor.is_floating_point() else None).clone()

    def _convert_all(self, tensors: Mapping[str, Tensor]) -> Tensors:
        matching = require_matching(tensors, self.params)
        return {name: tensor.detach().to(self.device, self.dtype) for name, tensor in matching.items()}
