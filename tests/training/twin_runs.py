"""Runs with the linearized network in lockstep, and the same optimizer on the explicit linear model beside them."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_ntk import Linearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.twin import Twin
from tests.problems import LinearModel, flatten, make, relative_error

Make = Callable[[dict[str, Tensor]], torch.optim.Optimizer]


def of(kind: type[torch.optim.Optimizer], **options) -> Make:
    return lambda parameters: kind(parameters.values(), **options)


OPTIMIZERS: dict[str, Make] = {
    "sgd": of(torch.optim.SGD, lr=0.1),
    "momentum": of(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "nesterov": of(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "fused_sgd": of(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": of(torch.optim.Adam, lr=0.01, betas=(0.8, 0.99)),
    "foreach_adam": of(torch.optim.Adam, lr=0.01, weight_decay=1e-2, foreach=True),
    "fused_adam": of(torch.optim.Adam, lr=0.01, fused=True),
    "adamw": of(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "tensor_lr": of(torch.optim.AdamW, lr=torch.tensor(0.01)),
    "rmsprop": of(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": of(torch.optim.Adagrad, lr=0.05, lr_decay=0.01),
    "nadam": of(torch.optim.NAdam, lr=0.01),
    "adadelta": of(torch.optim.Adadelta, lr=1.0),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.MSELoss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "label_smoothing": nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5]).double()),
    "bce": nn.BCEWithLogitsLoss(),
    "huber": nn.HuberLoss(delta=0.5),
}


def targets_for(loss: str, targets: Tensor) -> Tensor:
    if loss in ("cross_entropy", "label_smoothing"):
        return targets.argmax(1)
    return (targets > 0).to(targets.dtype) if loss == "bce" else targets


def minibatches(samples: int = 11, size: int = 4, steps: int = 30, accumulate: int = 1) -> list[list[Tensor]]:
    """Shuffled epochs of ragged minibatches, the last of 11 samples has 3."""
    generator = torch.Generator().manual_seed(1)

    def stream() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(samples, generator=generator).split(size)

    batches = stream()
    return [list(itertools.islice(batches, accumulate)) for _ in range(steps)]


class Run:
    """A real run and its twin, as a trainer drives them."""

    def __init__(self, module, inputs, targets, loss, make_optimizer: Make, *, schedule=None, late: int = 0, **options):
        self.module, self.inputs, self.targets, self.loss = module, inputs, targets, loss
        self.live = trainable_parameters(module)
        self.optimizer = make_optimizer(self.live)
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.linearization = Linearization(module, **options)
        self.twin = Twin(PairLoss(self.linearization, self.loss), self.optimizer, self.live)

    def train(self, steps: Sequence[Sequence[Tensor]], *, clip_norm=None, clip_value=None, frozen=None) -> None:
        for batches in steps:
            self.optimizer.zero_grad()
            for rows in batches:
                outputs = self.linearization._predictor.predict(self.module, self.rows(rows))
                (self.loss(outputs, self.targets[rows]) / len(batches)).backward()
                self.twin.accumulate((self.rows(rows), self.targets[rows]), scale=1 / len(batches))
            without = [n for n, p in self.live.items() if p.grad is None] if frozen is None else frozen
            self.twin.step(StepSettings(self.optimizer.param_groups, clip_norm, clip_value, without))
            held = [p for group in self.optimizer.param_groups for p in group["params"]]
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(held, clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(held, clip_value)
            self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()

    def rows(self, rows: Tensor):
        return {k: v[rows] for k, v in self.inputs.items()} if isinstance(self.inputs, dict) else self.inputs[rows]

    def error(self, expected: Tensor) -> float:
        """Relative error of the displacement."""
        start = flatten(self.linearization.params)
        return relative_error(flatten(self.twin.displacement()), expected - start)


def warm_up_and_cosine(optimizer: torch.optim.Optimizer) -> LambdaLR:
    def factor(step: int) -> float:
        return (step + 1) / 5 if step < 5 else 0.5 * (1 + torch.cos(torch.tensor(step / 10)).item())

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    cycled = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=40, cycle_momentum=cycled)


def compare(make_optimizer: Make, loss: str, *, network: str = "mlp", accumulate: int = 1, schedule=None, **clipping):
    module, inputs, targets = make(network)
    module.eval()
    targets = targets_for(loss, targets)
    model = LinearModel(module, inputs)
    steps = minibatches(accumulate=accumulate)
    run = Run(module, inputs, targets, LOSSES[loss], make_optimizer, schedule=schedule)
    run.train(steps, **clipping)
    unused = [name for name, p in run.live.items() if p.grad is None]
    expected = model.fit(steps, targets, LOSSES[loss], make_optimizer, schedule=schedule, unused=unused, **clipping)
    assert run.error(expected) < 1e-13
    return run
