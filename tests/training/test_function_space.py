"""The replay in function space, against torch.optim.SGD on the explicit linear model with the same minibatches."""

import io
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ntk.dynamics.filters import Start
from lightning_ntk.dynamics.sgd import ModalSGD, SGDSettings
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.training.function_space import FunctionSpaceSGD
from tests.problems import LinearModel, make, relative_error

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
DECAYS = ("none", "coupled", "decoupled", "initial")
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.05,
    "cosine": lambda step: 0.025 * (1 + math.cos(math.pi * step / 30)),
    "warm-up": lambda step: 0.05 * min(1.0, (step + 1) / 10),
}
LOSSES: dict[str, tuple[nn.Module, str]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), "labels"),
    "mse": (nn.MSELoss(), "rows"),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5])), "labels"),
    "bce": (nn.BCEWithLogitsLoss(), "probabilities"),
    "huber": (nn.HuberLoss(delta=0.5), "rows"),
}
COVERING = [
    (optimizer, decay, list(SCHEDULES)[number % 3], number % 7 % 2 == 1, loss)
    for number, (optimizer, decay, loss) in enumerate(product(OPTIMIZERS, DECAYS, LOSSES))
]


class Problem:
    """A network of 11 samples and 3 outputs, linearized without the package."""

    def __init__(self, loss: str = "cross-entropy", samples: int = 11) -> None:
        module, inputs, rows = make("mlp", outputs=3, samples=samples)
        self.model = LinearModel(module, inputs)
        self.kernel = self.model.jacobian @ self.model.jacobian.T
        self.loss, kind = LOSSES[loss]
        self.loss = self.loss.double()
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, 3, (samples,), generator=generator)
        self.targets = {"labels": labels, "rows": rows, "probabilities": rows.sigmoid()}[kind]
        self.objective = Objective(self.loss, self.model.outputs, self.targets)

    def image(self, weights: Tensor) -> Tensor:
        return (self.model.jacobian @ weights).reshape(self.model.outputs.shape)

    def gradient_norm(self) -> float:
        """Of the loss of all samples at w0."""
        gradient = self.objective.gradient(self.model.outputs, self.objective.targets)
        return (self.model.jacobian.T @ gradient.flatten()).norm().item()

    def batches(self, steps: int, accumulation: int = 3) -> list[list[Tensor]]:
        """Shuffled epochs in ragged batches of 4, 4 and 3 samples, grouped by optimizer step."""
        generator = torch.Generator().manual_seed(2)
        flat: list[Tensor] = []
        while len(flat) < steps * accumulation:
            flat.extend(torch.randperm(len(self.targets), generator=generator).split(4))
        return [flat[i : i + accumulation] for i in range(0, steps * accumulation, accumulation)]

    def train(
        self, steps: list[list[Tensor]], options: list[SGDSettings], *, decay: str = "none",
        clip_norm: float | None = None, buffer: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """w - w0 after torch.optim.SGD on the linear model."""
        origin = torch.zeros_like(self.model.start) if decay == "initial" else self.model.start
        # Decay toward w0 is decay of the displacement: the optimizer then holds that.
        parameter = origin.clone().requires_grad_()
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        if buffer is not None:
            optimizer.state[parameter]["momentum_buffer"] = buffer.clone()
        for batches, option in zip(steps, options, strict=True):
            optimizer.param_groups[0].update(option._asdict())
            if decay == "decoupled":
                optimizer.param_groups[0]["weight_decay"] = 0.0
            optimizer.zero_grad()
            for rows in batches:
                outputs = self.model.outputs + self.image(parameter - origin)
                (self.loss(outputs[rows], self.targets[rows]) / len(batches)).backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_([parameter], clip_norm)
            if decay == "decoupled":
                parameter.data.mul_(1 - option.lr * option.weight_decay)
            optimizer.step()
        return (parameter - origin).detach()

    def replay(
        self, decay: str = "none", buffer: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> FunctionSpaceSGD:
        return FunctionSpaceSGD(
            self.kernel.to(dtype), self.model.outputs, self.objective,
            carried=[
                *([(Start(1.0, 0.0), self.image(self.model.start))] if decay in ("coupled", "decoupled") else []),
                *([] if buffer is None else [(Start(0.0, 1.0), self.image(buffer))]),
            ],
            decays=decay != "none",
        )  # fmt: skip

    def displacement(self, replay: FunctionSpaceSGD, buffer: Tensor | None = None) -> Tensor:
        """w_lin - w0 from what the replay carries."""
        moved, scales = self.model.jacobian.T @ replay.coefficients.flatten(), list(replay.scales)
        moved += 0 if buffer is None else scales.pop() * buffer
        return moved + scales.pop() * self.model.start if scales else moved


def settings_of(optimizer: str, decay: str, schedule: str, steps: int) -> list[SGDSettings]:
    gamma = 0.0 if decay == "none" else 1e-2
    return [
        SGDSettings(
            lr=SCHEDULES[schedule](step),
            weight_decay=gamma,
            decoupled_weight_decay=decay == "decoupled",
            **OPTIMIZERS[optimizer],
        )
        for step in range(steps)
    ]


def run(
    problem: Problem, replay: FunctionSpaceSGD, steps: list[list[Tensor]], options: list[SGDSettings],
    clip_norm: float | None = None,
) -> None:  # fmt: skip
    for batches, option in zip(steps, options, strict=True):
        for rows in batches:
            replay.accumulate(rows, problem.targets[rows], scale=1 / len(batches))
        replay.step(option, clip_norm=clip_norm)


def assert_same(
    problem: Problem, replay: FunctionSpaceSGD, moved: Tensor, tolerance: float, buffer: Tensor | None = None
) -> None:
    assert relative_error(problem.displacement(replay, buffer), moved) < tolerance
    change = problem.image(moved)
    assert relative_error(replay.predictions - problem.model.outputs, change) < tolerance


@pytest.mark.tested("minibatches", "replay")
@pytest.mark.tested("gradient accumulation", "replay")
@pytest.mark.tested("momentum, dampening, Nesterov", "replay")
@pytest.mark.tested("weight decay", "replay")
@pytest.mark.tested("learning-rate schedule", "replay")
@pytest.mark.tested("clipping by norm", "replay")
@pytest.mark.tested("cross-entropy and other losses", "replay")
@pytest.mark.parametrize(("optimizer", "decay", "schedule", "clipped", "loss"), COVERING)
def test_replay_equals_sgd_on_the_linear_model(
    optimizer: str, decay: str, schedule: str, clipped: bool, loss: str
) -> None:
    problem, steps = Problem(loss), 25
    batches, options = problem.batches(steps), settings_of(optimizer, decay, schedule, steps)
    clip_norm = 0.5 * problem.gradient_norm() if clipped else None
    moved = problem.train(batches, options, decay=decay, clip_norm=clip_norm)
    replay = problem.replay(decay)
    run(problem, replay, batches, options, clip_norm)
    assert_same(problem, replay, moved, 1e-13)


@pytest.mark.tested("late start with a momentum buffer", "replay")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("optimizer", ["momentum", "dampening", "nesterov"])
def test_a_late_start_continues_the_momentum_buffer(optimizer: str, decay: str) -> None:
    problem, steps = Problem(), 20
    buffer = torch.randn(problem.model.start.shape, generator=torch.Generator().manual_seed(3)).double()
    batches, options = problem.batches(steps), settings_of(optimizer, decay, "cosine", steps)
    moved = problem.train(batches, options, decay=decay, clip_norm=0.5, buffer=buffer)
    replay = problem.replay(decay, buffer)
    run(problem, replay, batches, options, clip_norm=0.5)
    assert abs(replay.scales[-1]) > 0.1
    assert_same(problem, replay, moved, 1e-13, buffer)


def test_settings_may_change_during_the_run() -> None:
    problem, steps = Problem(), 20
    batches = problem.batches(steps)
    options = settings_of("plain", "none", "constant", 5) + settings_of("momentum", "coupled", "cosine", 10)
    options += settings_of("nesterov", "none", "warm-up", 5)
    moved = problem.train(batches, options)
    replay = problem.replay("coupled")
    run(problem, replay, batches, options)
    assert_same(problem, replay, moved, 1e-13)


def test_samples_may_repeat_within_a_batch_and_within_a_step() -> None:
    problem = Problem("mse")
    batches = [[torch.tensor([3, 3, 0, 3]), torch.tensor([10, 3])], [torch.tensor([1, 1])]]
    options = settings_of("momentum", "none", "constant", 2)
    moved = problem.train(batches, options, clip_norm=0.1)
    replay = problem.replay()
    run(problem, replay, batches, options, clip_norm=0.1)
    assert_same(problem, replay, moved, 1e-13)


def test_full_batches_of_a_squared_loss_give_the_gradient_descent_of_the_modes() -> None:
    problem, steps = Problem("mse"), 30
    everything = [[torch.arange(11)]] * steps
    options = settings_of("plain", "none", "cosine", steps)
    replay = problem.replay()
    run(problem, replay, everything, options)
    eigenvalues, basis = torch.linalg.eigh(problem.kernel)
    descent = ModalSGD([eigenvalues], factor=problem.objective.require_factor())
    for option in options:
        descent.step(option)
    residual = (problem.model.outputs - problem.targets).flatten()
    expected = -basis @ (descent.filters.values[0] * (basis.T @ residual))
    assert relative_error(replay.coefficients.flatten(), expected) < 1e-12


@pytest.mark.parametrize(
    ("direct", "gathered"), [(10**9, 2**20), (10**9, 500), (1, 0)], ids=["one", "chunks", "in place"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_every_way_to_read_the_kernel(
    direct: int, gathered: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ntk.training.function_space._DIRECT_NUMBERS", direct)
    monkeypatch.setattr("lightning_ntk.training.function_space._GATHERED_BYTES", {"cpu": gathered})
    problem, steps = Problem(), 25
    batches, options = problem.batches(steps), settings_of("momentum", "coupled", "cosine", steps)
    moved = problem.train(batches, options)
    replay = problem.replay("coupled", dtype=dtype)
    run(problem, replay, batches, options)
    assert_same(problem, replay, moved, tolerance)


@pytest.mark.tested("divergence", "replay")
def test_a_diverged_replay_goes_on_and_says_so_when_read() -> None:
    problem = Problem("mse")
    replay = problem.replay()
    run(problem, replay, [[torch.arange(11)]] * 400, [SGDSettings(lr=1e3)] * 400)
    for name in ("predictions", "coefficients"):
        with pytest.raises(OverflowError, match=r"diverged: after 400 steps .* learning rate"):
            getattr(replay, name)


@pytest.mark.tested("saved and continued state", "replay")
@pytest.mark.parametrize("optimizer", ["plain", "nesterov"])
def test_a_saved_state_continues_exactly(optimizer: str) -> None:
    problem, steps = Problem(), 12
    batches, options = problem.batches(steps), settings_of(optimizer, "coupled", "cosine", steps)
    whole, first, second = (problem.replay("coupled") for _ in range(3))
    run(problem, whole, batches, options)
    run(problem, first, batches[:5], options[:5])
    state = first.state_dict()
    run(problem, first, batches[5:], options[5:])  # must not reach into the state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    second.accumulate(torch.tensor([0]), problem.targets[:1])  # is forgotten
    second.load_state_dict(torch.load(file, weights_only=True))
    run(problem, second, batches[5:], options[5:])
    for replay in (first, second):
        assert torch.equal(replay.coefficients, whole.coefficients)
        assert torch.equal(replay.predictions, whole.predictions)
        assert replay.scales == whole.scales
        assert replay.steps == steps


@pytest.mark.tested("inference mode", "replay")
def test_inference_mode_may_come_and_go() -> None:
    problem = Problem()
    batches, options = problem.batches(9), settings_of("momentum", "coupled", "cosine", 9)
    expected = problem.replay("coupled")
    run(problem, expected, batches, options)
    with torch.inference_mode():
        replay = problem.replay("coupled")
        run(problem, replay, batches[:3], options[:3])
    run(problem, replay, batches[3:6], options[3:6])
    with torch.inference_mode():
        replay.load_state_dict(replay.state_dict())
        run(problem, replay, batches[6:8], options[6:8])
    run(problem, replay, batches[8:], options[8:])
    assert torch.equal(replay.coefficients, expected.coefficients)


def test_state_of_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(11, 3\) samples and outputs but got \(7, 3\)"):
        Problem().replay().load_state_dict(Problem(samples=7).replay().state_dict())


def test_what_has_no_meaning_in_function_space_is_refused() -> None:
    problem = Problem()
    replay = problem.replay()
    with pytest.raises(RuntimeError, match="accumulate"):
        replay.step(SGDSettings(lr=0.1))
    replay.accumulate(torch.tensor([0, 1]), problem.targets[:2])
    with pytest.raises(ValueError, match="clipping by value"):
        replay.step(SGDSettings(lr=0.1), clip_value=0.5)
    with pytest.raises(ValueError, match="clip_norm"):
        replay.step(SGDSettings(lr=0.1), clip_norm=-1.0)
    with pytest.raises(ValueError, match="without weight decay"):
        replay.step(SGDSettings(lr=0.1, weight_decay=1e-2))


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        (torch.tensor([0.0, 1.0]), 2, "integers"),
        (torch.tensor([[0, 1]]), 1, r"integers \(B,\)"),
        (torch.tensor([], dtype=torch.long), 0, r"integers \(B,\)"),
        (torch.tensor([0, 11]), 2, r"from 0 to 10, but got \[0, 11\]"),
        (torch.tensor([-1, 3]), 2, r"from 0 to 10, but got \[-1, 3\]"),
        (torch.tensor([0, 1, 2]), 2, "targets of 3 samples"),
    ],
)
def test_rows_and_targets_must_fit(rows: Tensor, count: int, message: str) -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=message):
        problem.replay().accumulate(rows, problem.targets[:count])


def test_a_loss_whose_gradient_is_one_number() -> None:
    problem = Problem()
    objective = Objective(lambda outputs, targets: outputs.sum(), problem.model.outputs, problem.targets)
    replay = FunctionSpaceSGD(problem.kernel, problem.model.outputs, objective)
    replay.accumulate(torch.tensor([0, 4]), problem.targets[[0, 4]], scale=0.5)
    replay.step(SGDSettings(lr=0.1))
    expected = torch.zeros(11, 3).double()
    expected[[0, 4]] = -0.05
    torch.testing.assert_close(replay.coefficients, expected, rtol=1e-12, atol=0)


def test_shapes_and_options_are_checked() -> None:
    problem = Problem()
    outputs, objective = problem.model.outputs, problem.objective
    with pytest.raises(ValueError, match=r"\(11, 3\), \(32, 33\)"):
        FunctionSpaceSGD(problem.kernel[1:], outputs, objective)
    with pytest.raises(ValueError, match=r"images of the shape of the predictions but got .* \(1, 3\)"):
        FunctionSpaceSGD(problem.kernel, outputs, objective, carried=[(Start(1.0, 0.0), outputs[:1])])


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    samples=st.integers(1, 9),
    outputs=st.integers(1, 5),
    parameters=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_shape_and_any_order_of_batches(
    data: st.DataObject, samples: int, outputs: int, parameters: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(samples * 1000 + outputs * 100 + parameters)
    jacobian = torch.randn(samples * outputs, parameters, generator=generator).double() / math.sqrt(parameters)
    start, targets = (torch.randn(samples, outputs, generator=generator).double() for _ in range(2))
    kernel = (jacobian @ jacobian.T).to(dtype)
    loss = nn.MSELoss()
    replay = FunctionSpaceSGD(kernel, start, Objective(loss, start, targets))
    order = st.lists(st.lists(st.integers(0, samples - 1), min_size=1, max_size=samples + 2), min_size=1, max_size=6)
    coefficients, buffer = torch.zeros_like(start), torch.zeros_like(start)
    for batch in data.draw(order):
        rows = torch.tensor(batch)
        replay.accumulate(rows, targets[rows])
        replay.step(SGDSettings(lr=0.1, momentum=0.9))
        # The same by the definition: autograd through indexing adds up the samples that repeat.
        point = (start + (kernel.double() @ coefficients.flatten()).view_as(start)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point[rows], targets[rows]), point)
        buffer = 0.9 * buffer + gradient
        coefficients = coefficients - 0.1 * buffer
    assert torch.allclose(replay.coefficients, coefficients, rtol=1e-12, atol=1e-13)
    expected = start + (kernel.double() @ coefficients.flatten()).view_as(start)
    assert torch.allclose(replay.predictions, expected, rtol=1e-12, atol=1e-13)
