"""Adapters of a model of transformers that computes its own loss of padded sentences: the twin along stored rows."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor
from tests.callback.test_dynamics import assert_same
from tests.callback.trainer_runs import assert_trains_alike

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ENCODER = {
    "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DECODER = {
    "vocab_size": 30,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}


def bert(**options: Any) -> nn.Module:
    network = transformers.BertForSequenceClassification(transformers.BertConfig(**(ENCODER | options)))
    adapters = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted: nn.Module = peft.get_peft_model(network, adapters)
    return adapted


def gpt2() -> nn.Module:
    """Its positions count the padding on the left."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model: nn.Module = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**DECODER, **dropout))
    return model


class FineTuning(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)


def sentences() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + 5 * row % 7 for row in range(13)]
    return [{"input_ids": torch.randint(1, 30, (n,), generator=generator), "labels": n % 3} for n in lengths]


def to_the_longest(samples: list[dict[str, Any]], *, left: bool = False) -> Any:
    """What DataCollatorWithPadding does, without a tokenizer."""
    width = max(len(sample["input_ids"]) for sample in samples)

    def pad(row: Tensor) -> Tensor:
        more = width - len(row)
        return nn.functional.pad(row, (more, 0) if left else (0, more))

    ids = torch.stack([pad(sample["input_ids"]) for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})


def run(make: Callable[..., nn.Module], callbacks: list[Callback], collate: Any = to_the_longest) -> FineTuning:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_everything(0, verbose=False)
        module = FineTuning(make())
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", precision="64-true", logger=False, callbacks=callbacks, gradient_clip_val=0.5,
            accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(sentences(), batch_size=4, shuffle=True, collate_fn=collate))  # type: ignore[arg-type]
    return module


def watch(jacobian: Any, **options: Any) -> LinearizationMonitor:
    return LinearizationMonitor(**({"steps": 2, "strict": True, "jacobian": jacobian, "progress": False} | options))


@pytest.mark.tested("stored Jacobian", "twin")
@pytest.mark.tested("LoRA (peft)", "twin")
def test_samples_are_found_whatever_their_padding() -> None:
    chosen, streamed = watch("auto"), watch("streamed", name="streamed")
    assert_trains_alike(lambda callbacks: run(bert, callbacks), [chosen, streamed])
    assert "stored rows" in chosen.reason
    assert not chosen.comparison.loss.unknown
    assert chosen.history[-1]["relative_weight_distance"] > 0.1
    assert_same(chosen.history, streamed.history, 1e-9)


@pytest.mark.parametrize(
    ("make", "collate", "phrase"),
    [
        (lambda: bert(hidden_dropout_prob=0.1), to_the_longest, "as with dropout"),
        (gpt2, lambda samples: to_the_longest(samples, left=True), "by padding in the collate function"),
    ],
    ids=["dropout", "padding on the left"],
)
def test_says_why_a_run_has_no_rows(
    make: Callable[[], nn.Module], collate: Any, phrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ntk.callback.stored_rows.require_worth", lambda *_: None)  # too small to be worth it
    monitor = watch("auto")
    run(make, [monitor], collate)
    assert phrase in monitor.reason
    assert monitor.history[-1]["relative_weight_distance"] > 0
