"""Linearizes a network and its loss, given only as a training step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.utils.checkpoint import CheckpointError

from lightning_ntk.data.batches import copy_batch, tensors_in
from lightning_ntk.linearization.cut import Cut, CutRecorder
from lightning_ntk.linearization.cut_pass import CutPass, Evaluation, pull_back, pushed, read
from lightning_ntk.linearization.cut_step import CutChangedError, CutStep
from lightning_ntk.linearization.linearization import lacks_forward_mode
from lightning_ntk.linearization.parameters import Tensors, call_with, overwritten, plain_name, trainable_parameters
from lightning_ntk.utilities.contexts import (
    evaluation_mode,
    forward_mode,
    full_precision,
    preserved_rng,
    without_compilation,
    without_library_kernels,
)
from lightning_ntk.utilities.representation import parameter_count, represent
from lightning_ntk.utilities.validation import require_matching

Step = Callable[[Any], Tensor | None]


class _StepModule(nn.Module):
    """Wraps a step as a module's forward, for `call_with`."""

    def __init__(self, module: nn.Module, step: Step) -> None:
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, batch: Any, trace: Any, then: Callable[[Tensor | None], Any]) -> Any:
        with trace:
            loss = self.step(batch)
        # Here, because activation checkpointing runs parts of the forward again in a backward pass.
        return then(loss)


class StepLinearization:
    r"""The linearized network of a training step, with the step's loss.

    The cut between network and loss is found in the first batch (see `lightning_ntk.linearization.cut`) and verified in every
    later pass. The network part runs in train mode at w0 and gives the outputs :math:`f_0` and :math:`J\delta`; the loss part
    sees :math:`f_0 + J\delta` in their place. One forward and one backward pass give the gradient
    :math:`J^\top \partial L / \partial f (f_0 + J\delta)`. At :math:`\delta = 0` it is the gradient of the step itself, with
    batch statistics, dropout and sampling. Expressions of parameters alone, such as regularizers, are evaluated at
    :math:`w_0 + \delta` and not linearized. Random states are as they were after each pass.

    Args:
        module: The network at w0. Its weights stay, and its buffers are updated by the passes in train mode.
        step: Computes the loss of a batch with `module`, or None for a batch without one. It may write into the batch.
        batch_dtype: The type in which the step gets the floating-point tensors of a batch. Default: their own.
        network: Names of the submodules whose outputs are linearized. Default: found by the rule.

    Attributes:
        params: w0, the trainable parameters by name.
        step: The step itself.
        linearized_outputs: Modules whose outputs are linearized in train mode, with the shapes of these in the last batch.
        precision: The least precise floating-point type in which a pass has computed so far.

    Raises:
        ValueError: If the module has no trainable parameters, or if `network` names no submodule.
    """

    def __init__(
        self, module: nn.Module, step: Step, *, batch_dtype: torch.dtype | None = None, network: Sequence[str] = ()
    ) -> None:
        self.module = module
        self.params: Tensors = {name: p.detach() for name, p in trainable_parameters(module).items()}
        self.device = next(iter(self.params.values())).device
        self.linearized_outputs: list[tuple[str, tuple[int, ...]]] = []
        self.precision = torch.float64
        self.step = step
        self._step = _StepModule(module, step)
        self._batch_dtype = batch_dtype
        self._network = list(network)
        self._cuts: dict[bool, Cut] = {}  # in train and in eval mode
        self._rung = 0  # forward mode, then without library kernels, then two reverse passes
        self._running: list[str] = []
        self._frozen = {n: p for n, p in module.named_parameters() if n not in self.params}
        # Frozen parameters beside trainable ones belong to the network; a child that is frozen altogether may be part of a loss.
        trained = {name.partition(".")[0] for name in self.params}
        self._beside = [name for name in self._frozen if name.partition(".")[0] in trained]
        self._written: set[str] = set()  # frozen parameters that the step itself changes, as a momentum encoder
        self._overwrites: dict[bool, set[str]] = {}  # trainable ones into which it writes, in train and in eval mode
        for name, submodule in module.named_modules():
            if name and not isinstance(submodule, torch.jit.ScriptModule):
                submodule.register_forward_pre_hook(self._enter(plain_name(name)))
                submodule.register_forward_hook(self._leave, always_call=True)
        unknown = set(network) - {plain_name(name) for name, _ in module.named_modules()}
        if unknown:
            raise ValueError(
                f"Expected argument `network` to name submodules but got {sorted(unknown)}. The module has "
                f"{', '.join(name for name, _ in module.named_children())}."
            )

    def gradient(
        self, batch: Any, tangent: Mapping[str, Tensor] | None = None, *, update: bool = True
    ) -> Tensors | None:
        """The gradient of the loss of the linearized network in train mode.

        Args:
            batch: The batch, which is left as it is.
            tangent: The displacement of the linearized network from w0, by name; None for zero.
            update: Whether the pass updates the buffers.

        Returns:
            The gradient by parameter name, each with memory of its own; None where the step has no loss.

        Raises:
            ValueError: If there is no cut, or the step does what a linearized network cannot follow.
        """
        buffers = None if update else dict(self.module.named_buffers())
        gradient: Tensors | None = self._run(batch, self.params, tangent, pull_back, train=True, buffers=buffers)
        return gradient

    def gradient_at(self, batch: Any, weights: Mapping[str, Tensor]) -> Tensors | None:
        """Computes the gradient of the network itself in train mode.

        It is taken at weights and buffers by name.

        The buffers here and those given stay as they are.
        """
        gradient: Tensors | None = self._run(batch, weights, None, pull_back, train=True, buffers=weights)
        return gradient

    def first_outputs(self, batch: Any) -> Evaluation | None:
        """The step in train mode at w0, without an update of the buffers."""
        buffers = dict(self.module.named_buffers())
        found: Evaluation | None = self._run(batch, self.params, None, read, train=True, buffers=buffers)
        return found

    def evaluate(
        self, batch: Any, weights: Mapping[str, Tensor] | None = None, tangent: Mapping[str, Tensor] | None = None
    ) -> Evaluation | None:
        """The step in eval mode: at weights and, along a tangent, linearized around them.

        Args:
            batch: The batch.
            weights: Weights and buffers of the network, by name. Default: w0 and the buffers of the passes in train mode.
            tangent: The displacement of the linearized network; None for the network itself.

        Returns:
            What was computed; None where the step has no loss in eval mode.
        """
        given = self.params if weights is None else weights
        found: Evaluation | None = self._run(batch, given, tangent, read, train=False, buffers=weights)
        return found

    def copy(self, batch: Any) -> Any:
        """A copy of a batch, as the step gets it."""
        return copy_batch(batch, self._batch_dtype)

    def describe(self) -> str:
        """One sentence on what is linearized, in the names of the network."""
        places = [
            f"`{name}`, {shape}" if name else f"the training step, {shape}" for name, shape in self.linearized_outputs
        ]
        some = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if places[3:] else "")
        return f"Linearizing the outputs of {some}." if places else "Nothing is linearized yet."

    def state_dict(self) -> dict[str, Tensors]:
        """The tensors of the network, under "params", "frozen" and "buffers"."""
        buffers = {name: buffer.detach() for name, buffer in self.module.named_buffers()}
        return {"params": self.params, "frozen": {n: p.detach() for n, p in self._frozen.items()}, "buffers": buffers}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copies what `state_dict` returned into the network, whatever device it is on."""
        with torch.no_grad():
            for kind, own in self.state_dict().items():
                for name, tensor in require_matching(state[kind], own, kind).items():
                    own[name].copy_(tensor)

    def _run(
        self,
        batch: Any,
        weights: Mapping[str, Tensor],
        tangent: Mapping[str, Tensor] | None,
        then: Callable[[CutPass], Any],
        *,
        train: bool,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Any:
        own = dict(self.module.named_buffers())
        kept = {name: buffer.detach().clone() for name, buffer in own.items()}
        given = kept if buffers is None else {name: buffers[name].detach().to(value) for name, value in own.items()}
        params = {name: weights[name].detach().to(start) for name, start in self.params.items()}
        known, finished = train in self._cuts, False
        with self._isolated(train=train):
            try:
                while not finished:
                    try:
                        if train not in self._cuts and not self._find(batch, params, given, train=train):
                            return None
                        updates = train and buffers is None
                        swapped = {} if updates else {name: value.clone() for name, value in given.items()}
                        frozen = (
                            {} if updates else {name: weights.get(name, self._frozen[name]) for name in self._written}
                        )
                        result = self._along_cut(batch, params, tangent, then, swapped, frozen, train=train)
                        finished = True
                    except CutChangedError as error:
                        _restore(own, kept)
                        if not known:
                            raise ValueError(
                                f"Expected a training step that takes the same way twice on one batch but {error}. It keeps "
                                "state or draws random numbers that are not restored."
                            ) from error
                        known = False
                        del self._cuts[train]
                    except (NotImplementedError, RuntimeError) as error:
                        _restore(own, kept)
                        # Activation checkpointing refuses a forward that records more than its repetition.
                        ends = tangent is None or self._rung == 2
                        if ends or not (lacks_forward_mode(error) or isinstance(error, CheckpointError)):
                            raise
                        self._rung += 1
            finally:
                if not (train and finished):
                    _restore(own, kept)
        return result

    def _find(self, batch: Any, params: Tensors, buffers: Mapping[str, Tensor], *, train: bool) -> bool:
        """Records a cut, on copies of the buffers.

        False where the step has no loss.
        """
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        batch = self.copy(batch)
        frozen = {name: p.detach().clone() for name, p in self._frozen.items()}
        beside = [frozen[name] for name in self._beside]
        recorder = CutRecorder([*leaves.values(), *beside], tensors_in(batch), self._network)
        recorder.running = self._running
        state = leaves | frozen | {name: buffer.detach().clone() for name, buffer in buffers.items()}

        def keep(loss: Tensor | None) -> bool:
            if loss is not None:
                self._cuts[train] = recorder.cut(loss)
                self.precision = max(self.precision, recorder.precision, key=lambda dtype: torch.finfo(dtype).eps)
            return loss is not None

        with preserved_rng(), torch.enable_grad():
            found: bool = self._call(state, batch, recorder, keep)
        self._written |= overwritten(frozen, self._frozen)
        self._overwrites[train] = overwritten(leaves, params)
        if self._overwrites[train]:  # which forward mode would differentiate, and reverse mode does not
            self._rung = 2
        return found

    def _along_cut(
        self,
        batch: Any,
        params: Tensors,
        tangent: Mapping[str, Tensor] | None,
        then: Callable[[CutPass], Any],
        buffers: Tensors,
        frozen: Mapping[str, Tensor],
        *,
        train: bool,
    ) -> Any:
        reverse = tangent is not None and self._rung == 2
        overwrites = self._overwrites[train]
        before = [value._version for value in params.values()]
        used = {name: value.clone() for name, value in params.items()} if overwrites else params
        leaves = {name: value.detach().requires_grad_(train or reverse) for name, value in used.items()}
        values: Tensors = {}  # of the parameters that the loss uses directly

        def value_of(name: str) -> Tensor:
            if name not in params:
                return network[name]
            if name not in values:
                moved = used[name] if tangent is None else used[name] + tangent[name].to(used[name])
                values[name] = moved.detach().requires_grad_(train)
            return values[name]

        batch = self.copy(batch)
        with ExitStack() as stack, ExitStack() as duals:
            stack.enter_context(preserved_rng())
            stack.enter_context(torch.enable_grad())
            network: Mapping[str, Tensor] = leaves
            if tangent is not None:
                stack.enter_context(forward_mode())
                if self._rung > 0:
                    stack.enter_context(without_library_kernels())
                if not reverse:
                    duals.enter_context(dual_level())
                    # Nothing else holds these tangents: they are gone when the duals are closed.
                    network = {n: make_dual(leaf, tangent[n].to(leaf)) for n, leaf in leaves.items()}  # type: ignore[no-untyped-call]

            def linearize(start: Tensor) -> Tensor:
                if reverse and tangent is not None:
                    return start.detach() + pushed(start, leaves, tangent)
                primal: Tensor
                primal, derivative = unpack_dual(start)  # type: ignore[no-untyped-call]
                return primal.detach().clone() if derivative is None else primal.detach() + derivative.detach()

            # Tensors that are no parameters, as when the cut was found, for some functions tell them apart; but the step
            # itself writes into its own.
            fixed = {n: p.detach() for n, p in self._frozen.items() if n not in self._written}
            fixed |= {n: value.detach().to(self._frozen[n]).clone() for n, value in frozen.items()}
            beside = {f"frozen {n}": fixed.get(n, self._frozen[n]) for n in self._beside}
            network = {**network, **beside}
            trace = CutStep(self._cuts[train], network, value_of, tensors_in(batch), linearize)
            trace.running = self._running

            def finish(loss: Tensor | None) -> Any:
                if loss is None:
                    return None
                trace.finish()
                if [value._version for value in params.values()] != before:
                    raise ValueError(
                        "Expected a step that writes into its weights in every batch or in none but it did so in this batch and "
                        "not in the first one: the weights at which the network was captured are lost."
                    )
                if tangent is not None and (unseen := overwrites - overwritten(leaves, params)):
                    raise ValueError(
                        f"Expected a step that writes into its weights under `torch.no_grad` but it writes into {sorted(unseen)} "
                        "in another way, such as `.data`, which the linearized network does not see."
                    )
                if train:
                    self.linearized_outputs = [(output.module, tuple(output.start.shape)) for output in trace.outputs]
                return then(CutPass(loss, trace, leaves, values, duals))

            return self._call({**{n: network[n] for n in leaves}, **buffers, **fixed}, batch, trace, finish)

    def _call(self, state: Mapping[str, Tensor], batch: Any, trace: Any, then: Callable[..., Any]) -> Any:
        self._running.clear()
        return call_with(self._step, {f"module.{n}": v for n, v in state.items()}, (batch, trace, then))

    @contextmanager
    def _isolated(self, *, train: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(full_precision(self.device.type))
            stack.enter_context(without_compilation())
            if not train:
                stack.enter_context(evaluation_mode(self.module))
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._running.append(name)

        return enter

    def _leave(self, *_: Any) -> None:
        if self._running:
            self._running.pop()

    def __repr__(self) -> str:
        outputs = " and ".join(f"{name} {shape}" for name, shape in self.linearized_outputs)
        return represent(
            self, type(self.module).__name__, parameter_count(self.params), outputs and f"outputs of {outputs}"
        )


def _restore(own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(kept[name])
