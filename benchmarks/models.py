"""The networks of the benchmarks, on scikit-learn's digits with one-hot targets."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Transformer(nn.Module):
    """A transformer encoder on eight tokens, the rows of an image, of eight pixels each."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes."""
        tokens = self.encoder(self.embed(images.reshape(-1, 8, 8)) + self.positions)
        scores: Tensor = self.head(tokens.mean(1))
        return scores


def mlp() -> nn.Module:
    """M1: 64-512-512-10 with tanh."""
    return nn.Sequential(
        nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    )  # fmt: skip


def convolutional() -> nn.Module:
    """M2: two 3 x 3 convolutions, average pooling, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to what comes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """The sum."""
        return torch.relu(features + self.body(features))


def residual() -> nn.Module:
    """M3: a ResNet with BatchNorm, two blocks of 32 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), Residual(32), Residual(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def normalized() -> nn.Module:
    """M4: two 3 x 3 convolutions with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64),
        nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.2), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


MODELS = {"MLP": mlp, "CNN": convolutional, "transformer": Transformer}
STEP_MODELS = {
    "CNN": convolutional,
    "transformer": Transformer,
    "BatchNorm ResNet": residual,
    "BatchNorm CNN": normalized,
}


class CausalModel(nn.Module):
    """GPT-2's vocabulary on a small transformer of transformers; two words at the last position, as of a prompt."""

    def __init__(self, *, tied: bool) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=4, tie_word_embeddings=tied))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of two words."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits[:, -1, [100, 200]]


class Encoder(nn.Module):
    """The size of MiniLM-L6: 22.7 million parameters, with a classifier of two classes on the class token."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        layers = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        self.model = BertForSequenceClassification(
            BertConfig.from_dict(layers | {"vocab_size": 30522, "num_labels": 2})
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the two classes."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def digits(model: str, samples: int) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], `(N, 64)` or `(N, 1, 8, 8)` for the convolutional ones, and one-hot targets `(N, 10)`."""
    data = load_digits()
    images = torch.tensor(data.data[:samples], dtype=torch.float32) / 16
    targets = nn.functional.one_hot(torch.tensor(data.target[:samples]), 10).float()
    return images.reshape(-1, 1, 8, 8) if model not in ("MLP", "transformer") else images, targets
