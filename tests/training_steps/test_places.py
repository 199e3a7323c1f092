"""Where the network of a training step ends, and that it does not depend on how the loss behind it is written."""

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_ntk import LinearizationMonitor
from tests.training_steps.test_after_one_step import fit, make
from tests.training_steps.zoo import (
    Classifier,
    PositiveWeight,
    Tutorial,
    VariationalAutoencoder,
    VariationalDistributions,
)

PLACES = {
    "Classifier": {"net.10"},
    "LogSoftmaxClassifier": {"model.3"},
    "WarmedUpPenalty": {"net.2"},
    "ResNet": {"fc"},
    "TransferLearning": {"classifier"},
    "FrozenLayers": {"net.6"},
    "MaskedLogits": {"net.2"},
    "TwoBranches": {"head"},
    "MixtureOfExperts": {"gate", "head"},
    "MultiTask": {"heads.digit", "heads.size"},
    "LearnedLossWeights": {"net.2"},
    "Detection": {"box", "label"},
    "DomainAdversarial": {"label", "domain"},
    "Autoencoder": {"decoder.2"},
    "VariationalAutoencoder": {"decoder.2", "mu", "log_var"},
    "VariationalDistributions": {"decoder.2", "mu", "log_var"},
    "Flow": {"couplings.0.2", "couplings.1.2"},
    "UNet": {"out"},
    "PackedGRU": {"head"},
    "TeacherForcing": {"out"},
    "LanguageModel": {"decoder"},
    "SimCLR": {"net.3"},
    "MomentumContrast": {"encoder.2"},
    "CenteredTeacher": {"student.2"},
    "Distillation": {"student.2"},
    "PerceptualLoss": {"net.2"},
    "PolicyGradient": {"actor", "critic"},
    "bert": {"model.classifier"},
    "gpt2": {"model.lm_head"},
    "t5": {"model.lm_head"},
    "lora": {"model.base_model.model.lm_head"},
}


@pytest.mark.parametrize("name", PLACES)
def test_outputs_are_those_that_a_person_would_name(name: str) -> None:
    monitor = LinearizationMonitor(reference=None, strict=True, progress=False)
    fit(make(name, "sgd"), [monitor], "64-true", steps=1)
    assert {place for place, _ in monitor.linearized_outputs} == PLACES[name]


class KullbackLeiblerByHand(VariationalAutoencoder):
    """The loss of VariationalDistributions without torch.distributions."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        h = torch.relu(self.encoder(x))
        mu, log_var = self.mu(h), self.log_var(h)
        x_hat = self.decoder(mu + torch.randn_like(mu) * torch.exp(log_var / 2))
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).mean()
        return 0.5 * (x_hat - x).square().mean() + 0.01 * kl


class CrossEntropyByHand(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return -torch.log(self(x).softmax(1))[torch.arange(len(x)), y].mean()


class PositiveWeightByHand(PositiveWeight):
    """In place, step by step, with Python loops."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        p, total = self(x).sigmoid_(), 0.0
        for index, label in enumerate(y):
            for k in range(10):
                total = total - (9 * torch.log(p[index, k]) if k == label else torch.log(1 - p[index, k]))
        return total / p.numel()


@pytest.mark.parametrize(
    ("usual", "unusual"),
    [
        (KullbackLeiblerByHand, VariationalDistributions),
        (Classifier, CrossEntropyByHand),
        (PositiveWeight, PositiveWeightByHand),
    ],
)
def test_it_does_not_matter_how_a_loss_is_written(usual: type[Tutorial], unusual: type[Tutorial]) -> None:
    distances = []
    for kind in (usual, unusual):
        seed_everything(0, verbose=False)
        module = kind()
        module.optimizer = "sgd"
        monitor = LinearizationMonitor(reference=None, steps=1, strict=True, progress=False)
        fit(module, [monitor], "64-true", steps=5)
        distances.append([row["relative_weight_distance"] for row in monitor.history])
    assert distances[0][1] <= 1e-12
    assert distances[1] == pytest.approx(distances[0], rel=1e-9, abs=1e-12)
