"""Kernel regression against scikit-learn, against refits without each sample, and against linearized training."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizedTraining
from lightning_ntk.dynamics.ridge import leave_one_out_residuals, ridge_grid
from lightning_ntk.solvers.base import Modes
from lightning_ntk.solvers.eigh import eigh_modes
from lightning_ntk.training import KernelRegression, LinearizedProblem, kernel_regression
from tests.problems import NETWORKS, LinearModel, half_sum_per_sample, make, relative_error

OTHERS = 4  # samples of test sets


def kernels(network: str, **options: int) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """A network, data, and of explicit Jacobians the kernel, that to new inputs, the new inputs and their f0."""
    module, inputs, targets = make(network, **options)
    new = torch.randn(OTHERS, 6).double()
    model, other = LinearModel(module, inputs), LinearModel(module, new)
    return (
        module,
        (inputs, targets),
        model.jacobian @ model.jacobian.T,
        other.jacobian @ model.jacobian.T,
        new,
        other.outputs,
    )


def solved(kernel: Tensor, residual: Tensor, ridge: float, rows: list[int] | None = None) -> Tensor:
    """-(Theta + ridge I)^-1 r on some of the rows, zero on the others."""
    rows = list(range(len(kernel))) if rows is None else rows
    coefficients = torch.zeros_like(residual)
    small = kernel[rows][:, rows] + ridge * torch.eye(len(rows)).double()
    coefficients[rows] = -torch.linalg.solve(small, residual[rows])
    return coefficients


def refitted(kernel: Tensor, residual: Tensor, ridge: float, outputs: int) -> Tensor:
    """The residuals of regressions that were fitted without each sample in turn, `(N, K)`."""
    left_out = []
    for sample in range(len(kernel) // outputs):
        own = list(range(sample * outputs, (sample + 1) * outputs))
        others = [row for row in range(len(kernel)) if row not in own]
        left_out.append((residual + kernel @ solved(kernel, residual, ridge, others))[own])
    return torch.stack(left_out)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_scikit_learns_kernel_ridge_on_the_same_kernel(network: str) -> None:
    module, (inputs, targets), kernel, cross, new, _ = kernels(network)
    peer = KernelRidge(alpha=0.3, kernel="precomputed").fit(kernel.numpy(), targets.flatten().numpy())
    fit = kernel_regression(
        module, (inputs, targets), (new, torch.zeros(OTHERS, 3)), ridge=0.3, centered=True, batch_size=4
    )
    for ours, theirs in ((fit.train, peer.predict(kernel.numpy())), (fit.test, peer.predict(cross.numpy()))):
        assert relative_error(ours.predictions.flatten(), torch.from_numpy(theirs)) < 1e-10
    assert relative_error(fit.coefficients.flatten(), torch.from_numpy(peer.dual_coef_)) < 1e-10


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("centered", [False, True])
def test_leaving_one_out_equals_refitting_without_each_sample(outputs: int, centered: bool) -> None:
    module, (inputs, targets), kernel, _, _, _ = kernels("mlp", outputs=outputs)
    start = torch.zeros_like(targets) if centered else LinearModel(module, inputs).outputs
    residual = (start - targets).flatten()
    for ridge in (1e-3, 0.1, 10.0):
        fit = kernel_regression(module, (inputs, targets), ridge=ridge, centered=centered)
        expected = refitted(kernel, residual, ridge, outputs)
        assert relative_error(fit.leave_one_out.predictions - targets, expected) < 1e-9
        assert fit.leave_one_out.loss == pytest.approx(expected.square().mean().item(), rel=1e-9)
        assert fit.errors.tolist() == pytest.approx([fit.leave_one_out.loss], rel=1e-12)


def test_the_ridge_is_the_best_of_the_grid() -> None:
    module, (inputs, targets), kernel, _, _, _ = kernels("tied")
    noisy = inputs[:, :3] + 0.5 * targets
    fit = kernel_regression(module, (inputs, noisy), ridge="loo")
    residual = (LinearModel(module, inputs).outputs - noisy).flatten()
    errors = [refitted(kernel, residual, ridge, 3).square().mean().item() for ridge in fit.ridges.tolist()[-30:]]
    assert fit.errors.tolist()[-30:] == pytest.approx(errors, rel=1e-6)
    assert fit.ridge == fit.ridges[fit.errors.argmin()]
    assert fit.ridges[0] < fit.ridge < fit.ridges[-1]
    assert fit.ridges[-1].item() == pytest.approx(10 * torch.linalg.eigvalsh(kernel)[-1].item())
    again = kernel_regression(module, (inputs, noisy), ridge=fit.ridge)
    assert torch.equal(again.train.predictions, fit.train.predictions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_grid_begins_where_eigenvalues_are_rounding(dtype: torch.dtype) -> None:
    modes = Modes(torch.tensor([0.0, 1e-3, 2.0]).double(), torch.eye(3).double(), torch.ones(3).double())
    grid = ridge_grid(modes, dtype)
    assert grid[0].item() == pytest.approx(modes.cutoff(dtype))
    assert grid[-1].item() == pytest.approx(20.0)
    assert ((grid[1:] / grid[:-1]).log10() <= 0.25 + 1e-12).all()


def test_duplicates_make_no_difference_to_the_formula() -> None:
    """A singular kernel: a sample that is there twice is predicted by the other one."""
    module, (inputs, targets), *_ = kernels("mlp")
    twice, both = torch.cat([inputs, inputs[:4]]), torch.cat([targets, -targets[:4]])
    jacobian = LinearModel(module, twice).jacobian
    kernel, residual = jacobian @ jacobian.T, (LinearModel(module, twice).outputs - both).flatten()
    fit = kernel_regression(module, (twice, both), ridge=0.01)
    assert relative_error(fit.leave_one_out.predictions - both, refitted(kernel, residual, 0.01, 3)) < 1e-9
    near_zero = kernel_regression(module, (twice, both), ridge=fit.ridges.item() * 1e-7).leave_one_out.predictions
    torch.testing.assert_close(near_zero[:4], -targets[:4], rtol=0, atol=1e-3)


def test_a_ridge_of_zero_inverts_a_singular_kernel_on_its_range() -> None:
    """More rows than parameters: 21 samples with 3 outputs, and 42 weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    inputs, targets, new = (torch.randn(21, n).double() for n in (6, 3, 6))
    model, other = LinearModel(module, inputs), LinearModel(module, new)
    kernel = model.jacobian @ model.jacobian.T
    coefficients = torch.linalg.pinv(kernel, rtol=1e-12, hermitian=True) @ (targets - model.outputs).flatten()
    fit = kernel_regression(module, (inputs, targets), (new, targets))
    expected = other.outputs + (other.jacobian @ model.jacobian.T @ coefficients).view(21, 3)
    assert relative_error(fit.test.predictions, expected) < 1e-8
    assert fit.train.loss > 1e-3  # what the kernel cannot reach stays
    assert (fit.ridge, fit.leave_one_out, fit.errors.tolist()) == (0.0, None, [])
    by_ridge = kernel_regression(module, (inputs, targets), ridge=0.2)
    residual = (model.outputs - targets).flatten()
    assert relative_error(by_ridge.leave_one_out.predictions - targets, refitted(kernel, residual, 0.2, 3)) < 1e-9


@pytest.mark.parametrize("t", [None, 7])
@pytest.mark.parametrize("dynamics", ["gradient_descent", "gradient_flow"])
def test_it_is_linearized_training_that_decays_to_the_initial_weights(t: int | None, dynamics: str) -> None:
    module, (inputs, targets), _, _, new, _ = kernels("conv")
    factor, lr = 1 / len(inputs), 0.01
    training = LinearizedTraining(
        module, (inputs, targets), lr=lr, loss=half_sum_per_sample, dynamics=dynamics, weight_decay=0.4 * factor,
        decay="initial", progress=False,
    )  # fmt: skip
    steps = {} if t is None else {"t": t, "lr": lr, "dynamics": dynamics}
    fit = kernel_regression(
        module, (inputs, targets), (new, targets[:OTHERS]), ridge=0.4, loss=half_sum_per_sample, **steps
    )
    assert relative_error(fit.train.predictions, training.predictions(t)) < 1e-11
    assert relative_error(fit.test.predictions, training.predictions(t, (new, targets[:OTHERS]))) < 1e-11
    assert fit.train.loss == pytest.approx(training.loss(t), rel=1e-11)


def test_class_labels_have_accuracies_and_one_hot_rows() -> None:
    data = load_digits()
    images, labels = torch.tensor(data.data) / 16, torch.tensor(data.target)
    keep = labels < 3
    images, labels = images[keep], labels[keep]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    train, test = TensorDataset(images[:51], labels[:51]), TensorDataset(images[51:130], labels[51:130])
    fit = kernel_regression(module, train, DataLoader(test, batch_size=7), ridge="loo", centered=True, batch_size=20)
    assert fit.test.accuracy == (fit.test.predictions.argmax(1) == labels[51:130]).double().mean().item()
    assert min(fit.test.accuracy, fit.leave_one_out.accuracy) > 0.9
    target = nn.functional.one_hot(labels[:51], 3)
    assert fit.train.loss == pytest.approx((fit.train.predictions - target).square().mean().item())
    given = kernel_regression(
        LinearizedProblem(module, train),
        ridge=fit.ridge,
        ntk=LinearizedTraining(module, train, lr=0.1, progress=False).ntk,
    )
    assert given.test is None
    assert given.train.accuracy > 0.9


def test_it_says_what_it_holds_and_changes_nothing() -> None:
    module, inputs, targets = make("conv")
    before, modes = {n: v.clone() for n, v in module.state_dict().items()}, [m.training for m in module.modules()]
    drawn = torch.get_rng_state()
    fit = kernel_regression(module, (inputs, targets), (inputs[:2], targets[:2]), ridge="loo")
    assert repr(fit).startswith(f"KernelRegression(ridge {fit.ridge:.3g}; train: loss ")
    assert " on 11 samples; leave-one-out: loss " in repr(fit)
    assert repr(fit).endswith(" on 2 samples)")
    assert isinstance(fit, KernelRegression)
    with pytest.raises(AttributeError):
        fit.ridge = 1.0  # type: ignore[misc]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_same_data_at_other_weights_and_buffers() -> None:
    module, inputs, targets = make("conv")
    problem = LinearizedProblem(module, (inputs, targets))
    with torch.no_grad():
        for tensor in (*module.parameters(), module.norm.running_mean):
            tensor += 0.1
    there = problem.at(module.state_dict())
    torch.testing.assert_close(there.predictions, LinearModel(module, inputs).outputs, rtol=1e-12, atol=1e-12)
    assert (there.predictions - problem.predictions).abs().max() > 1e-2
    expected = kernel_regression(module, (inputs, targets), ridge=0.1)
    torch.testing.assert_close(kernel_regression(there, ridge=0.1).train.predictions, expected.train.predictions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ridge": -1.0}, '`ridge` to be a finite number, at least 0, or "loo" but got -1.0'),
        ({"ridge": float("nan")}, "but got nan"),
        ({"ridge": "best"}, '`ridge` to be a number, at least 0, or "loo"'),
        ({"ridge": "loo", "t": 5, "lr": 0.1}, "the leave-one-out formula is that of the limit"),
        ({"t": 5}, "`t` and `lr` together"),
        ({"lr": 0.1}, "`t` and `lr` together"),
        ({"t": 1.5, "lr": 0.1}, "a whole number of optimizer steps"),
        ({"t": 5000, "lr": 1e5}, "diverge beyond floating-point numbers"),
        ({"dynamics": "twin"}, "`dynamics` to be one of"),
        ({"loss": nn.L1Loss()}, "a squared loss"),
        ({"train": None}, "`train` to be the training set"),
        ({"ntk": torch.eye(2)}, "`ntk` of shape"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, message: str) -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises((ValueError, TypeError, OverflowError), match=message):
        kernel_regression(module, **({"train": (inputs, targets)} | arguments))


def test_the_formula_needs_all_modes_and_positive_ridges() -> None:
    modes = eigh_modes(torch.eye(6).double(), torch.ones(6))[0]
    with pytest.raises(ValueError, match="positive ridges but got 0"):
        leave_one_out_residuals(modes, torch.zeros(1), 3)
    some = Modes(modes.eigenvalues[:2], modes.vectors[:, :2], modes.coordinates[:2])
    with pytest.raises(ValueError, match="all modes of a kernel with 3 rows for each sample but got 2 modes"):
        leave_one_out_residuals(some, torch.ones(1), 3)
    zero = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="it is zero"):
        ridge_grid(Modes(zero, modes.vectors, zero), torch.float64)
