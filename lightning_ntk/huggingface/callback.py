"""The callback for the Trainer of transformers.

It sees each batch as the model does, right before the model's own pass.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from typing_extensions import override

from lightning_ntk.comparison.expected_gradient import ExpectedGradient
from lightning_ntk.comparison.gradient_check import compiled_noise
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.comparison.schedule import is_scheduled
from lightning_ntk.comparison.step_functions import StepComparison
from lightning_ntk.data.reference import NoFixedOrderError, Reference, evenly_spaced
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.linearization.step import StepLinearization
from lightning_ntk.report.measured_run import LOST, MeasuredRun
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.user_warnings import warn_user
from lightning_ntk.utilities.validation import require_integer, require_steps


class LinearizationCallback(MeasuredRun, TrainerCallback):
    """Compares a run of the transformers Trainer with its linearized network.

    It is the counterpart of `LinearizationMonitor` for Lightning.

    The linearized network is trained in lockstep by a copy of the run's optimizer, on the loss that the model returns.
    The weights of the run are bitwise those of a run without the callback. The scalars are in `history` and, with the
    prefix `ntk/`, in `trainer.state.log_history`. When training ends, one line gives the verdict. In the first step
    and in every measured step, the gradient of the run is compared with that of the linearized loss, as
    `gradient_mismatch`.

    It supports one process and one device, in full precision and in bf16, for runs from their start.

    Args:
        reference: Data on which functions are compared: the training set, another data set collated in the same way, or
            a DataLoader. None compares weights only.
        steps: An integer n to measure every n optimizer steps, a list of steps, or "log" for roughly logarithmic steps.
            The first (0) and the last step are always measured.
        evaluation: Further data on which functions are compared.
        reference_samples: Number of samples per data set, evenly spaced, on which to compare functions. None for all.
        per_parameter: Whether to log the distance of every parameter tensor, `parameter/<name>`.
        taylor: Whether to log `taylor_gap`, from an expansion of the trained network around the initial weights.
        name: Prefix of the logged tags.

    Raises:
        ValueError: If an argument has an invalid value or, when training starts, if the run cannot be followed.

    Example:
        >>> callback = LinearizationCallback(steps=100)
        >>> callback
        LinearizationCallback('ntk': nothing measured)
    """

    def __init__(
        self,
        reference: Dataset[Any] | DataLoader[Any] | Literal["train"] | None = "train",
        steps: int | Sequence[int] | Literal["log"] = "log",
        *,
        evaluation: Dataset[Any] | DataLoader[Any] | None = None,
        reference_samples: int | None = 256,
        per_parameter: bool = False,
        taylor: bool = True,
        name: str = "ntk",
    ) -> None:
        require_steps(steps)
        if reference_samples is not None:
            require_integer("reference_samples", reference_samples, least=1)
        self.reference = reference
        self.steps = steps
        self.evaluation = evaluation
        self.reference_samples = reference_samples
        self.per_parameter = per_parameter
        self.taylor = taylor
        self.name = name
        self.history = []
        self.comparison: RunComparison | None = None
        self._lost, self._warnings = False, dict[str, None]()
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what cannot be followed, linearizes the network and measures."""
        self._unhook()  # from the model of a run that failed
        _require_supported(args, state)
        self._args, self._state, self._loader = args, state, kwargs["train_dataloader"]
        self._model: nn.Module = kwargs["model"]
        optimizer = kwargs["optimizer"]
        self._optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self._batches = 0  # of the epoch
        self._divides = False  # whether the Trainer divides the loss by the number of batches of a step
        self._mismatch: float | None = None
        self.history, self._lost, self._warnings = [], False, {}
        self.comparison = self._capture()
        self._measure()
        # The Trainer may compile the model with the hook in it.
        before_forward = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
        self._hook = self._model.register_forward_pre_hook(before_forward, with_kwargs=True)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the batches of an epoch anew: its last step may have fewer."""
        self._batches = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the linearized network's step, with the optimizer's learning rates."""
        if self.comparison is None or self._lost:
            return
        live = {name: p for name, p in self._model.named_parameters() if name in self.comparison.initial_weights}
        settings = StepSettings.of(self._optimizer, live, clip_norm=args.max_grad_norm or None)
        self._mismatch = None
        if self._compares_gradient:
            self._compare_gradient({name: p.grad for name, p in live.items()}, settings.clip_norm)
        with self._following(self.comparison):
            self.comparison.step(settings)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures if it is time."""
        if is_scheduled(self.steps, state.global_step) or state.global_step == state.max_steps:
            self._measure_once()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the last step of a run that is stopped, before the Trainer loads its best weights."""
        if control.should_training_stop:
            self._measure_once()
        rest = self._batches % args.gradient_accumulation_steps
        if rest and self._divides and not self._lost and not has_length(self._loader):
            assert self.comparison is not None
            with self._following(self.comparison):
                raise ValueError(
                    "The streamed data ended within a step, whose loss the Trainer does not divide by "
                    f"gradient_accumulation_steps={args.gradient_accumulation_steps}. Give data with a length."
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures the last step of a run that an evaluation has stopped."""
        if control.should_training_stop:
            self._measure_once()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the last step if nothing has, removes the hook and prints the verdict."""
        self._unhook()
        if args.load_best_model_at_end and state.best_model_checkpoint and not self._is_measured:
            self._warn(
                f"LinearizationCallback has not measured the last step, {state.global_step}: the Trainer has put the weights of "
                "the best step in their place."
            )
        else:
            self._measure_once()
        print(f"LinearizationCallback: {self.verdict.describe()}")

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @override
    def _initial_weights(self) -> Mapping[str, Tensor]:
        return {} if self.comparison is None else self.comparison.initial_weights

    @override
    def _doubts(self) -> list[str]:
        return [LOST] if self._lost else []

    @override
    def _notes(self) -> list[str]:
        return list(self._warnings)

    def _warn(self, sentence: str) -> None:
        self._warnings[sentence] = None
        warn_user(sentence)

    def _capture(self) -> RunComparison:
        shadow = copy.deepcopy(self._model).train()
        if hasattr(shadow, "_original_forward"):  # Accelerate has put one in its place that computes in lower precision
            shadow.__dict__.pop("forward", None)
        step = StepLinearization(shadow, lambda batch: _loss_of(shadow(**batch)))
        return RunComparison(
            step, Twin(step, self._optimizer, trainable_parameters(self._model)), module=self._model,
            reference=self._functions(step, self.reference), evaluation=self._functions(step, self.evaluation),
            expected_gradient=ExpectedGradient(step), per_parameter=self.per_parameter,
        )  # fmt: skip

    def _functions(self, step: StepLinearization, data: Any) -> StepComparison | None:
        if data is None:
            return None
        loader = self._loader if isinstance(data, str) else data
        if not isinstance(loader, DataLoader):
            loader = DataLoader(data, collate_fn=self._loader.collate_fn)
        try:
            samples = evenly_spaced(loader, self.reference_samples)
        except NoFixedOrderError as error:
            if not isinstance(data, str):
                raise
            self._warn(f"LinearizationCallback compares weights only, and no functions on the training set. {error}")
            return None
        reference = Reference(
            samples,
            batch_size=self._args.per_device_train_batch_size,
            transfer=lambda batch: {n: v.to(step.device) if isinstance(v, Tensor) else v for n, v in batch.items()},
        )
        return StepComparison(step, reference, taylor=self.taylor)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        """Trains the linearized network on the batch, with the model's random numbers."""
        if self.comparison is None or self._lost or not (model.training and torch.is_grad_enabled()):
            return
        # The model itself divides by the number of labels in all batches of a step, where the Trainer tells it.
        self._divides = batch.get("num_items_in_batch") is None
        scale = 1 / self._batches_of_step() if self._divides else 1.0
        self._batches += 1
        with self._following(self.comparison):
            if args:
                raise ValueError("Expected a Trainer that calls model(**batch) but it gives positional inputs.")
            self.comparison.accumulate(batch, scale)
            if self._compares_gradient and self.comparison.expected_gradient is not None:
                live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
                self.comparison.expected_gradient.accumulate(batch, live, scale)

    def _batches_of_step(self) -> int:
        each = int(self._args.gradient_accumulation_steps)
        rest = len(self._loader) % each if has_length(self._loader) else 0
        return rest if rest and self._batches >= len(self._loader) - rest else each

    @property
    def _compares_gradient(self) -> bool:
        step = self._state.global_step + 1
        return step in (1, self._state.max_steps) or is_scheduled(self.steps, step)

    def _compare_gradient(self, gradients: dict[str, Tensor | None], clip_norm: float | None) -> None:
        assert self.comparison is not None
        expected, step = self.comparison.expected_gradient, self.comparison.loss
        assert expected is not None
        assert isinstance(step, StepLinearization)
        norm = float(nn.utils.get_total_norm(list(expected.total().values())))
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))  # as the Trainer has clipped them
        own = {name: None if gradient is None else gradient / factor for name, gradient in gradients.items()}
        types = [
            torch.bfloat16 if _mixed_precision() == "bf16" else step.precision,
            *(p.dtype for p in step.params.values()),
        ]
        precision = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        self._mismatch, mismatch = expected.compare(own, precision)
        if mismatch is None:
            return
        number = self.comparison.steps + 1
        sentence = f"LinearizationCallback does not follow the loss of this run in step {number}. {mismatch.describe()}"
        if number == 1:
            noise = compiled_noise(self._model, is_compiled=self._args.torch_compile)
            raise ValueError(f"{sentence} {noise or 'It follows the loss that the model itself returns'}.")
        self._warn(sentence)

    @property
    def _is_measured(self) -> bool:
        return bool(self.history) and self.history[-1]["step"] == self._state.global_step

    def _measure_once(self) -> None:
        if not self._is_measured:
            self._measure()

    def _measure(self) -> None:
        if self.comparison is None or self._lost:
            return
        step = self._state.global_step
        with self._following(self.comparison):
            scalars = self.comparison.measure()
            if self._mismatch is not None:
                scalars["gradient_mismatch"] = self._mismatch
            self.history.append({"step": float(step), **scalars})
            self._state.log_history.append({f"{self.name}/{tag}": v for tag, v in scalars.items()} | {"step": step})

    @contextmanager
    def _following(self, comparison: RunComparison) -> Iterator[None]:
        """Ends the measurements, not the run, if following fails after the first step."""
        try:
            yield
        except Exception as error:
            if comparison.steps == 0:
                raise
            self._lost = True
            self._warn(
                f"LinearizationCallback has lost the linearized network in step {comparison.steps + 1}, and measurements "
                f"end; training goes on. {type(error).__name__}: {error}"
            )


def _require_supported(args: TrainingArguments, state: TrainerState) -> None:
    reasons = {
        "one process and one device": args.world_size > 1 or args.n_gpu > 1,
        "full precision or bf16=True": _mixed_precision() not in ("no", "bf16"),
        "label_smoothing_factor=0, since the model returns its own loss": args.label_smoothing_factor > 0,
        "a run from its start": state.global_step > 0,
    }
    refused = [expected for expected, found in reasons.items() if found]
    if refused:
        raise ValueError(f"Expected {refused[0]} with LinearizationCallback, which does not follow other runs.")


def _mixed_precision() -> str:
    """What the run computes in.

    `accelerate launch --mixed_precision` decides it too, and `TrainingArguments` does not know.
    """
    return str(AcceleratorState().mixed_precision)


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise ValueError(
            "Expected a model that returns its loss but it returned none: the batches need `labels`, and a `compute_loss` of "
            "your own is not followed."
        )
    return loss  # type: ignore[no-any-return]
