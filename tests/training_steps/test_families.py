"""Families of transformers, and ResNet, each against an explicit Jacobian, and trained as without a monitor bit by bit."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from lightning_ntk import LinearizationMonitor
from tests.training_steps import zoo
from tests.training_steps.test_after_one_step import assert_same, what_is_left
from tests.training_steps.test_brute_force import Recorder, flat, train_explicitly

transformers = pytest.importorskip("transformers")

STEPS = 3
DECODER = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 16, **zoo.SPECIAL,
}  # fmt: skip
ENCODER = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip


class Family(zoo.HuggingFace):
    """A model that computes its own loss of sentences, padded on the right, or of images."""

    def __init__(self, model: nn.Module, target: str) -> None:
        super().__init__(model)
        self.target = target

    def dataset(self) -> Dataset:
        name = getattr(self.model, "main_input_name", "input_ids")

        def rows(image: Tensor, label: Tensor) -> dict[str, Tensor]:
            ids = (image[18:23] * 9).long() + 1
            mask = (torch.arange(5) < 3 + label % 3).long()
            labels = label % 3 if self.target == "classes" else ids.masked_fill(mask == 0, -100)
            inputs = {
                "input_ids": {"input_ids": ids * mask, "attention_mask": mask},
                "pixel_values": {"pixel_values": image.view(1, 8, 8)},
                "input_features": {"input_features": image[:32].view(4, 8)},
            }
            return {**inputs[name], "labels": labels}

        return zoo.Rows(rows)


def explicit(module: Family, batch: dict[str, Tensor]) -> tuple[Any, Any]:
    """The loss by hand: that of classes, of the tokens, or of the next tokens, which may follow a learned prompt."""

    def loss(logits, weights, step):
        labels = batch["labels"]
        if module.target == "next tokens":
            labels = F.pad(labels, (logits.size(1) - labels.size(1), 0), value=-100)
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    return (module.model(**batch).logits,), loss


class InDoublePrecision(TorchFunctionMode):
    """Computes in float64 what the models compute in float32 whatever their type is: norms, rotations, losses."""

    def __enter__(self):
        zoo.digits()  # which are kept, in their own type
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        double = {torch.float32: torch.float64}
        args = tuple(double.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: double.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


@contextmanager
def exactly() -> Iterator[None]:
    with InDoublePrecision(), sdpa_kernel(SDPBackend.MATH):
        yield


def fit(module: Family, *callbacks: Callback) -> Trainer:
    seed_everything(1, verbose=False)
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", precision="64-true", logger=False, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(module.dataset(), batch_size=2, shuffle=True))
    return trainer


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER))


def distilbert() -> nn.Module:
    return zoo.distilbert().model


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ENCODER, **zoo.SPECIAL))


def gpt2() -> nn.Module:
    return zoo.gpt2().model


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, sliding_window=3))


def gemma() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=3))


def t5() -> nn.Module:
    return zoo.t5().model


def vit() -> nn.Module:
    config = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_dropout_prob": 0.1}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**ENCODER, **config))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[2], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=11, num_mel_bins=4, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_source_positions=4,
        max_target_positions=8, decoder_start_token_id=0, dropout=0.1, **zoo.SPECIAL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


follows_transformers_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="the explicit Jacobian does not fit this model of transformers 4"
)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        pytest.param(bert, "classes", marks=pytest.mark.tested("BERT (transformers)", "twin")),
        pytest.param(distilbert, "classes", marks=pytest.mark.tested("DistilBERT (transformers)", "twin")),
        pytest.param(roberta, "classes", marks=pytest.mark.tested("RoBERTa (transformers)", "twin")),
        pytest.param(gpt2, "next tokens", marks=pytest.mark.tested("GPT-2 (transformers), tied head", "twin")),
        pytest.param(
            llama, "next tokens",
            marks=pytest.mark.tested("Llama (transformers), rotary positions, grouped queries, RMSNorm", "twin"),
        ),
        pytest.param(mistral, "next tokens", marks=pytest.mark.tested("Mistral (transformers), sliding window", "twin")),
        pytest.param(gemma, "next tokens", marks=pytest.mark.tested("Gemma 3 (transformers), tied head", "twin")),
        pytest.param(t5, "tokens", marks=[pytest.mark.tested("T5 (transformers)", "twin"), follows_transformers_5]),
        pytest.param(vit, "classes", marks=pytest.mark.tested("ViT (transformers)", "twin")),
        pytest.param(resnet, "classes", marks=pytest.mark.tested("ResNet (transformers), BatchNorm", "twin")),
        pytest.param(whisper, "tokens", marks=[pytest.mark.tested("Whisper (transformers)", "twin"), follows_transformers_5]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_it_is_linearized_exactly_and_trains_as_it_is(make: Callable[[], nn.Module], target: str) -> None:
    # Adam would enlarge the rounding of gradients that are nearly zero, as before batch normalization.
    monitor = watch(make, target, "sgd" if make is resnet else "adamw")
    assert monitor.history[-1]["relative_weight_distance"] > 1e-3


def watch(make: Callable[[], nn.Module], target: str, optimizer: str) -> LinearizationMonitor:
    """A monitor of a run that is as without it, after its linearized weights were compared with those of an explicit Jacobian."""
    with exactly():
        seed_everything(0, verbose=False)
        module = Family(make(), target).double()
        module.optimizer = optimizer
        untrained, plain = copy.deepcopy(module), copy.deepcopy(module)
        expected = what_is_left(fit(plain), plain)
        monitor = LinearizationMonitor(reference=None, steps=STEPS, per_parameter=True, strict=True, progress=False)
        trainer = fit(module, monitor, recorder := Recorder())
        assert_same(what_is_left(trainer, module), expected)
        weights = train_explicitly(untrained, explicit, recorder.batches)
    start = flat({name: untrained.get_parameter(name) for name in weights})
    error = (flat(monitor.comparison.online.weights) - flat(weights)).norm() / (flat(weights) - start).norm()
    assert error <= 1e-10
    return monitor
