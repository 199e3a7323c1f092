"""The distances as torchmetrics classes: against brute force, in collections, over updates and over two processes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_ntk import Linearization, empirical_ntk
from lightning_ntk.functional import (
    activation_change,
    centered_kernel_target_alignment,
    effective_rank,
    kernel_change,
    kernel_distance,
    kernel_target_alignment,
    low_rank_measure,
    norm,
    prediction_rmse,
    taylor_gap,
    weight_distances,
)
from lightning_ntk.metrics import (
    ActivationChange,
    CenteredKernelTargetAlignment,
    Displacement,
    EffectiveRank,
    KernelChange,
    KernelDistance,
    KernelTargetAlignment,
    LowRankMeasure,
    PredictionRMSE,
    TaylorGap,
    WeightCosine,
    WeightDistance,
    WeightNormRatio,
)
from tests.problems import LinearModel, flatten, make

EXACT = 1e-14


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Problem:
    """Everything that the metrics compare, in float64, with K = 3 and N = 11, deterministic in every process."""

    def __init__(self) -> None:
        module, self.inputs, self.targets = make("mlp")
        self.initial = weights_of(module)
        linearization = Linearization(module)
        self.weights = {name: value + 0.3 * torch.randn_like(value) for name, value in self.initial.items()}
        self.linearized = {name: value + 0.3 * torch.randn_like(value) for name, value in self.initial.items()}
        self.outputs = linearization.predict_at(self.weights, self.inputs)
        self.linearized_outputs = linearization(self.linearized, self.inputs)
        self.taylor_outputs = linearization(self.weights, self.inputs)
        self.initial_outputs = linearization.predict(self.inputs)
        self.initial_kernel = empirical_ntk(module, self.inputs)
        self.kernel = empirical_ntk(module, self.inputs, params=self.weights)
        self.linear = LinearModel(module, self.inputs)

    def collection(self, **options: Any) -> MetricCollection:
        return MetricCollection(
            {
                "weight_distance": WeightDistance(self.initial, "absolute"),
                "relative_weight_distance": WeightDistance(self.initial),
                "weight_cosine": WeightCosine(self.initial),
                "weight_norm_ratio": WeightNormRatio(self.initial),
                "displacement": Displacement(self.initial),
                "prediction_rmse": PredictionRMSE(),
                "taylor_gap": TaylorGap(),
                "kernel_distance": KernelDistance(),
                "kernel_change": KernelChange(),
                "alignment": KernelTargetAlignment(),
            },
            **options,
        )

    def arguments(self, rows: slice = slice(None)) -> dict[str, Any]:
        block = slice(3 * (rows.start or 0), None if rows.stop is None else 3 * rows.stop)
        return {
            "weights": self.weights,
            "linearized_weights": self.linearized,
            "outputs": self.outputs[rows],
            "linearized_outputs": self.linearized_outputs[rows],
            "taylor_outputs": self.taylor_outputs[rows],
            "initial_outputs": self.initial_outputs[rows],
            "initial_kernel": self.initial_kernel[block],
            "kernel": self.kernel[block],
            "targets": self.targets[rows],
            "column_targets": self.targets,
        }

    def expected(self) -> dict[str, float]:
        """By the textbook formulas on explicit vectors, with the Taylor expansion of an explicit Jacobian."""
        start, moved, linear = (flatten(weights) for weights in (self.initial, self.weights, self.linearized))
        taylor, first, kernel = self.linear.predict(moved), self.initial_kernel.flatten(), self.kernel.flatten()
        target = self.targets.flatten()
        values = {
            "weight_distance": (moved - linear).norm(),
            "relative_weight_distance": (moved - linear).norm() / (moved - start).norm(),
            "weight_cosine": torch.cosine_similarity(moved - start, linear - start, dim=0),
            "weight_norm_ratio": (linear - start).norm() / (moved - start).norm(),
            "displacement": (moved - start).norm(),
            "prediction_rmse": (self.outputs - self.linear.predict(linear)).square().mean().sqrt(),
            "taylor_gap": (self.outputs - taylor).norm() / (self.outputs - self.linear.outputs).norm(),
            "kernel_distance": 1 - torch.cosine_similarity(first, kernel, dim=0),
            "kernel_change": (kernel - first).norm() / first.norm(),
            "alignment": torch.cosine_similarity(kernel, torch.outer(target, target).flatten(), dim=0),
        }
        return {name: value.item() for name, value in values.items()}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def as_numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def test_functional_forms_agree_with_brute_force(problem: Problem) -> None:
    displacement = {name: value - problem.initial[name] for name, value in problem.weights.items()}
    linearized = {name: value - problem.initial[name] for name, value in problem.linearized.items()}
    values = weight_distances(displacement, linearized) | {
        "prediction_rmse": prediction_rmse(problem.outputs, problem.linearized_outputs),
        "taylor_gap": taylor_gap(problem.outputs, problem.taylor_outputs, problem.initial_outputs),
        "kernel_distance": kernel_distance(problem.initial_kernel, problem.kernel),
        "kernel_change": kernel_change(problem.initial_kernel, problem.kernel),
        "alignment": kernel_target_alignment(problem.kernel, problem.targets),
    }
    assert values == pytest.approx(problem.expected(), rel=1e-12)


def test_a_collection_gives_every_metric_its_own_arguments(problem: Problem) -> None:
    metrics = problem.collection()
    metrics.update(**problem.arguments())
    assert as_numbers(metrics.compute()) == pytest.approx(problem.expected(), rel=1e-12)
    groups = [set(group) for group in metrics.compute_groups.values()]
    assert {"weight_distance", "relative_weight_distance", "weight_cosine", "weight_norm_ratio"} in groups
    assert {"kernel_distance", "kernel_change"} in groups
    assert len(groups) == 6


def test_a_collection_that_starts_at_the_initial_weights_keeps_its_metrics_apart(problem: Problem) -> None:
    # Everything is zero at first: metrics of different things must not be taken for one by their equal sums.
    metrics = problem.collection()
    outputs = dict.fromkeys(
        ("outputs", "linearized_outputs", "taylor_outputs", "initial_outputs"), problem.initial_outputs
    )
    start = problem.arguments() | outputs | {"weights": problem.initial, "linearized_weights": problem.initial}
    values = as_numbers(metrics(**start | {"kernel": problem.initial_kernel}))
    at_start = {name: values[name] for name in problem.expected() if name != "alignment"}
    assert at_start == dict.fromkeys(at_start, 0.0) | {"weight_cosine": 1.0, "weight_norm_ratio": 1.0}
    metrics.reset()
    assert as_numbers(metrics(**problem.arguments())) == pytest.approx(problem.expected(), rel=1e-12)


@pytest.mark.parametrize("splits", [[4, 11], [1, 2, 11], [11]])
def test_batches_and_blocks_add_up_to_the_whole(problem: Problem, splits: list[int]) -> None:
    metrics = problem.collection()
    for start, stop in zip([0, *splits], splits, strict=False):
        metrics.update(**problem.arguments(slice(start, stop)))
    assert as_numbers(metrics.compute()) == pytest.approx(problem.expected(), rel=1e-12)


def test_forward_gives_the_value_of_its_own_arguments_and_adds_them(problem: Problem) -> None:
    metric = PredictionRMSE()
    first = metric(problem.outputs[:4], problem.linearized_outputs[:4]).item()
    second = metric(problem.outputs[4:], problem.linearized_outputs[4:]).item()
    square = (problem.outputs - problem.linearized_outputs).square()
    for value, part in ((first, square[:4]), (second, square[4:]), (metric.compute().item(), square)):
        assert value == pytest.approx(part.mean().sqrt().item(), rel=EXACT)


def test_several_networks_give_the_root_mean_square(problem: Problem) -> None:
    absolute, relative = WeightDistance(problem.initial, "absolute"), WeightDistance(problem.initial)
    pairs = [(problem.weights, problem.linearized), (problem.linearized, problem.initial)]
    for pair in pairs:
        absolute.update(*pair)
        relative.update(*pair)
    apart = sum(norm({n: a[n] - b[n] for n in a}) ** 2 for a, b in pairs)
    moved = sum(norm({n: a[n] - problem.initial[n] for n in a}) ** 2 for a, _ in pairs)
    assert absolute.compute().item() == pytest.approx((apart / 2) ** 0.5, rel=1e-13)
    assert relative.compute().item() == pytest.approx((apart / moved) ** 0.5, rel=1e-13)


def test_sums_are_kept_in_float64(problem: Problem) -> None:
    metrics = problem.collection().half()  # has no effect, as for every torchmetrics metric
    distance = metrics["relative_weight_distance"](problem.weights, problem.linearized)
    assert distance.item() == pytest.approx(problem.expected()["relative_weight_distance"], rel=1e-12)
    single = {
        key: {n: v.float() for n, v in value.items()} if isinstance(value, dict) else value.float()
        for key, value in problem.arguments().items()
    }
    metrics["prediction_rmse"].update(single["outputs"], single["linearized_outputs"])
    value = metrics["prediction_rmse"].compute()
    assert value.dtype == torch.float64
    exact = (single["outputs"].double() - single["linearized_outputs"].double()).square().mean().sqrt()
    assert value.item() == pytest.approx(exact.item(), rel=EXACT)


def test_a_metric_does_not_alias_the_live_weights() -> None:
    module = nn.Linear(3, 2)
    metric = Displacement(dict(module.named_parameters()))
    with torch.no_grad():
        module.weight += 1
    assert metric(dict(module.named_parameters())).item() == pytest.approx(6**0.5, rel=1e-6)
    assert all(not value.requires_grad for value in metric.initial_weights.values())


def test_metrics_can_be_copied_and_pickled(problem: Problem) -> None:
    metric = WeightDistance(problem.initial)
    metric.update(problem.weights, problem.linearized)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert other.compute() == metric.compute()
        assert other(problem.linearized, problem.linearized) == 0


def test_initial_weights_are_not_in_the_state_dict(problem: Problem) -> None:
    # They are as large as the network, and a LightningModule that has the metric saves its own.
    assert WeightDistance(problem.initial).state_dict() == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightDistance({}), "at least one parameter"),
        (lambda: WeightDistance({"a": torch.ones(1)}, "squared"), "normalization.*'squared'"),
        (lambda: Displacement({"a": torch.ones(1)}).update({"b": torch.ones(1)}), r"differ: \['a', 'b'\]"),
        (
            lambda: Displacement({"a": torch.ones(1)}).update({"a": torch.ones(2)}),
            r"`a` of shape \(1,\) but got \(2,\)",
        ),
        (lambda: PredictionRMSE().update(torch.ones(3, 1), torch.ones(3)), r"`outputs` \(3, 1\), `linearized_outputs`"),
        (lambda: TaylorGap().update(torch.ones(3, 1), torch.ones(3, 1), torch.ones(3)), "one shape"),
        (lambda: KernelDistance().update(torch.eye(2), torch.eye(3)), "one shape"),
        (lambda: KernelTargetAlignment().update(torch.eye(6), torch.ones(2)), "one-hot"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_regimes_by_functions_and_metrics_in_parts(problem: Problem) -> None:
    features, rows = problem.inputs.tanh(), [slice(0, 4), slice(4, 11)]
    centering = torch.kron(torch.eye(11) - 1 / 11, torch.eye(3)).double()
    around, target = centering @ problem.kernel @ centering, centering @ problem.targets.flatten()
    small = torch.eye(11).double() - 1 / 11
    kernels = [small @ k @ small for k in (features @ features.T, problem.outputs @ torch.linalg.pinv(problem.outputs))]
    expected = {
        "rank": problem.kernel.trace() ** 2 / problem.kernel.square().sum(),
        "centered": target @ around @ target / around.norm() / target.square().sum(),
        "low rank": 1 - (kernels[0] * kernels[1]).sum() / kernels[0].norm() / kernels[1].norm(),
        "change": (problem.outputs - problem.initial_outputs).norm() / problem.initial_outputs.norm(),
    }
    metrics = EffectiveRank(), CenteredKernelTargetAlignment(), LowRankMeasure(), ActivationChange()
    for part in rows:
        block = slice(3 * part.start, 3 * part.stop)
        metrics[0].update(problem.kernel[block], first_row=block.start)
        metrics[1].update(problem.kernel[block], problem.targets[part])
        metrics[2].update(features[part], problem.outputs[part])
        metrics[3].update(problem.initial_outputs[part], problem.outputs[part])
    values = [
        effective_rank(problem.kernel),
        centered_kernel_target_alignment(problem.kernel, problem.targets),
        low_rank_measure(features, problem.outputs),
        activation_change(problem.initial_outputs, problem.outputs),
    ]
    assert values == pytest.approx([value.item() for value in expected.values()], rel=1e-11)
    assert [metric.compute().item() for metric in metrics] == pytest.approx(values, rel=1e-12)
    for call in (
        lambda: effective_rank(torch.ones(2, 3)),
        lambda: low_rank_measure(torch.ones(3, 2), torch.ones(4, 2)),
        lambda: centered_kernel_target_alignment(torch.eye(6), torch.ones(2, 1)),
    ):
        with pytest.raises(ValueError, match="Expected"):
            call()


def _metric_in_one_of_two_processes(rank: int, directory: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    problem = Problem()
    shared, sharded = problem.collection(), problem.collection()
    shared.update(**problem.arguments())
    # Uneven processes: one process has two batches and the other has one.
    for rows in [[slice(0, 4), slice(4, 8)], [slice(8, 11)]][rank]:
        sharded.update(**problem.arguments(rows))
    results = {"shared": as_numbers(shared.compute()), "sharded": as_numbers(sharded.compute())}
    torch.save(results, directory / f"{rank}.pt")
    torch.distributed.barrier()  # so that the last exchange is freed; otherwise an older PyTorch may wait without end
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(problem: Problem, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_metric_in_one_of_two_processes, (tmp_path,), nprocs=2)
    expected = problem.expected()
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert results["shared"] == pytest.approx(expected, rel=1e-12)
        assert results["sharded"] == pytest.approx(expected, rel=1e-12)


def test_plots_of_metrics(problem: Problem) -> None:
    metric = WeightDistance(problem.initial)
    values = [
        metric({n: v + scale * (problem.weights[n] - v) for n, v in problem.initial.items()}, problem.linearized)
        for scale in (1.0, 0.1, 0.01)
    ]
    figure, axes = metric.plot(values)
    assert list(axes.lines[0].get_ydata()) == [value.item() for value in values]
    assert (axes.get_xlabel(), axes.get_yscale()) == ("measurement", "log")
    assert axes.get_ylabel().startswith("relative weight distance\n")
    same_figure, same_axes = metric.plot(ax=axes)
    assert (same_figure, same_axes) == (figure, axes)
    assert axes.lines[1].get_ydata()[0] == metric.compute().item()
    assert axes.texts[0].get_text() == f"{metric.compute().item():.4g}"


def test_plots_show_a_bound_where_it_is_in_view() -> None:
    start = {"a": torch.zeros(2)}
    cosine = WeightCosine(start)
    values = [cosine({"a": torch.tensor([1.0, y])}, {"a": torch.tensor([1.0, 0.0])}) for y in (0.0, 0.3)]
    _, axes = cosine.plot(values)
    assert [list(line.get_ydata()) for line in axes.lines[1:]] == [[1.0, 1.0]]  # -1 is far below
    assert axes.get_ylim()[0] > 0.9
    _, axes = cosine.plot(values[1] / 2)
    assert len(axes.lines) == 1


def test_a_tracker_knows_the_best_value(problem: Problem) -> None:
    metrics = [WeightDistance(problem.initial), WeightCosine(problem.initial)]
    tracker = MetricTracker(MetricCollection(metrics), maximize=[metric.higher_is_better for metric in metrics])
    for share in (0.3, 1.0, 0.6):
        tracker.increment()
        linear = {n: v + share * (problem.weights[n] - v) for n, v in problem.initial.items()}
        tracker.update(weights=problem.weights, linearized_weights=linear)
    assert tracker.best_metric(return_step=True)[1] == {"WeightDistance": 1, "WeightCosine": 0}


def test_updates_do_not_wait_for_the_device(problem: Problem) -> None:
    # The meta device has no numbers: whatever reads one fails.
    metrics = problem.collection(compute_groups=False).to("meta")
    metrics.update(**apply_to_collection(problem.arguments(), Tensor, lambda value: value.to("meta")))
    assert all(value.is_meta for value in metrics.compute().values())


def test_plots_of_a_collection(problem: Problem) -> None:
    metrics = problem.collection()
    values = [metrics(**problem.arguments()), metrics(**problem.arguments())]
    drawn = metrics.plot(values)
    labels = [axes.get_ylabel().split("\n")[0] for _, axes in drawn]
    assert len(set(labels)) == len(labels) == 10
    for (_, axes), name in zip(drawn, metrics, strict=True):
        assert list(axes.lines[0].get_ydata()) == [row[name].item() for row in values]


def test_all_metrics_are_torchmetrics_and_described() -> None:
    import lightning_ntk.metrics as package

    for name in set(package.__all__) - {"SummedMetric"}:
        kind = getattr(package, name)
        assert issubclass(kind, Metric)
        assert ">>>" in kind.__doc__
        assert "math:" in kind.__doc__
