"""LightningModules as tutorials write them: their training steps are all that the monitor gets to see.

Every one trains on scikit-learn's digits, is as small as it can be, and computes in the type of its weights.
"""

import random
from collections import UserDict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset, default_collate
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC


@cache
def digits(samples: int = 48) -> tuple[Tensor, Tensor]:
    """Images of 64 numbers between 0 and 1, and labels."""
    data = load_digits()
    return torch.tensor(data.data[:samples], dtype=torch.float32) / 16, torch.tensor(data.target[:samples])


class Rows(Dataset):
    """A data set of what a function makes of an image and its label."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(digits()[0])

    def __getitem__(self, index: int) -> Any:
        images, labels = digits()
        return self.make(images[index], labels[index])


class Tutorial(LightningModule):
    """What all have in common: the digits, and an optimizer that a test may choose."""

    optimizer = "adamw"

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=3e-3)

    def configure_optimizers(self):
        return self.make_optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)

    def dataset(self) -> Dataset:
        return TensorDataset(*digits())

    @staticmethod
    def collate(rows: list[Any]) -> Any:
        return default_collate(rows)


def small_cnn(outputs: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, outputs),
    )


def small_mlp(inputs: int = 64, outputs: int = 10, width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


# Classifiers


class Classifier(Tutorial):
    """The classifier of every introduction, with batch normalization and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        return loss


class LogSoftmaxClassifier(Tutorial):
    """The official MNIST tutorial: the network ends with the logarithm of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 10))

    def forward(self, x):
        return F.log_softmax(self.model(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self(x), y)


class CriterionClassifier(Tutorial):
    """The loss is a module with class weights, one of several hidden layers is used twice, a dict is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.criterion = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10), label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = torch.tanh(self.first(x))
        h = F.gelu(self.hidden(F.gelu(self.hidden(h))))
        logits = self.head(h)
        return {"loss": self.criterion(logits, y), "predictions": logits.argmax(1)}


class AccuracyFirst(Classifier):
    """What the network predicts is looked at before there is a loss, without gradients."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == y).float().mean()
        with torch.inference_mode():
            self.log("confidence", logits.softmax(1).amax(1).mean())
        self.log("accuracy", accuracy)
        return F.cross_entropy(logits, y)


class FocalLoss(Tutorial):
    """Samples are weighted by how wrong they are, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        with torch.no_grad():
            weights = (1 - logits.softmax(1).gather(1, y[:, None]).squeeze(1)) ** 2
        return (weights * F.cross_entropy(logits, y, reduction="none")).mean()


class MetricsClassifier(Classifier):
    """Metrics of torchmetrics are updated in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = MetricCollection([MulticlassAccuracy(10), MulticlassAUROC(10)], prefix="train/")
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.metrics.update(logits.softmax(1), y)
        self.mean(loss)
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        self.log("train/mean", self.mean)
        return loss


class Mixup(Classifier):
    """Pairs of images are mixed, by numpy's random numbers."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        lam = np.random.beta(0.4, 0.4)
        index = torch.randperm(x.size(0))
        logits = self(lam * x + (1 - lam) * x[index])
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[index])


class WarmedUpPenalty(Tutorial):
    """A penalty of the weights that grows with the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        penalty = sum(p.pow(2).sum() for p in self.parameters())
        return F.cross_entropy(self.net(x), y) + min(1.0, (self.global_step + 1) / 10) * 1e-2 * penalty


class TrainerReader(Tutorial):
    """The step looks at the Trainer, the epoch, the optimizer and the scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = small_mlp()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        x, y = batch
        progress = self.global_step / self.trainer.max_steps
        rate = self.optimizers().param_groups[0]["lr"]
        smoothing = 0.1 * (1 - progress) / (1 + self.current_epoch)
        self.log("lr", rate)
        self.log("last_lr", self.lr_schedulers().get_last_lr()[0])
        if self.trainer.is_last_batch:
            self.print("The last batch of the epoch")
        if self.logger is not None:
            self.logger.experiment.add_scalar("smoothing", smoothing, self.global_step)
        return F.cross_entropy(self.net(x), y, label_smoothing=smoothing) * (1 + rate)


class PositiveWeight(Tutorial):
    """Ten yes-or-no questions, with a weight for the rare answer in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()
        self.register_buffer("pos_weight", torch.full((10,), 9.0))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        targets = F.one_hot(y, 10).type_as(x)
        return F.binary_cross_entropy_with_logits(self(x), targets, pos_weight=self.pos_weight)


class ResNet(Tutorial):
    """Residual blocks that compute in place, on a batch that the step normalizes in place."""

    norm: type[nn.Module] = nn.BatchNorm2d

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.fc(self.relu(out).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.view(-1, 1, 8, 8)
        x.sub_(0.3).div_(0.4)
        return F.cross_entropy(self(x), y, label_smoothing=0.1)


class SyncBatchNormResNet(ResNet):
    """Batch normalization across processes, of which there is one."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in list(self.named_children()):
            setattr(self, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


class TransferLearning(Tutorial):
    """A frozen backbone in eval mode, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = small_cnn()[:-1]
        self.feature_extractor.requires_grad_(False)
        self.classifier = nn.Linear(8, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.feature_extractor.eval()
        with torch.no_grad():
            representations = self.feature_extractor(x).flatten(1)
        return F.cross_entropy(self.classifier(representations), y)


class FrozenLayers(Tutorial):
    """Some layers of one network are frozen, before and after trained ones; gradients flow through them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)
        )
        self.net[0].requires_grad_(False)
        self.net[4].requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class GradientCheckpointing(Tutorial):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)
        )
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class SpectralNorm(Tutorial):
    """Weights that are computed from parameters: by a power iteration, and from direction and length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(64, 12)),
            nn.LeakyReLU(0.2),
            parametrizations.weight_norm(nn.Linear(12, 12)),
            nn.PReLU(),
            nn.Linear(12, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.multi_margin_loss(self(x), y)


class ManyLayers(Tutorial):
    """Layers that other networks here do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.RReLU(),
            nn.Dropout2d(0.2),
            nn.PixelShuffle(2),
            nn.LocalResponseNorm(2),
            nn.AvgPool2d(2),
            nn.Mish(),
            nn.ConvTranspose2d(2, 4, 2),
            nn.Hardswish(),
            nn.GroupNorm(2, 4),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.MaxPool2d(2),
            nn.CELU(),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            nn.AlphaDropout(0.1),
            nn.RMSNorm(64),
            nn.Linear(64, 20),
            nn.GLU(),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class TiedAndUnused(Tutorial):
    """Two layers share a weight, and one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 64)
        self.decoder = nn.Linear(64, 64, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(64, 10)
        self.unused = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(torch.tanh(self.decoder(torch.tanh(self.encoder(x))))), y)


class ConstantParts(Tutorial):
    """Parts without a gradient inside of the network, one of them of weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            size = 1 + self.first(x).square().mean(1, keepdim=True)
        norm = torch.linalg.norm(1 + 3 * self.head.weight, dim=0)
        return self.head(h / size * (5 * self.scale / norm.detach()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class MaskedLogits(Tutorial):
    """Classes are ruled out by writing into the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        ruled_out = (torch.arange(10, device=self.device) + y[:, None]) % 10 == 5
        logits[ruled_out] = -1e3
        logits[:, :2] *= 0.5
        return F.cross_entropy(logits, y)


class VisionTransformer(Tutorial):
    """Patches, a class token, learned positions, and the encoder of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 9, 8) * 0.02)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.patches(x.view(-1, 8, 8))
        x = torch.cat([self.cls_token.expand(x.size(0), -1, -1), x], dim=1) + self.positions
        return F.cross_entropy(self.head(self.encoder(x)[:, 0]), y)


class MixtureOfExperts(Tutorial):
    """Every sample goes to its two best experts, so that the calls depend on the batch; a loss balances the load."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(small_mlp(64, 8, 8) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        probabilities = self.gate(x).softmax(-1)
        weights, chosen = probabilities.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = x.new_zeros(len(x), 8)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if len(rows):
                mixed.index_add_(0, rows, weights[rows, slots, None] * expert(x[rows]))
        share = F.one_hot(chosen[:, 0], 4).type_as(x).mean(0)
        balance = 4 * (share * probabilities.mean(0)).sum()
        return F.cross_entropy(self.head(mixed), y) + 0.01 * balance


class TwoBranches(Tutorial):
    """Samples are written, group by group, into a tensor for the hidden layer, and into a part of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.dark, self.bright, self.skip = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(64, 4)
        self.head = nn.Linear(16, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        bright = x.mean(1) > x.mean()
        hidden, wide = x.new_zeros(len(x), 8), x.new_zeros(len(x), 16)
        hidden[bright] = torch.tanh(self.bright(x[bright]))
        hidden[~bright] = torch.relu(self.dark(x[~bright]))
        wide[:, :8] = hidden
        wide[:, 8:12].add_(torch.sigmoid(self.skip(x)))
        return F.cross_entropy(self.head(wide), y)


class StochasticDepth(Tutorial):
    """Residual branches are left out at random, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.GroupNorm(2, 12), nn.Linear(12, 12), nn.SiLU()) for _ in range(3))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            keep = x.new_empty((len(x), 1)).bernoulli_(0.8).div_(0.8)
            x = x + keep * block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class DeviceAugmentation(Tutorial):
    """Images are augmented in a batch, in a hook, as with Kornia."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, x):
        return self.net(x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + 0.1 * torch.randn_like(x) if self.trainer.training else x), y

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class RandomTransforms(Tutorial):
    """Images are augmented one by one, in the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, x):
        return self.net(x)

    def dataset(self) -> Dataset:
        return Rows(lambda image, label: (image * (torch.rand(64) > 0.1) + 0.1 * np.random.rand(), label))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


# Several outputs, several losses


class MultiTask(Tutorial):
    """Two heads in a dict, two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 12), nn.Tanh())
        self.heads = nn.ModuleDict({"digit": nn.Linear(12, 10), "size": nn.Linear(12, 1)})

    def forward(self, x):
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        losses = {
            "digit": F.cross_entropy(out["digit"], y),
            "size": F.mse_loss(out["size"].squeeze(-1), y.type_as(x) / 10),
        }
        self.log_dict(losses)
        return losses["digit"] + 0.1 * losses["size"]


class LearnedLossWeights(Tutorial):
    """Losses are weighted by learned uncertainties."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp(outputs=11)
        self.log_variances = nn.Parameter(torch.zeros(2))
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        losses = torch.stack([F.cross_entropy(out[:, :10], y), F.mse_loss(out[:, 10], y.type_as(x) / 10)])
        return (losses * torch.exp(-self.log_variances) + self.log_variances).sum() + (self.temperature - 2).pow(2)


class Detection(Tutorial):
    """Images with lists of boxes of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 12), nn.ReLU())
        self.box, self.label = nn.Linear(12, 4), nn.Linear(12, 10)

    def dataset(self) -> Dataset:
        def annotated(image: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            count = int(label) % 3 + 1
            return image.repeat(count, 1), {"boxes": image[: 4 * count].view(count, 4), "labels": label.repeat(count)}

        return Rows(annotated)

    @staticmethod
    def collate(rows):
        return tuple(zip(*rows, strict=True))

    def training_step(self, batch, batch_idx):
        images, targets = batch
        losses = []
        for image, target in zip(images, targets, strict=True):
            features = self.backbone(image)
            losses.append(F.smooth_l1_loss(self.box(features), target["boxes"]))
            losses.append(F.cross_entropy(self.label(features), target["labels"]))
        return torch.stack(losses).mean()


class DeepSupervision(Tutorial):
    """Auxiliary outputs in train mode only, as of Inception; hidden activities are penalized."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 12), nn.Softplus())
        self.auxiliary = nn.Linear(12, 10)
        self.second = nn.Sequential(nn.Linear(12, 12), nn.ELU(inplace=True), nn.Linear(12, 10))

    def forward(self, x):
        hidden = self.first(x)
        if self.training:
            return self.second(hidden), self.auxiliary(hidden), hidden
        return self.second(hidden), None, hidden

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, auxiliary, hidden = self(x)
        loss = F.cross_entropy(logits, y) + 1e-3 * hidden.abs().mean()
        return loss if auxiliary is None else loss + 0.4 * F.cross_entropy(auxiliary, y)


class GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.alpha * gradient, None


class DomainAdversarial(Tutorial):
    """The features have to hide a domain: a function with a gradient of its own, which has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 12), nn.ReLU())
        self.label, self.domain = nn.Linear(12, 10), nn.Linear(12, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.features(x)
        domain = self.domain(GradientReversal.apply(h, 0.1))
        return F.cross_entropy(self.label(h), y) + F.cross_entropy(domain, (x.mean(1) > 0.3).long())


# Generative networks


class Autoencoder(Tutorial):
    """Lightning's first example: the parts are called in the step, and there is no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = small_mlp(outputs=3)
        self.decoder = small_mlp(inputs=3, outputs=64)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = F.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss


class VariationalAutoencoder(Tutorial):
    """Reparametrization by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 12)
        self.mu, self.log_var = nn.Linear(12, 3), nn.Linear(12, 3)
        self.decoder = small_mlp(inputs=3, outputs=64)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        h = torch.relu(self.encoder(x))
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        reconstruction = F.mse_loss(self.decoder(z), x)
        kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(1).mean()
        self.log_dict({"reconstruction": reconstruction, "kl": kl})
        return reconstruction + 0.01 * kl


class VariationalDistributions(VariationalAutoencoder):
    """Reparametrization by `torch.distributions`."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        h = torch.relu(self.encoder(x))
        q = Normal(self.mu(h), torch.exp(self.log_var(h) / 2))
        p = Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale))
        x_hat = self.decoder(q.rsample())
        return -Normal(x_hat, 1.0).log_prob(x).mean() + 0.01 * kl_divergence(q, p).mean()


class VectorQuantized(Tutorial):
    """A codebook, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = small_mlp(outputs=4), small_mlp(inputs=4, outputs=64)
        self.codebook = nn.Embedding(8, 4)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        z = self.encoder(x)
        codes = torch.cdist(z.detach(), self.codebook.weight.detach()).argmin(1)
        quantized = self.codebook(codes)
        commitment = F.mse_loss(quantized.detach(), z) * 0.25 + F.mse_loss(quantized, z.detach())
        quantized = z + (quantized - z).detach()
        return F.mse_loss(self.decoder(quantized), x) + commitment


class Flow(Tutorial):
    """Affine couplings, trained by maximum likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(nn.Sequential(nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 64)) for _ in range(2))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        log_det = x.new_zeros(x.size(0))
        left, right = x.chunk(2, dim=1)
        for coupling in self.couplings:
            log_scale, shift = coupling(left).chunk(2, dim=1)
            left, right = right * torch.exp(torch.tanh(log_scale)) + shift, left
            log_det = log_det + torch.tanh(log_scale).sum(1)
        prior = Normal(x.new_zeros(()), x.new_ones(()))
        return -(prior.log_prob(torch.cat([left, right], dim=1)).sum(1) + log_det).mean() / 64


class Diffusion(Tutorial):
    """Denoising at random times."""

    def __init__(self, steps: int = 20) -> None:
        super().__init__()
        self.time = nn.Embedding(steps, 8)
        self.net = small_mlp(inputs=72, outputs=64)
        self.register_buffer("alpha_bar", torch.cumprod(1 - torch.linspace(1e-4, 0.2, steps), dim=0))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        t = torch.randint(len(self.alpha_bar), (x.size(0),), device=self.device)
        noise = torch.randn_like(x)
        a = self.alpha_bar[t].unsqueeze(1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        return F.mse_loss(self.net(torch.cat([noisy, self.time(t)], dim=1)), noise)


class UNet(Tutorial):
    """Segmentation of noisy images, with a Dice loss."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 1, 1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(-1, 1, 8, 8)
        mask = (x > 0.5).type_as(x)
        d = self.down(x + 0.1 * torch.randn_like(x))
        logits = self.out(torch.cat([d, self.up(self.middle(d))], dim=1))
        probabilities = torch.sigmoid(logits)
        dice = 1 - (2 * (probabilities * mask).sum() + 1) / (probabilities.sum() + mask.sum() + 1)
        return F.binary_cross_entropy_with_logits(logits, mask) + dice


class MaskedAutoencoder(Tutorial):
    """A random part of the patches is hidden and restored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mask_token = nn.Parameter(torch.randn(8) * 0.02)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        patches = x.view(-1, 8, 8)
        masked = torch.rand(patches.shape[:2], device=self.device).argsort(1) < 4
        h = torch.where(masked.unsqueeze(-1), self.mask_token, self.embed(patches))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return (self.out(h) - patches)[masked].pow(2).mean()


# Sequences


class LSTMRegression(Tutorial):
    """Rows of an image as a sequence, two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        out, _ = self.lstm(x)
        return self.head(out[:, -1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x.view(-1, 8, 8)).squeeze(-1)
        return F.huber_loss(y_hat, y.type_as(x) / 10)


class PackedGRU(Tutorial):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 10)

    def dataset(self) -> Dataset:
        return Rows(lambda image, label: (image.view(8, 8)[: int(label) % 6 + 2], label))

    @staticmethod
    def collate(rows):
        sequences, labels = zip(*rows, strict=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return pad_sequence(sequences, batch_first=True), lengths, torch.stack(labels)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return F.cross_entropy(self.head(out.sum(1) / lengths.unsqueeze(1)), y)


class TeacherForcing(Tutorial):
    """A decoder that gets the true last row or its own, by Python's random numbers: the way differs from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.out = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        rows = batch[0].view(-1, 8, 8)
        _, h = self.encoder(rows[:, :4])
        h, row, loss = h[0], rows[:, 3], 0.0
        for t in range(4, 8):
            h = self.cell(row, h)
            predicted = self.out(h)
            loss = loss + F.mse_loss(predicted, rows[:, t])
            row = rows[:, t] if random.random() < 0.5 else predicted
        return loss / 4


class SpeechRecognition(Tutorial):
    """A convolutional recognizer with the CTC loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Hardtanh(0, 20, inplace=True))
        self.fc = nn.Linear(8, 5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.net(x.view(-1, 8, 8)).permute(2, 0, 1)
        log_probs = F.log_softmax(self.fc(h), dim=-1)
        targets = torch.stack([y % 4 + 1, y // 4 + 1], dim=1)
        return F.ctc_loss(log_probs, targets, torch.full_like(y, 8), torch.full_like(y, 2), zero_infinity=True)


class LanguageModel(Tutorial):
    """Lightning's transformer demo: a causal mask, positions by sine and cosine, the next token as the target."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.decoder = nn.Linear(8, 17)
        angles = torch.arange(15).unsqueeze(1) * torch.exp(torch.arange(0, 8, 2) * (-np.log(100.0) / 8))
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1), persistent=False)

    def training_step(self, batch, batch_idx):
        tokens = (batch[0][:, 16:32] * 16).long()
        inputs, target = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.size(1), device=self.device, dtype=self.dtype)
        h = self.encoder(self.embedding(inputs) * 8**0.5 + self.positions, mask=mask, is_causal=True)
        logits = self.decoder(h)
        return F.nll_loss(F.log_softmax(logits, dim=-1).view(-1, 17), target.reshape(-1), ignore_index=0)


# Comparisons of samples


class Siamese(Tutorial):
    """Pairs of images through one encoder, with a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = small_mlp(outputs=8)

    def dataset(self) -> Dataset:
        def pair(image: Tensor, label: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            other = (int(label) * 7 + int(image.sum())) % 40
            images, labels = digits()
            return (image, images[other]), (labels[other] == label).float()

        return Rows(pair)

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        (first, second), same = batch
        distance = F.pairwise_distance(self(first), self(second))
        return (same * distance.pow(2) + (1 - same) * F.relu(1 - distance).pow(2)).mean()


class Triplet(Tutorial):
    """Anchors, positives and negatives that are mined in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = small_mlp(outputs=8)

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.encoder(x), dim=1)
        with torch.no_grad():
            distances = torch.cdist(z, z)
            same = y[:, None] == y[None, :]
            positive = distances.masked_fill(~same, -1.0).argmax(1)
            negative = distances.masked_fill(same, torch.inf).argmin(1)
        return F.triplet_margin_loss(z, z[positive], z[negative], margin=0.5)


class SimCLR(Tutorial):
    """Two noisy views of every image, and the others as negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Linear(12, 8))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        views = torch.cat([x + 0.1 * torch.randn_like(x), x * (torch.rand_like(x) > 0.2)], dim=0)
        z = self.net(views)
        similarity = F.cosine_similarity(z[:, None, :], z[None, :, :], dim=-1)
        own = torch.eye(len(z), dtype=torch.bool, device=self.device)
        similarity.masked_fill_(own, -9e15)
        similarity = similarity / 0.5
        nll = -similarity[own.roll(shifts=len(x), dims=0)] + torch.logsumexp(similarity, dim=-1)
        return nll.mean()


class MomentumContrast(Tutorial):
    """The keys come from a momentum encoder, which the step updates, and a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.momentum_encoder = small_mlp(outputs=8), small_mlp(outputs=8)
        self.momentum_encoder.load_state_dict(self.encoder.state_dict())
        self.momentum_encoder.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(8, 32), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def update_momentum(self) -> None:
        for own, slow in zip(self.encoder.parameters(), self.momentum_encoder.parameters(), strict=True):
            slow.data = slow.data * 0.99 + own.data * 0.01

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        start = int(self.pointer)
        self.queue[:, start : start + len(keys)] = keys.T
        self.pointer[0] = (start + len(keys)) % 32

    def training_step(self, batch, batch_idx):
        x, _ = batch
        self.update_momentum()
        q = F.normalize(self.encoder(x + 0.1 * torch.randn_like(x)), dim=1)
        with torch.no_grad():
            k = F.normalize(self.momentum_encoder(x + 0.1 * torch.randn_like(x)), dim=1)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / 0.2
        self.enqueue(k)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=self.device))


class CLIP(Tutorial):
    """Two encoders and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = small_mlp(outputs=8), nn.Embedding(10, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch, batch_idx):
        x, y = batch
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        logits = self.logit_scale.exp() * image @ text.t()
        labels = torch.arange(len(x), device=self.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class CenteredTeacher(Tutorial):
    """DINO: a frozen teacher, whose outputs are centered by a running mean in a buffer, as are those of the student."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = small_mlp(), small_mlp().requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, 10))
        self.register_buffer("student_center", torch.zeros(1, 10))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        student, teacher = self.student(x), self.teacher(x + 0.1 * torch.randn_like(x))
        targets = F.softmax((teacher - self.center) / 0.5, dim=-1)
        loss = -(targets * F.log_softmax((student - self.student_center) / 0.5, dim=-1)).sum(-1).mean()
        self.center = 0.9 * self.center + 0.1 * teacher.mean(0, keepdim=True)
        with torch.no_grad():
            self.student_center.mul_(0.9).add_(student.mean(0, keepdim=True), alpha=0.1)
        return loss


class Distillation(Tutorial):
    """A frozen teacher in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.student = small_mlp()
        self.teacher = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10)).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.teacher.eval()
        with torch.no_grad():
            soft = (self.teacher(x) / 2).softmax(-1)
        logits = self.student(x)
        distilled = F.kl_div((logits / 2).log_softmax(-1), soft, reduction="batchmean") * 4
        return 0.5 * distilled + 0.5 * F.cross_entropy(logits, y)


class PerceptualLoss(Tutorial):
    """Images are compared by the features of a frozen network, through which the gradient flows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp(outputs=64)
        self.features = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12)).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        restored = self.net(x * (torch.rand_like(x) > 0.3))
        return F.mse_loss(self.features(restored), self.features(x)) + 0.1 * F.l1_loss(restored, x)


class MarginSoftmax(Tutorial):
    """ArcFace: cosines to class centers, with a margin for the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = small_mlp(outputs=8)
        self.centers = nn.Parameter(torch.randn(10, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        cosine = F.linear(F.normalize(self.encoder(x)), F.normalize(self.centers))
        angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
        one_hot = torch.zeros_like(cosine).scatter_(1, y.view(-1, 1), 1)
        return F.cross_entropy(8 * torch.cos(angle + 0.2 * one_hot), y)


# Graphs, reinforcement learning, unusual batches


class GraphConvolution(Tutorial):
    """Neighbors by a sparse matrix; labels of a part of the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 12), nn.Linear(12, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        neighbors = torch.cdist(x, x).topk(3, largest=False).indices
        nodes = torch.arange(len(x), device=self.device).repeat_interleave(3)
        edges = torch.stack([nodes, neighbors.flatten()])
        adjacency = torch.sparse_coo_tensor(edges, torch.full((3 * len(x),), 1 / 3).type_as(x), (len(x), len(x)))
        h = torch.relu(torch.sparse.mm(adjacency, self.first(x)))
        out = torch.sparse.mm(adjacency, self.second(h))
        labeled = torch.arange(len(x), device=self.device) % 2 == 0
        return F.cross_entropy(out[labeled], y[labeled])


class PolicyGradient(Tutorial):
    """Actions are sampled, the right ones are rewarded, and a critic gives the baseline."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 12), nn.Tanh())
        self.actor, self.critic = nn.Linear(12, 10), nn.Linear(12, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.trunk(x)
        policy, value = Categorical(logits=self.actor(h)), self.critic(h).squeeze(-1)
        action = policy.sample()
        reward = (action == y).type_as(x)
        advantage = reward - value.detach()
        return (
            (-policy.log_prob(action) * advantage).mean() + F.mse_loss(value, reward) - 0.01 * policy.entropy().mean()
        )


class DictBatch(Tutorial):
    """The batch is a dict, and the step takes the labels out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, inputs):
        return self.net(inputs)

    def dataset(self) -> Dataset:
        return Rows(lambda image, label: {"inputs": image, "labels": label})

    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        return F.cross_entropy(self(**batch), labels)


class UserDictBatch(DictBatch):
    """The batch is a mapping that is no dict."""

    @staticmethod
    def collate(rows):
        return UserDict(default_collate(rows))


class SampleWeights(Tutorial):
    """Batches of three tensors in an object of its own, and a step that takes no index."""

    class Batch:
        def __init__(self, rows: list[tuple[Tensor, Tensor]]) -> None:
            self.image, self.label = default_collate(rows)
            self.weight = self.image.mean(1)

        def to(self, *args, **kwargs):
            for name, tensor in vars(self).items():
                setattr(self, name, tensor.to(*args, **kwargs))
            return self

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    collate = Batch

    def training_step(self, batch):
        losses = F.cross_entropy(self.net(batch.image.to(self.dtype)), batch.label, reduction="none")
        return (losses * batch.weight.to(self.dtype)).sum() / batch.weight.sum()


# What cannot be followed


class BagOfWords(Tutorial):
    """Texts as one long tensor with offsets, as in the tutorial of torchtext. EmbeddingBag has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(17, 8)
        self.fc = nn.Linear(8, 10)

    @staticmethod
    def collate(rows):
        texts = [(image[: 16 + int(label)] * 16).long() for image, label in rows]
        offsets = torch.tensor([0] + [len(text) for text in texts[:-1]]).cumsum(0)
        return {"labels": torch.stack([label for _, label in rows]), "input": torch.cat(texts), "offsets": offsets}

    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        return F.cross_entropy(self.fc(self.embedding(**batch)), labels)


class GradientPenalty(Tutorial):
    """The step differentiates the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.requires_grad_()
        logits = self.net(x)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * gradient.square().sum(1).mean()


class OwnGenerator(Tutorial):
    """Random numbers that no seed of Lightning reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()
        self.generator = np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x * self.generator.uniform(0.5, 1.5)), y)


# Hugging Face


class HuggingFace(Tutorial):
    """A model that computes its own loss of a batch."""

    def __init__(self, model: nn.Module, labels: str = "classes") -> None:
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, **inputs):
        return self.model(**inputs)

    def dataset(self) -> Dataset:
        def tokens(image: Tensor, label: Tensor) -> dict[str, Tensor]:
            ids = (image[16:28] * 16).long() + 1
            labels = label % 3 if self.labels == "classes" else ids.masked_fill(ids == 1, -100)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

        return Rows(tokens)

    def training_step(self, batch, batch_idx):
        outputs = self(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss


SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def bert() -> Tutorial:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=18, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return HuggingFace(transformers.BertForSequenceClassification(config))


def bert_with_batch_encoding() -> Tutorial:
    """The batches of a tokenizer, a mapping that is no dict; the loss is the tutorial's own."""
    transformers = pytest.importorskip("transformers")

    class WithEncoding(HuggingFace):
        @staticmethod
        def collate(rows):
            return transformers.BatchEncoding(default_collate(rows))

        def training_step(self, batch, batch_idx):
            labels = batch.pop("labels")
            return F.cross_entropy(self(**batch).logits, labels)

    return WithEncoding(bert().model)


def distilbert() -> Tutorial:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=18, dim=8, n_layers=1, n_heads=2, hidden_dim=16, num_labels=3, max_position_embeddings=16
    )
    return HuggingFace(transformers.DistilBertForSequenceClassification(config))


def gpt2() -> Tutorial:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=18, n_positions=16, n_embd=8, n_layer=1, n_head=2, **SPECIAL)
    return HuggingFace(transformers.GPT2LMHeadModel(config), labels="tokens")


def gpt2_with_checkpointing() -> Tutorial:
    module = gpt2()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module


def llama() -> Tutorial:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=18, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, **SPECIAL,
    )  # fmt: skip
    return HuggingFace(transformers.LlamaForCausalLM(config), labels="tokens")


def t5() -> Tutorial:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=18, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **SPECIAL
    )
    return HuggingFace(transformers.T5ForConditionalGeneration(config), labels="tokens")


def lora() -> Tutorial:
    """Low-rank updates of a frozen language model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    return HuggingFace(peft.get_peft_model(gpt2().model, config), labels="tokens")


MODULES: tuple[Callable[[], Tutorial], ...] = (
    Classifier, LogSoftmaxClassifier, CriterionClassifier, AccuracyFirst, FocalLoss, MetricsClassifier, Mixup,
    WarmedUpPenalty, TrainerReader, PositiveWeight, ResNet, SyncBatchNormResNet, TransferLearning, FrozenLayers,
    GradientCheckpointing, SpectralNorm, ManyLayers, TiedAndUnused, ConstantParts, MaskedLogits, VisionTransformer,
    MixtureOfExperts, TwoBranches, StochasticDepth, DeviceAugmentation, RandomTransforms, MultiTask, LearnedLossWeights,
    Detection, DeepSupervision, DomainAdversarial, Autoencoder, VariationalAutoencoder, VariationalDistributions,
    VectorQuantized, Flow, Diffusion, UNet, MaskedAutoencoder, LSTMRegression, PackedGRU, TeacherForcing,
    SpeechRecognition, LanguageModel, Siamese, Triplet, SimCLR, MomentumContrast, CLIP, CenteredTeacher, Distillation,
    PerceptualLoss, MarginSoftmax, GraphConvolution, PolicyGradient, DictBatch, UserDictBatch, SampleWeights, OwnGenerator, bert,
    bert_with_batch_encoding, distilbert, gpt2, gpt2_with_checkpointing, llama, t5, lora,
)  # fmt: skip
