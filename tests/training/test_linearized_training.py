"""LinearizedTraining against brute force in float64: the explicit linear model under torch.optim.SGD."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ntk import LinearizedTraining, empirical_ntk
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.linearization.objective import measure_loss_factor
from tests.problems import LOSSES, NETWORKS, LinearModel, flatten, make, relative_error


def capture(module, inputs, targets, **options) -> LinearizedTraining:
    options = {"lr": 0.05, "batch_size": 4, "progress": False} | options  # 11 samples: the last batch has three
    return LinearizedTraining(module, (inputs, targets), **options)


@pytest.mark.parametrize("jacobian", ["streamed", "stored"])
@pytest.mark.parametrize("outputs", [1, 3, 10])
@pytest.mark.parametrize("network", NETWORKS)
def test_weights_and_predictions_equal_brute_force(network: str, outputs: int, jacobian: str) -> None:
    module, inputs, targets = make(network, outputs)
    model = LinearModel(module, inputs)
    training = capture(module, inputs, targets, jacobian=jacobian)
    new_inputs = torch.randn(5, 6).double()
    elsewhere = LinearModel(module, new_inputs)
    for steps in (1, 57):
        expected = model.train(targets, nn.MSELoss(), steps, lr=0.05)
        assert relative_error(flatten(training.weights(steps)), expected, model.start) < 1e-9
        assert relative_error(training.predictions(steps), model.predict(expected)) < 1e-9
        assert relative_error(training.predictions(steps, new_inputs), elsewhere.predict(expected)) < 1e-9
        loss = nn.functional.mse_loss(model.predict(expected), targets).item()
        assert training.loss(steps) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("outputs", [1, 3, 10])
def test_every_convention_of_the_squared_loss(loss: str, outputs: int) -> None:
    module, inputs, targets = make("mlp", outputs)
    model = LinearModel(module, inputs)
    lr = {"mean": 0.1, "sum": 0.001, "half_sum_per_sample": 0.02}[loss]
    training = capture(module, inputs, targets, loss=LOSSES[loss], lr=lr)
    expected = model.train(targets, LOSSES[loss], 57, lr=lr)
    assert relative_error(flatten(training.weights(57)), expected, model.start) < 1e-9


@pytest.mark.parametrize("network", ["mlp", "conv", "tied"])
def test_a_thousand_steps(network: str) -> None:
    module, inputs, targets = make(network)
    model = LinearModel(module, inputs)
    training = capture(module, inputs, targets)
    expected = model.train(targets, nn.MSELoss(), 1000, lr=0.05)
    assert relative_error(flatten(training.weights(1000)), expected, model.start) < 1e-9


@pytest.mark.parametrize("jacobian", ["streamed", "stored"])
@pytest.mark.parametrize("network", NETWORKS)
def test_infinite_time_is_the_minimum_norm_solution(network: str, jacobian: str) -> None:
    module, inputs, targets = make(network)
    model = LinearModel(module, inputs)
    weights = capture(module, inputs, targets, jacobian=jacobian).weights(None)
    assert relative_error(flatten(weights), model.minimum_norm(targets), model.start) < 1e-9


@pytest.mark.parametrize("case", ["duplicate samples", "fewer parameters than rows", "both"])
def test_infinite_time_with_a_singular_kernel(case: str) -> None:
    module, inputs, targets = make("mlp", 1, samples=9)
    if case != "duplicate samples":
        module = nn.Linear(6, 1).double()
    if case != "fewer parameters than rows":
        inputs[5:] = inputs[:4]  # with contradicting targets
    model = LinearModel(module, inputs)
    training = capture(module, inputs, targets)
    rank = torch.linalg.matrix_rank(model.jacobian).item()
    assert rank < len(inputs)
    assert (training.eigenvalues > 1e-10 * training.eigenvalues[-1]).sum() == rank
    assert relative_error(flatten(training.weights(None)), model.minimum_norm(targets), model.start) < 1e-9
    late = flatten(training.weights(10**9))
    assert relative_error(late, model.minimum_norm(targets), model.start) < 1e-6


def test_gradient_flow_is_the_limit_of_small_steps() -> None:
    module, inputs, targets = make("mlp")
    flow = capture(module, inputs, targets, lr=0.1, dynamics="gradient_flow")
    eigenvalues, basis = torch.linalg.eigh(
        LinearModel(module, inputs).jacobian @ LinearModel(module, inputs).jacobian.T
    )
    residual = (flow.initial_predictions - targets).flatten()
    c = 2 / targets.numel()
    expected = basis @ (torch.exp(-0.1 * c * 12.5 * eigenvalues) * (basis.T @ residual))
    assert relative_error((flow.predictions(12.5) - targets).flatten(), expected) < 1e-10
    fine = capture(module, inputs, targets, lr=1e-4)
    error = relative_error(flatten(fine.weights(12500)), flatten(flow.weights(12.5)), flatten(flow.initial_weights))
    assert 0 < error < 1e-3


def test_learning_rates_that_change_from_step_to_step() -> None:
    module, inputs, targets = make("mlp")
    model = LinearModel(module, inputs)
    training = capture(module, inputs, targets)

    def schedule(step: int) -> float:
        return 0.1 * math.cos(step / 40) ** 2

    online = training.follow()
    for step in range(60):
        online.step_with(SGDSettings(schedule(step)))
    expected = model.train(targets, nn.MSELoss(), 60, lr=schedule)
    assert relative_error(flatten(online.displacement()), expected - model.start) < 1e-10
    assert relative_error(online.predictions(), model.predict(expected)) < 1e-10


def test_online_flow_depends_on_the_sum_of_the_learning_rates() -> None:
    module, inputs, targets = make("mlp")
    training = capture(module, inputs, targets, dynamics="gradient_flow", lr=0.5)
    online = training.follow()
    for lr in (0.25, 0.5, 0.75):
        online.step_with(SGDSettings(lr))
    torch.testing.assert_close(online.state().predictions, training.predictions(3))


def test_several_times_in_one_pass() -> None:
    module, inputs, targets = make("conv")
    training = capture(module, inputs, targets)
    times = [0, 3, 500, None]
    for t, weights in zip(times, training.weights_at(times), strict=True):
        torch.testing.assert_close(weights, training.weights(t), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(training.weights(0), training.initial_weights)


def test_maximal_learning_rate_is_where_training_starts_to_diverge() -> None:
    module, inputs, targets = make("mlp")
    model = LinearModel(module, inputs)
    limit = capture(module, inputs, targets).max_learning_rate
    start = nn.functional.mse_loss(model.outputs, targets)
    for factor, stable in ((0.99, True), (1.05, False)):
        weights = model.train(targets, nn.MSELoss(), 2000, lr=factor * limit)
        assert (nn.functional.mse_loss(model.predict(weights), targets) < start) == stable
    assert capture(module, inputs, targets, dynamics="gradient_flow").max_learning_rate == math.inf


def test_an_unstable_learning_rate_is_named_and_followed_until_it_overflows() -> None:
    module, inputs, targets = make("mlp")
    model = LinearModel(module, inputs)
    limit = capture(module, inputs, targets).max_learning_rate
    with pytest.warns(UserWarning, match=f"above {limit:.4g}"):
        training = capture(module, inputs, targets, lr=2 * limit)
    expected = model.train(targets, nn.MSELoss(), 21, lr=2 * limit)
    assert relative_error(flatten(training.weights(21)), expected, model.start) < 1e-9
    with pytest.raises(OverflowError, match="diverged"):
        training.weights(10**6)
    with pytest.raises(ValueError, match="no limit"):
        training.weights(None)


def test_a_kernel_computed_earlier_gives_the_same_answers() -> None:
    module, inputs, targets = make("mlp")
    kernel = empirical_ntk(module, inputs)
    given, computed = capture(module, inputs, targets, ntk=kernel), capture(module, inputs, targets)
    torch.testing.assert_close(flatten(given.weights(300)), flatten(computed.weights(300)), rtol=1e-9, atol=1e-12)


def test_a_wrong_kernel_is_refused() -> None:
    module, inputs, targets = make("mlp")
    kernel = empirical_ntk(module, inputs)
    order = torch.arange(33).reshape(11, 3).T.flatten()  # row k * N + n
    with pytest.raises(ValueError, match=r"rows n \* K \+ k"):
        capture(module, inputs, targets, ntk=kernel[order][:, order])
    with pytest.raises(ValueError, match="shape"):
        capture(module, inputs, targets, ntk=kernel[:-1, :-1])
    with pytest.raises(ValueError, match="symmetric"):
        capture(module, inputs, targets, ntk=kernel.triu())
    with pytest.raises(ValueError, match="finite"):
        capture(module, inputs, targets, ntk=kernel.log())


def test_a_given_kernel_is_held_to_the_precision_of_its_type() -> None:
    module, inputs, targets = make("mlp")
    kernel = empirical_ntk(module, inputs)
    rounded = kernel.float()
    off = torch.randn(33, 33).double()
    with pytest.raises(ValueError, match="in the type in which it was computed"):
        capture(module, inputs, targets, ntk=kernel + 1e-7 * (off + off.T))
    with pytest.raises(ValueError, match="in the type in which it was computed"):
        capture(module, inputs, targets, ntk=rounded.double())
    with pytest.raises(ValueError, match=r"real floating-point numbers but got torch\.int64"):
        capture(module, inputs, targets, ntk=kernel.long())
    given = flatten(capture(module, inputs, targets, ntk=rounded).weights(30))
    assert relative_error(given, flatten(capture(module, inputs, targets).weights(30))) < 1e-6


class Auxiliary(nn.Module):
    """A head that the forward computes and does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x).tanh()
        self.auxiliary(hidden)
        return self.head(hidden)


SETTINGS = {
    "eigh": {"solver": "eigh"},
    "lanczos": {"solver": "lanczos"},
    "matrix-free": {"solver": "lanczos", "matrix_free": True},
    "stored": {"jacobian": "stored"},
    "replay": {"batches": [[0, 3, 4], [1, 2], [5, 7, 10]]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_memory_is_read_before_it_is_written(poisoned, setting: str) -> None:
    """With an auxiliary head that has a learning rate of its own."""
    torch.manual_seed(0)
    module, inputs, targets = Auxiliary().double(), torch.randn(11, 6).double(), torch.randn(11, 3).double()
    scales = {"auxiliary.weight": 3.0, "auxiliary.bias": 0.0, "head.bias": 0.5}
    model = LinearModel(module, inputs)
    parts = [
        torch.full(shape, scales.get(n, 1.0)).flatten() for n, shape in zip(model.names, model.shapes, strict=True)
    ]
    rates = 0.05 * torch.cat(parts).double()
    expected, loss = model.start.clone(), nn.MSELoss()
    for rows in SETTINGS[setting].get("batches", [list(range(11))] * 3):
        point = expected.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model.predict(point)[rows], targets[rows]), point)
        expected = expected - rates * gradient
    training = capture(module, inputs, targets, lr_scales=scales, **SETTINGS[setting])
    assert relative_error(flatten(training.weights(3)), expected, model.start) < 1e-9
    assert relative_error(training.predictions(3), model.predict(expected)) < 1e-9


def test_outputs_of_one_number_per_sample() -> None:
    module, inputs, targets = make("mlp", 1)
    expected = capture(module, inputs, targets)
    flat = capture(module, inputs, targets[:, 0], predict=lambda m, x: m(x).squeeze(1), loss=nn.MSELoss())
    assert flat.initial_predictions.shape == (11, 1)
    torch.testing.assert_close(flat.weights(40), expected.weights(40))


def test_class_labels_become_one_hot() -> None:
    module, inputs, _ = make("mlp")
    labels = torch.arange(11) % 3
    expected = capture(module, inputs, nn.functional.one_hot(labels, 3).double())
    torch.testing.assert_close(capture(module, inputs, labels).weights(10), expected.weights(10))


def test_several_inputs_and_dict_inputs() -> None:
    module, inputs, targets = make("mlp")
    expected = capture(module, inputs, targets).weights(10)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = module

        def forward(self, left, right):
            return self.body(torch.cat([left, right], 1))

    parts = (inputs[:, :2], inputs[:, 2:])
    by_position = capture(Split(), parts, targets).weights(10)
    batches = [{"left": x[:2], "right": x[2:], "y": y} for x, y in zip(inputs, targets, strict=True)]
    by_name = LinearizedTraining(
        Split(),
        batches,
        lr=0.05,
        batch_size=4,
        predict=lambda m, x: m(x["left"], x["right"]),
        unpack=lambda batch: ({"left": batch["left"], "right": batch["right"]}, batch["y"]),
        progress=False,
    )
    for name, value in expected.items():
        torch.testing.assert_close(by_position[f"body.{name}"], value)
        torch.testing.assert_close(by_name.weights(10)[f"body.{name}"], value)
    new = by_name.predictions(10, batches[:4])
    torch.testing.assert_close(new, by_name.predictions(10)[:4])


def test_the_module_is_left_as_it_was() -> None:
    module, inputs, targets = make("conv")
    module.norm.eval()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rng = torch.get_rng_state()
    training = capture(module, inputs, targets)
    training.weights(5)
    training.predictions(5, inputs)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert all((p.grad == 1).all() for p in module.parameters())
    assert module.training
    assert module.dropout.training
    assert not module.norm.training
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.fill_(7)  # an optimizer, or anything else: the capture is not an alias
    torch.testing.assert_close(training.initial_weights, {n: before[n] for n in training.initial_weights})
    assert training.weights(5)["head.weight"].isfinite().all()
    torch.testing.assert_close(training.predictions(5, inputs), training.predictions(5))


def test_float32_passes_are_within_1e_5_of_float64_on_digits() -> None:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    inputs = torch.tensor(data.data[:60], dtype=torch.float32) / 16
    labels = torch.tensor(data.target[:60])
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    single = LinearizedTraining(module, (inputs, labels), lr=1.0, progress=False)
    lr = single.max_learning_rate / 2  # eta * lambda_max = 1
    single = LinearizedTraining(module, (inputs, labels), lr=lr, progress=False)
    double = LinearizedTraining(module, (inputs, labels), lr=lr, dtype=torch.float64, progress=False)
    for t in (1, 100, 10**4):
        expected = flatten(double.displacement(t))
        assert relative_error(flatten(single.displacement(t)), expected) < 1e-5
        assert relative_error(single.predictions(t), double.predictions(t)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "`lr`"),
        ({"lr": math.nan}, "`lr`"),
        ({"dynamics": "newton"}, "`dynamics`.*'gradient_descent', 'gradient_flow'.*'newton'"),
        ({"jacobian": "kept"}, "`jacobian`"),
        ({"solver": "svd"}, "`solver`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"loss": nn.L1Loss()}, "squared loss"),
        ({"loss": nn.CrossEntropyLoss()}, "squared loss"),
        ({"loss": nn.MSELoss(reduction="none")}, "one number"),
        ({"predict": lambda m, x: m(x).unsqueeze(2)}, r"\(batch, outputs\) or \(batch,\) but got shape \(\d+, 3, 1\)"),
        ({"predict": lambda m, x: {"scores": m(x)}}, "a dict"),
        ({"predict": lambda m, x: m(x) * torch.nan}, "finite outputs but sample 0"),
    ],
)
def test_bad_arguments_get_a_sentence(change, message) -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match=message):
        capture(module, inputs, targets, **change)


def test_bad_data_gets_a_sentence() -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match="empty"):
        capture(module, inputs[:0], targets[:0])
    with pytest.raises(ValueError, match="finite inputs but sample 5 has"):
        capture(module, inputs.clone().index_fill_(0, torch.tensor([5]), torch.nan), targets)
    with pytest.raises(ValueError, match="finite targets"):
        capture(module, inputs, targets * torch.inf)
    with pytest.raises(ValueError, match=r"\(11, 3\), but got \(11,\)"):
        capture(module, inputs, targets[:, 0])
    with pytest.raises(ValueError, match=r"labels from 0 to 2.*from 0 to 10"):
        capture(module, inputs, torch.arange(11))
    with pytest.raises(ValueError, match="same number of samples"):
        capture(module, inputs, targets[:-1])
    with pytest.raises(ValueError, match="inputs only"):
        LinearizedTraining(module, TensorDataset(inputs), lr=0.1, progress=False)


def test_outputs_and_targets_of_which_one_is_a_column_are_refused() -> None:
    module, inputs, targets = make("mlp", 1)
    with pytest.raises(ValueError, match=r"\(11, 1\), but got \(11,\)"):
        capture(module, inputs, targets[:, 0])
    with pytest.raises(ValueError, match=r"\(11,\), but got \(11, 1\)"):
        capture(module, inputs, targets, predict=lambda m, x: m(x)[:, 0])


@pytest.mark.parametrize("t", [-1, 2.5, math.nan])
def test_impossible_times(t: float) -> None:
    module, inputs, targets = make("mlp")
    training = capture(module, inputs, targets)
    with pytest.raises(ValueError, match="`t`"):
        training.weights(t)
    flow = capture(module, inputs, targets, dynamics="gradient_flow")
    if t == 2.5:
        flow.weights(t)
    else:
        with pytest.raises(ValueError, match="`t`"):
            flow.weights(t)


def test_modules_without_weights_to_train() -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match="lazy"):
        capture(nn.LazyLinear(3), inputs, targets)
    with pytest.raises(ValueError, match="trainable"):
        capture(module.requires_grad_(False), inputs, targets)


def test_more_memory_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, targets = make("mlp")
    monkeypatch.setattr("lightning_ntk.utilities.distributed.available_memory", lambda *_: 4000)
    with pytest.raises(MemoryError, match=r"KiB.*3.9 KiB are free.*Use at most \d+ samples"):
        capture(module, inputs, targets)


def test_initial_loss_of_zero_has_a_factor_still() -> None:
    outputs = torch.randn(7, 3)
    assert measure_loss_factor(nn.MSELoss(), outputs, outputs) == pytest.approx(2 / 21)


def test_stable_rates_do_not_warn() -> None:
    module, inputs, targets = make("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(module, inputs, targets)
