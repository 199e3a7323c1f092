"""Causal language models: padding masks, a tied head, warm-up, clipping and accumulation, against an explicit Jacobian."""

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_ntk import LinearizationMonitor
from tests.training_steps import zoo
from tests.training_steps.test_brute_force import Recorder, flat, train_explicitly

transformers = pytest.importorskip("transformers")

STEPS, ACCUMULATE, CLIP, BATCH = 4, 2, 0.3, 3


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 3)


class PaddedLanguageModel(zoo.HuggingFace):
    """GPT-2 with its tied head, on sentences of different lengths that are padded on the right."""

    def __init__(self) -> None:
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, **zoo.SPECIAL,
        )  # fmt: skip
        super().__init__(transformers.GPT2LMHeadModel(config))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def dataset(self):
        def tokens(image: Tensor, label: Tensor) -> dict[str, Tensor]:
            ids = (image[18:24] * 9).long() + 1
            mask = (torch.arange(6) < 3 + label % 4).long()
            labels = ids.masked_fill(mask == 0, -100)
            labels[0] = -100  # never predicted; the Trainer of transformers would count it
            return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}

        return Subset(zoo.Rows(tokens), range(12))

    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        # In the type of the weights, in which the loss of the library is not.
        return F.cross_entropy(self(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def explicit(module, batch):
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss(logits, weights, step):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return (logits,), loss


def scores(logits: list[Tensor], batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """By hand, token by token: those that are padded are in no sum."""
    nll, right, tokens, losses = 0.0, 0, 0, []
    for rows, batch in zip(logits, batches, strict=True):
        before = nll, tokens
        for row, labels in zip(rows, batch["labels"], strict=True):
            for scores, label in zip(row, labels[1:], strict=False):
                if label != -100:
                    nll -= torch.log_softmax(scores, 0)[label].item()
                    right += int(scores.argmax() == label)
                    tokens += 1
        losses.append((nll - before[0]) / (tokens - before[1]))
    return {"loss": sum(losses) / len(losses), "accuracy": right / tokens, "perplexity": math.exp(nll / tokens)}


# With SGD in single precision: Adam makes full steps of gradients that are zero but for rounding, as of the biases of keys.
@pytest.mark.tested("warm-up, clipping and accumulation of a language model", "twin")
@pytest.mark.parametrize(
    ("precision", "optimizer", "tolerance"), [("64-true", "adamw", 1e-10), ("bf16-mixed", "sgd", 2e-5)]
)
def test_both_networks_are_scored_token_by_token(precision: str, optimizer: str, tolerance: float) -> None:
    seed_everything(0, verbose=False)
    module = PaddedLanguageModel()
    module.optimizer = optimizer
    untrained = copy.deepcopy(module).double()
    monitor, recorder = LinearizationMonitor(steps=STEPS, strict=True, progress=False), Recorder()
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", precision=precision, logger=False,
        accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP, callbacks=[recorder, monitor],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(module.dataset(), BATCH, shuffle=True))

    expected = train_explicitly(
        untrained, explicit, recorder.batches, accumulate=ACCUMULATE, clip=CLIP, schedule=warm_up
    )
    assert len(expected) == len(list(module.parameters()))  # the tied head counts once
    start = {name: p.detach() for name, p in untrained.named_parameters()}
    moved = (flat(expected) - flat(start)).norm()
    assert (flat(monitor.comparison.online.weights) - flat(expected)).norm() / moved <= tolerance

    untrained.model.set_attn_implementation("eager")  # whose derivative in forward mode is there
    batches = list(DataLoader(module.dataset(), BATCH))
    trained = {name: p.detach().double() for name, p in module.named_parameters()}

    def logits(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return functional_call(untrained.eval(), weights, (), inputs).logits

    def expand(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        tangent = {name: weights[name] - value for name, value in start.items()}
        return sum(jvp(lambda w: logits(w, batch), (start,), (tangent,)))

    row = monitor.history[-1]
    kinds = {"": (logits, trained), "linearized_": (expand, expected), "taylor_": (expand, trained)}
    for kind, (network, weights) in kinds.items():
        by_hand = scores([network(weights, batch) for batch in batches], batches)
        for name, value in by_hand.items():
            if f"{kind}{name}" != "taylor_loss":
                assert row[f"{kind}{name}"] == pytest.approx(value, rel=tolerance), f"{kind}{name}"
    assert row["perplexity"] != pytest.approx(row["linearized_perplexity"], rel=1e-4)
    assert 1 < row["perplexity"] < monitor.history[0]["perplexity"]


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.1}, {"weight": torch.ones(10)}, {}],
    ids=["smoothed", "weighted", "one label a sample"],
)
def test_other_losses_have_no_perplexity(options: dict[str, Any]) -> None:
    class Other(zoo.LanguageModel if options else zoo.Classifier):
        def training_step(self, batch, batch_idx):
            if not options:
                return super().training_step(batch, batch_idx)
            tokens = (batch[0][:, 16:32] * 9).long()
            logits = self.decoder(self.embedding(tokens[:, :-1]))[..., :10]
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), **options)

    monitor = LinearizationMonitor(steps=1, strict=True, progress=False)
    module = Other()
    Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(module.dataset(), 16))  # fmt: skip
    assert "accuracy" in monitor.history[-1]
    assert not any("perplexity" in name for name in monitor.history[-1])
