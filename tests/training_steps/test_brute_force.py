"""Twenty steps of the linearized network against an explicit one: the Jacobian of every batch, the loss by hand, torch.optim.

Nothing here is taken from the package but the result of the monitor.
"""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor
from tests.training_steps import zoo

STEPS = 20

# Weights by name, and the step: what a loss may depend on besides the outputs of the network.
Loss = Callable[..., Tensor]
# What a training step computes, by hand: the outputs of the network, and a function that makes them a loss.
Explicit = Callable[[LightningModule, Any], tuple[tuple[Tensor, ...], Loss]]


def classifier(module, batch):
    """Batch normalization and dropout."""
    x, y = batch

    def loss(logits, weights, step):
        return F.cross_entropy(logits, y)

    return (module.net(x),), loss


def log_softmax(module, batch):
    """The outputs are logits, though the step computes logarithms of probabilities."""
    x, y = batch

    def loss(logits, weights, step):
        return F.nll_loss(torch.log_softmax(logits, dim=1), y)

    return (module.model(x),), loss


def focal_loss(module, batch):
    """Weights of samples by the linearized outputs, without a gradient."""
    x, y = batch

    def loss(logits, weights, step):
        p = torch.softmax(logits.detach(), dim=1)[torch.arange(len(y)), y]
        return ((1 - p) ** 2 * F.cross_entropy(logits, y, reduction="none")).mean()

    return (module.net(x),), loss


def mixup(module, batch):
    """Random numbers of numpy and of torch."""
    x, y = batch
    lam = numpy.random.beta(0.4, 0.4)
    index = torch.randperm(len(x))

    def loss(logits, weights, step):
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[index])

    return (module.net(lam * x + (1 - lam) * x[index]),), loss


def warmed_up_penalty(module, batch):
    """A penalty of the weights themselves, not of their linearization."""
    x, y = batch

    def loss(logits, weights, step):
        penalty = sum(weight.square().sum() for weight in weights.values())
        return F.cross_entropy(logits, y) + min(1.0, (step + 1) / 10) * 1e-2 * penalty

    return (module.net(x),), loss


def multi_task(module, batch):
    """Two outputs."""
    x, y = batch
    features = module.trunk(x)

    def loss(digit, size, weights, step):
        return F.cross_entropy(digit, y) + 0.1 * F.mse_loss(size[:, 0], y.double() / 10)

    return (module.heads["digit"](features), module.heads["size"](features)), loss


def learned_loss_weights(module, batch):
    """Parameters that enter the loss alone."""
    x, y = batch

    def loss(out, weights, step):
        s, temperature = weights["log_variances"], weights["temperature"]
        first, second = F.cross_entropy(out[:, :10], y), F.mse_loss(out[:, 10], y.double() / 10)
        return first * (-s[0]).exp() + s[0] + second * (-s[1]).exp() + s[1] + (temperature - 2) ** 2

    return (module.net(x),), loss


def variational_autoencoder(module, batch):
    """Three outputs; what enters the decoder is as it is at the initial weights."""
    x, _ = batch
    h = torch.relu(module.encoder(x))
    mu, log_var = module.mu(h), module.log_var(h)
    restored = module.decoder(mu + torch.randn_like(mu) * (log_var / 2).exp())

    def loss(restored, mu, log_var, weights, step):
        kl = (-0.5 * (1 + log_var - mu.square() - log_var.exp())).sum(1).mean()
        return F.mse_loss(restored, x) + 0.01 * kl

    return (restored, mu, log_var), loss


def variational_distributions(module, batch):
    """The same by `torch.distributions`: the scale is computed from the linearized logarithm of the variance."""
    x, _ = batch
    h = torch.relu(module.encoder(x))
    mu, log_var = module.mu(h), module.log_var(h)
    restored = module.decoder(mu + torch.randn_like(mu) * (log_var / 2).exp())

    def loss(restored, mu, log_var, weights, step):
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).mean()
        return 0.5 * F.mse_loss(restored, x) + 0.01 * kl

    return (restored, mu, log_var), loss


def lstm(module, batch):
    """Dropout between the layers of a recurrent network."""
    x, y = batch
    out, _ = module.lstm(x.view(-1, 8, 8))

    def loss(predicted, weights, step):
        return F.huber_loss(predicted[:, 0], y.double() / 10)

    return (module.head(out[:, -1]),), loss


def teacher_forcing(module, batch):
    """Another way through the step each time."""
    rows = batch[0].view(-1, 8, 8)
    h, row, outputs = module.encoder(rows[:, :4])[1][0], rows[:, 3], []
    for t in range(4, 8):
        h = module.cell(row, h)
        outputs.append(module.out(h))
        row = rows[:, t] if random.random() < 0.5 else outputs[-1]

    def loss(*arguments):
        return sum(F.mse_loss(predicted, rows[:, 4 + t]) for t, predicted in enumerate(arguments[:4])) / 4

    return tuple(outputs), loss


def spectral_norm(module, batch):
    """Buffers that the next step computes with."""
    x, y = batch

    def loss(out, weights, step):
        return F.multi_margin_loss(out, y)

    return (module.net(x),), loss


def simclr(module, batch):
    """Samples that depend on each other, in the network and in the loss."""
    x, _ = batch
    first = x + 0.1 * torch.randn_like(x)
    second = x * (torch.rand_like(x) > 0.2)

    def loss(z, weights, step):
        z = z / z.norm(dim=1, keepdim=True)
        logits = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))

    return (module.net(torch.cat([first, second])),), loss


def masked_logits(module, batch):
    """Entries of the outputs are overwritten before the loss."""
    x, y = batch

    def loss(logits, weights, step):
        kept = (torch.arange(10) + y[:, None]) % 10 != 5
        scale = torch.where(torch.arange(10) < 2, 0.5, 1.0)
        return F.cross_entropy(torch.where(kept, logits, -1e3) * scale, y)

    return (module.net(x),), loss


def constant_parts(module, batch):
    """What has no gradient in reverse mode has none in forward mode."""
    x, y = batch

    def loss(logits, weights, step):
        return F.cross_entropy(logits, y)

    return (module(x),), loss


def two_branches(module, batch):
    """Tensors of the network that are filled in parts."""
    x, y = batch
    bright = (x.mean(1) > x.mean())[:, None]
    hidden = torch.where(bright, torch.tanh(module.bright(x)), torch.relu(module.dark(x)))
    wide = torch.cat([hidden, torch.sigmoid(module.skip(x)), torch.zeros(len(x), 4)], dim=1)

    def loss(logits, weights, step):
        return F.cross_entropy(logits, y)

    return (module.head(wide),), loss


def centered_teacher(module, batch):
    """Buffers in the loss, updated by the linearized outputs."""
    x, _ = batch
    teacher = module.teacher(x + 0.1 * torch.randn_like(x))
    center, student_center = module.center, module.student_center

    def loss(student, weights, step):
        log_p = torch.log_softmax((student - student_center.clone()) / 0.5, dim=1)
        p = torch.softmax((teacher - center.clone()) / 0.5, dim=1)
        center.copy_(0.9 * center + 0.1 * teacher.mean(0))
        student_center.copy_(0.9 * student_center + 0.1 * student.detach().mean(0))
        return -(p * log_p).sum(1).mean()

    return (module.student(x),), loss


def perceptual_loss(module, batch):
    """A frozen network in the loss, which is not linearized."""
    x, _ = batch
    restored = module.net(x * (torch.rand_like(x) > 0.3))

    def loss(restored, weights, step):
        return F.mse_loss(module.features(restored), module.features(x)) + 0.1 * F.l1_loss(restored, x)

    return (restored,), loss


def lora(module, batch):
    """Trained matrices beside frozen ones."""
    logits = module.model(input_ids=batch["input_ids"]).logits

    def loss(logits, weights, step):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    return (logits,), loss


def make_lora() -> LightningModule:
    """With a loss in double precision, which that of the library is not."""

    class InDoublePrecision(zoo.HuggingFace):
        def training_step(self, batch, batch_idx):
            logits = self(input_ids=batch["input_ids"]).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    return InDoublePrecision(zoo.lora().model)


CASES: list[tuple[Callable[[], LightningModule], Explicit, str]] = [
    (zoo.Classifier, classifier, "sgd"),
    (zoo.LogSoftmaxClassifier, log_softmax, "adamw"),
    (zoo.FocalLoss, focal_loss, "adamw"),
    (zoo.Mixup, mixup, "sgd"),
    (zoo.WarmedUpPenalty, warmed_up_penalty, "adamw"),
    (zoo.MultiTask, multi_task, "adamw"),
    (zoo.LearnedLossWeights, learned_loss_weights, "adamw"),
    (zoo.VariationalAutoencoder, variational_autoencoder, "adamw"),
    (zoo.VariationalDistributions, variational_distributions, "sgd"),
    (zoo.LSTMRegression, lstm, "adamw"),
    (zoo.TeacherForcing, teacher_forcing, "sgd"),
    (zoo.SpectralNorm, spectral_norm, "sgd"),
    (zoo.SimCLR, simclr, "sgd"),
    (zoo.MaskedLogits, masked_logits, "sgd"),
    (zoo.ConstantParts, constant_parts, "adamw"),
    (zoo.TwoBranches, two_branches, "sgd"),
    (zoo.CenteredTeacher, centered_teacher, "adamw"),
    (zoo.PerceptualLoss, perceptual_loss, "adamw"),
    (make_lora, lora, "adamw"),
]


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])


class Recorder(Callback):
    """Keeps the batches of a run, and the random states before them."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, tuple[Any, ...]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((copy.deepcopy(batch), random_states()))


class Outputs(nn.Module):
    """The network part of a training step as a forward, so that weights and buffers can be replaced."""

    def __init__(self, module: LightningModule, explicit: Explicit) -> None:
        super().__init__()
        self.module, self.explicit = module, explicit

    def forward(self, batch: Any) -> tuple[tuple[Tensor, ...], Loss]:
        return self.explicit(self.module, batch)


def train_explicitly(
    module: LightningModule,
    explicit: Explicit,
    batches: list[tuple[Any, tuple[Any, ...]]],
    *,
    accumulate: int = 1,
    clip: float = math.inf,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> dict[str, Tensor]:
    """The weights of f0 + J (w - w0) after a step on every `accumulate` batches, with buffers of its own."""
    outputs_of = Outputs(module.train(), explicit)
    start = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    buffers = {f"module.{name}": buffer.clone() for name, buffer in module.named_buffers()}
    optimizer = module.make_optimizer(weights.values())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step, (batch, states) in enumerate(batches):
        found: list[tuple[tuple[Tensor, ...], Loss]] = []
        used: set[str] = set()

        def outputs(*values: Tensor, batch: Any = batch, found: list[Any] = found, used: set[str] = used) -> Any:
            swapped = {f"module.{name}": value for name, value in zip(start, values, strict=True)}
            found.append(functional_call(outputs_of, {**swapped, **buffers}, (batch,)))
            total = sum(output.sum() for output in found[-1][0])
            gradients = torch.autograd.grad(total, values, allow_unused=True, retain_graph=True)
            used.update(name for name, gradient in zip(start, gradients, strict=True) if gradient is not None)
            return found[-1][0]

        restore(states)
        derivatives = jacobian(outputs, tuple(start.values()), vectorize=True)
        assert len(found) == 1  # one forward pass: random numbers and buffers are those of one step
        at_start, loss = found[0]
        linearized = []
        for output, row in zip(at_start, derivatives, strict=True):
            moved = [  # without what the batch does not use: it has no gradient, and optimizers leave it out
                block.reshape(output.numel(), -1) @ (weights[name] - start[name]).flatten()
                for name, block in zip(start, row, strict=True)
                if name in used
            ]
            linearized.append(output.detach() + torch.stack(moved).sum(0).view_as(output))
        (loss(*linearized, weights, step) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip < math.inf:
                nn.utils.clip_grad_norm_(weights.values(), clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return {name: weight.detach() for name, weight in weights.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for _, tensor in sorted(tensors.items())])


@pytest.mark.parametrize(("make", "explicit", "optimizer"), CASES, ids=[explicit.__name__ for _, explicit, _ in CASES])
def test_the_linearized_weights_are_those_of_an_explicit_jacobian(
    make: Callable[[], LightningModule], explicit: Explicit, optimizer: str
) -> None:
    seed_everything(0, verbose=False)
    module = make().double()
    module.optimizer = optimizer
    untrained = copy.deepcopy(module)
    monitor, recorder = LinearizationMonitor(reference=None, steps=STEPS, strict=True, progress=False), Recorder()
    loader = DataLoader(module.dataset(), batch_size=4, shuffle=True, collate_fn=module.collate)
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", precision="64-true", logger=False,
        callbacks=[monitor, recorder], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)

    expected = train_explicitly(untrained, explicit, recorder.batches)
    actual = monitor.comparison.online.weights
    assert actual.keys() == expected.keys()
    start = flat({name: untrained.get_parameter(name) for name in expected})
    error = (flat(actual) - flat(expected)).norm() / (flat(expected) - start).norm()
    assert error <= 1e-9
    trained = flat({name: module.get_parameter(name) for name in expected})
    distance = (trained - flat(expected)).norm() / (trained - start).norm()
    assert monitor.history[-1]["relative_weight_distance"] == pytest.approx(distance.item(), rel=1e-9)
    assert distance > 1e-3  # a linearized network is another one by then
