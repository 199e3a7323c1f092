"""The callback for the Trainer of transformers: the numbers of the Lightning run, and of a loop of one's own."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.comparison import RunComparison, StepComparison
from lightning_ntk.data.reference import Reference
from lightning_ntk.functional import judge
from lightning_ntk.linearization import StepLinearization
from lightning_ntk.training import StepSettings, Twin
from tests.training_steps.test_after_one_step import assert_same
from tests.training_steps.test_families import Family, InDoublePrecision, bert
from tests.training_steps.test_language_models import PaddedLanguageModel, warm_up

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState  # noqa: E402

from lightning_ntk.huggingface import LinearizationCallback  # noqa: E402

STEPS, BATCH, CLIP = 3, 3, 0.3


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps the precision of earlier runs in this process."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class InOrder(transformers.Trainer):
    """Takes the samples in the order of the data set."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class OwnLoss(PaddedLanguageModel):
    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Not Adam, which makes full steps of gradients that are zero but for rounding.
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


def train(model: nn.Module, data: Any, path: Path, *callbacks: Any, **options: Any) -> transformers.Trainer:
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "max_grad_norm": CLIP} | options
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    trainer = InOrder(
        model=model, train_dataset=data, eval_dataset=data, optimizers=(optimizer, scheduler), callbacks=list(callbacks),
        args=transformers.TrainingArguments(
            str(path), use_cpu=True, report_to=[], disable_tqdm=True, **{"save_strategy": "no"} | arguments
        ),
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_equal_rows(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    # Of Lightning's monitor alone: whether the linearized network has followed all that the run did.
    expected = [{name: value for name, value in row.items() if name != "exact"} for row in expected]
    assert [row.keys() for row in actual] == [row.keys() for row in expected]
    for row, other in zip(actual, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-12, abs=1e-12)
    assert actual[-1]["relative_weight_distance"] > 1e-2


def test_the_numbers_are_those_of_lightning_and_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    with InDoublePrecision():
        seed_everything(0, verbose=False)
        module = OwnLoss().double()
        module.optimizer = "sgd"
        model, plain, looped = (copy.deepcopy(module.model) for _ in range(3))
        data = Subset(module.dataset(), range(STEPS * BATCH))
        monitor = LinearizationMonitor(steps=1, strict=True, progress=False)
        Trainer(
            max_steps=STEPS, max_epochs=-1, accelerator="cpu", precision="64-true", logger=False, callbacks=[monitor],
            gradient_clip_val=CLIP, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, DataLoader(data, BATCH))  # fmt: skip

        callback = LinearizationCallback(steps=1)
        trainer = train(model, data, tmp_path, callback)
        assert_equal_rows(callback.history, monitor.history)
        logged = [row for row in trainer.state.log_history if "ntk/loss" in row]
        assert [row["ntk/loss"] for row in logged] == [row["loss"] for row in callback.history]
        train(plain, data, tmp_path)
        assert_same(dict(model.state_dict()), dict(plain.state_dict()))

        optimizer, loader = optimizer_of(looped), DataLoader(data, BATCH)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
        shadow = copy.deepcopy(looped).train()
        step = StepLinearization(shadow, lambda batch: shadow(**batch).loss)
        live = dict(looped.named_parameters())
        comparison = RunComparison(
            step,
            Twin(step, optimizer, live),
            module=looped,
            reference=StepComparison(step, Reference(loader, batch_size=BATCH)),
        )
        rows = [{"step": 0.0, **comparison.measure()}]
        for number, batch in enumerate(loader, 1):
            comparison.accumulate(batch)
            looped.train()(**batch).loss.backward()
            comparison.step(StepSettings.of(optimizer, live, clip_norm=CLIP))
            nn.utils.clip_grad_norm_(looped.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rows.append({"step": float(number), **comparison.measure()})
    expected = [{name: v for name, v in row.items() if name != "gradient_mismatch"} for row in monitor.history]
    assert_equal_rows(rows, expected)


@pytest.mark.parametrize(("name", "options"), [("GPT-2", {}), ("BERT", {}), ("BERT", {"bf16": True})])
def test_accumulated_batches_are_those_of_the_run(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2 is told the number of labels in all batches of a step. The last step of an epoch has one batch instead of two."""
    seed_everything(0, verbose=False)
    module = PaddedLanguageModel() if name == "GPT-2" else Family(bert(), "classes")
    data = Subset(module.dataset(), range(9))
    callback = LinearizationCallback(reference=None, steps=1)
    train(module.model, data, tmp_path, callback, gradient_accumulation_steps=2, num_train_epochs=2, **options)
    assert len(callback.history) == STEPS + 1
    mismatches = [row["gradient_mismatch"] for row in callback.history[1:]]
    assert max(mismatches) <= (0.05 if options else 1e-5)
    assert callback.history[1]["relative_weight_distance"] <= (0.05 if options else 1e-4)


def test_the_precision_is_that_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `accelerate launch --mixed_precision bf16`: the arguments of the Trainer say nothing of it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seed_everything(0, verbose=False)
    module = Family(bert(), "classes")
    callback = LinearizationCallback(reference=None, steps=1)
    train(module.model, module.dataset(), tmp_path, callback)
    assert 1e-4 < max(row["gradient_mismatch"] for row in callback.history[1:]) < 0.05


def test_a_run_has_a_verdict_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As under Lightning, in one line at the end; and a run whose linearized network was lost has none."""
    pytest.importorskip("matplotlib")
    seed_everything(0, verbose=False)
    module = Family(bert(), "classes")
    callback = LinearizationCallback(steps=5)
    model = copy.deepcopy(module.model)
    train(model, module.dataset(), tmp_path, callback, max_steps=12)
    assert callback.verdict == judge(callback.history)
    assert callback.verdict.word != "undecided"
    assert capsys.readouterr().out.splitlines()[-1] == f"LinearizationCallback: {callback.verdict.describe()}"
    assert repr(callback) == f"LinearizationCallback('ntk': {callback.verdict.word} after 12 steps)"
    assert callback.summary().splitlines()[-1].split()[0] == "12"
    assert len(callback.to_pandas()) == len(callback.history) == 4
    assert (
        f"<strong>{callback.verdict.word.capitalize()}.</strong>" in callback.report(tmp_path / "page.html").read_text()
    )

    failures = ["no more"]

    def fail_once(*_: Any) -> None:
        if callback.comparison is not None and callback.comparison.steps == 11 and failures:
            raise RuntimeError(failures.pop())

    hook = module.model.get_input_embeddings().register_forward_pre_hook(fail_once)
    with pytest.warns(UserWarning, match="has lost the linearized network in step 12"):
        train(module.model, module.dataset(), tmp_path, callback, max_steps=12)
    hook.remove()
    assert "was lost before the run ended" in callback.verdict.reason


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("first", [True, False])
def test_the_last_step_is_measured_before_the_best_weights_are_loaded(
    strategy: str, first: bool, tmp_path: Path
) -> None:
    rows = []
    for best in (True, False):
        seed_everything(0, verbose=False)
        module = Family(bert(), "classes")
        callback = LinearizationCallback(reference=None, steps=[100])
        stop = transformers.EarlyStoppingCallback(1)
        trainer = InOrder(
            model=module.model, train_dataset=module.dataset(), eval_dataset=module.dataset(),
            callbacks=[callback, stop] if first else [stop, callback],
            args=transformers.TrainingArguments(
                str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=100, learning_rate=0.3,
                per_device_train_batch_size=24, eval_strategy=strategy, save_strategy=strategy, eval_steps=2, save_steps=2,
                load_best_model_at_end=best, metric_for_best_model="loss",
            ),
        )  # fmt: skip
        trainer.train()
        assert trainer.state.best_global_step < trainer.state.global_step < 100
        rows.append(callback.history)
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [0, trainer.state.global_step]


def test_the_best_weights_are_not_measured_for_the_last(tmp_path: Path) -> None:
    module = Family(bert(), "classes")
    callback = LinearizationCallback(reference=None, steps=[10])

    class Stops(transformers.TrainerCallback):
        """After the last event in which the weights of the last step can be measured."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    with pytest.warns(
        UserWarning, match="has not measured the last step, 4: the Trainer has put the weights of the best"
    ):
        train(
            module.model, module.dataset(), tmp_path, callback, Stops(), max_steps=8, eval_strategy="epoch", eval_steps=2,
            save_strategy="epoch", load_best_model_at_end=True, per_device_train_batch_size=24,
        )  # fmt: skip
    assert [row["step"] for row in callback.history] == [0]


def test_a_compiled_model_has_the_numbers_of_a_plain_one(tmp_path: Path) -> None:
    weights, callbacks = [], []
    for compiled, watched in ((True, True), (True, False), (False, True)):
        torch._dynamo.reset()
        seed_everything(0, verbose=False)
        module = Family(bert(), "classes")
        callback = LinearizationCallback(steps=1)
        compile_it = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        train(module.model, module.dataset(), tmp_path, *[callback] * watched, **compile_it)
        weights.append(dict(module.model.state_dict()))
        callbacks.append(callback)
    torch._dynamo.reset()
    assert_same(weights[0], weights[1])
    for row, other in zip(callbacks[0].history, callbacks[2].history, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return map(self.data.__getitem__, range(len(self.data)))


def test_streamed_data_are_followed_without_functions(tmp_path: Path) -> None:
    module = Family(bert(), "classes")
    callback, strict = LinearizationCallback(steps=1), LinearizationCallback(Stream(module.dataset()))
    with pytest.warns(UserWarning, match="compares weights only, .* Stream can only be iterated"):
        train(module.model, Stream(module.dataset()), tmp_path, callback, gradient_accumulation_steps=2)
    assert max(row["gradient_mismatch"] for row in callback.history[1:]) < 1e-5
    assert "loss" not in callback.history[-1]
    with pytest.raises(ValueError, match="Give a map-style data set"):
        train(module.model, Stream(module.dataset()), tmp_path, strict)


class Divided(nn.Module):
    """Its Trainer divides the loss by the batches of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(inputs), labels)}


def test_a_stream_that_ends_within_a_step_is_lost(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [{"inputs": torch.randn(4, generator=generator), "labels": i % 3} for i in range(5 * BATCH)]
    callback = LinearizationCallback(steps=1)
    # The third step has one batch.
    train(Divided(), data, tmp_path, callback, gradient_accumulation_steps=2, max_steps=6)
    assert max(row["gradient_mismatch"] for row in callback.history[1:]) < 1e-5
    with pytest.warns(
        UserWarning, match="ended within a step, .* gradient_accumulation_steps=2. Give data with a length"
    ):
        train(Divided(), Stream(data), tmp_path, callback, gradient_accumulation_steps=2, max_steps=6)
    assert [row["step"] for row in callback.history] == [0, 1, 2]


def test_a_run_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    module = Family(bert(), "classes")
    callback = LinearizationCallback(reference=None, steps=1)

    class Fails(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(module.model, module.dataset(), tmp_path, callback, Fails())
    train(module.model, module.dataset(), tmp_path, callback)
    assert [row["step"] for row in callback.history] == [0, 1, 2, 3]
    assert max(row["gradient_mismatch"] for row in callback.history[1:]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0"), ({"fp16": True}, "full precision or bf16=True")],
)
def test_runs_that_cannot_be_followed_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = Family(bert(), "classes")
    with pytest.raises(ValueError, match=message):
        train(module.model, module.dataset(), tmp_path, LinearizationCallback(), **options)


def test_a_loss_besides_that_of_the_model_is_refused(tmp_path: Path) -> None:
    class Doubled(InOrder):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    module = Family(bert(), "classes")
    before = copy.deepcopy(dict(module.model.state_dict()))
    trainer = Doubled(
        model=module.model, train_dataset=module.dataset(), callbacks=[LinearizationCallback(reference=None)],
        args=transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match="run's gradient is 2 times that of"):
        trainer.train()
    assert_same(dict(module.model.state_dict()), before)
