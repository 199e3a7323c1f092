"""A small GPT beside its linearized network: does a language model, trained from scratch, stay in its tangent space?

The network and the settings are those that nanoGPT (https://github.com/karpathy/nanoGPT) recommends for a CPU: 4 layers, 4 heads,
128 wide, blocks of 64 characters, batches of 12, AdamW with warm-up, cosine decay and clipping, no dropout. The text is the part
of Python's language reference that every Python ships for `help` (`pydoc_data.topics`, 465 thousand characters in Python 3.11).
The last tenth is held out. One line of the run is about linearization: the callback.

    python examples/language_model.py
    python examples/language_model.py --steps 100 --layers 2    # seconds
    tensorboard --logdir runs

The figure has the perplexity per character on held-out text: that of the trained network; of the linearized one, trained
beside it on the same batches by a copy of the optimizer; and of the Taylor expansion of the trained network after the fact.
Dotted lines are what counts of unigrams, bigrams and trigrams give. The other panels have the distance between the weights
of the first two networks, over steps and by layer.
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots.style import GREY, LINEARIZED, TAYLOR, TRAINED, mark_thresholds, tidy

BATCH_SIZE = 12
COLORS = {"trained": TRAINED, "linearized": LINEARIZED, "Taylor expansion": TAYLOR}
PARTS = {
    "norm_1.weight": "norm 1",
    "attention.weight": "query, key, value",
    "projection.weight": "projection",
    "norm_2.weight": "norm 2",
    "mlp.0.weight": "MLP, in",
    "mlp.2.weight": "MLP, out",
}


class Block(nn.Module):
    """A layer of a GPT: causal attention and an MLP, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, T, width)` to the same shape."""
        batch, length, width = x.shape
        parts = self.attention(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class GPT(nn.Module):
    """GPT-2 at the level of characters, with one matrix for embedding and head, initialized as nanoGPT does.

    Args:
        characters: Size of the alphabet.
        block: Longest sequence.
        layers: Number of blocks.
        heads: Heads of the attention.
        width: Size of the stream.
    """

    def __init__(self, characters: int, block: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends_branch = name.endswith(("projection.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, `(B, T, characters)`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        stream = self.blocks(self.embedding(tokens) + self.positions(places))
        return F.linear(self.norm(stream), self.embedding.weight)


class LanguageModel(LightningModule):
    """The training of nanoGPT: AdamW, warm-up over 100 steps and cosine decay to a tenth.

    Args:
        network: Maps tokens to logits.
        steps: Length of the run.
        lr: Largest learning rate.
    """

    def __init__(self, network: GPT, steps: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.network = network
        self.steps = steps
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of the next characters."""
        tokens, following = batch
        loss = F.cross_entropy(self.network(tokens).flatten(0, 1), following.flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Decay for matrices only, and the schedule."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99))
        schedule = {"scheduler": LambdaLR(optimizer, self.share_of_rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def share_of_rate(self, step: int) -> float:
        """The learning rate as a share of the largest one."""
        warm_up = min(100, self.steps // 10)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        done = (step - warm_up) / max(self.steps - warm_up, 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a text, and the same pieces one character later.

    Args:
        text: Numbers of the characters.
        block: Length of a piece.
        stride: Distance of the beginnings of two pieces.
    """

    def __init__(self, text: Tensor, block: int, stride: int) -> None:
        self.text = text
        self.block = block
        self.stride = stride

    def __len__(self) -> int:
        """Number of pieces."""
        return (len(self.text) - self.block - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A piece and what follows each of its characters."""
        piece = self.text[index * self.stride :][: self.block + 1]
        return piece[:-1], piece[1:]


def load_text() -> tuple[Tensor, Tensor, int]:
    """The language reference as numbers of characters, its last tenth, held out, and the size of the alphabet."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([alphabet[character] for character in text])
    held_out = len(numbers) // 10
    return numbers[:-held_out], numbers[-held_out:], len(alphabet)


def ngram_perplexity(length: int) -> float:
    """The perplexity on held-out text of counting what follows each `length - 1` characters, with 0.01 added to each count."""
    training, held_out, characters = load_text()
    powers = characters ** torch.arange(length)
    codes = [text.unfold(0, length, 1) @ powers for text in (training, held_out)]
    # The next character, with the highest power, is the first dimension.
    counts = torch.bincount(codes[0], minlength=characters**length).double().view(characters, -1) + 0.01
    shares = counts / counts.sum(0)
    return math.exp(-float(shares.flatten()[codes[1]].log().mean()))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block", type=int, default=64, help="characters in a sequence")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--samples", type=int, default=256, help="held-out sequences on which functions are compared")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="directory of logs and figure")
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace) -> tuple[LinearizationMonitor, Path, float]:
    """Fits the network; returns the monitor, the directory of the logs and the seconds of the whole fit."""
    seed_everything(arguments.seed, verbose=False)
    training, held_out, characters = load_text()
    network = GPT(characters, arguments.block, arguments.layers, arguments.heads, arguments.width)
    evaluation = Windows(held_out, arguments.block, arguments.block)
    monitor = LinearizationMonitor(None, evaluation=evaluation, reference_samples=arguments.samples, per_parameter=True)
    logger = TensorBoardLogger(arguments.output, name="language_model", default_hp_metric=False)
    trainer = Trainer(
        max_steps=arguments.steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=[logger, CSVLogger(logger.log_dir, name="", version="")],
        callbacks=[monitor],
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Windows(training, arguments.block, 1), BATCH_SIZE, shuffle=True)
    started = time.perf_counter()
    trainer.fit(LanguageModel(network, arguments.steps, arguments.lr), loader)
    return monitor, Path(logger.log_dir), time.perf_counter() - started


def by_layer(history: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The last relative weight distance of each tensor, by layer and part of it."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in history[-1].items():
        if name.startswith("parameter/network.blocks."):
            number, _, part = name.removeprefix("parameter/network.blocks.").partition(".")
            layers.setdefault(f"layer {int(number) + 1}", {})[PARTS[part]] = value
        elif name.startswith("parameter/"):
            layers.setdefault("outside", {})[name.removeprefix("parameter/network.").removesuffix(".weight")] = value
    return layers


def plot(history: list[dict[str, float]]) -> Figure:
    """Perplexities and distances over steps, and the last distance of each layer."""
    figure = Figure(figsize=(13.5, 4.1), layout="constrained")
    perplexity, distance, layers = figure.subplots(1, 3)
    rows = [row for row in history if row["step"] > 0]
    steps = [row["step"] for row in rows]
    for (name, color), key, marker in zip(COLORS.items(), ("", "linearized_", "taylor_"), "os^", strict=True):
        values = [row[f"evaluation/{key}perplexity"] for row in rows]
        perplexity.plot(steps, values, color=color, marker=marker, markersize=4, label=name)
    for length, name in ((1, "unigrams"), (2, "bigrams"), (3, "trigrams")):
        perplexity.axhline(ngram_perplexity(length), color=GREY, linestyle=":", linewidth=1)
        perplexity.text(1, ngram_perplexity(length), name, color="#666666", fontsize=8, va="bottom")
    perplexity.set(ylabel="perplexity per character", yscale="log")
    perplexity.set_title("Held-out text", fontsize=10)
    perplexity.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    perplexity.set_yticks([], minor=True)
    distances = {
        "relative_weight_distance": (r"weights, $\|w_t - w_\mathrm{lin}(t)\| / \|w_t - w_0\|$", "#000000", "o"),
        "evaluation/taylor_gap": ("Taylor gap of the logits, held-out text", COLORS["Taylor expansion"], "^"),
    }
    for key, (label, color, marker) in distances.items():
        later = [row for row in rows if row["step"] > 1]  # after one step it is zero to rounding
        values = [row[key] for row in later]
        distance.plot([row["step"] for row in later], values, color=color, marker=marker, markersize=4, label=label)
    distance.set(ylabel="relative distance", yscale="log")
    distance.set_title("Distance from the linearization", fontsize=10)
    for axis in (perplexity, distance):
        axis.set(xlabel="optimizer step", xscale="log")
        tidy(axis)
        axis.legend(frameon=False, fontsize=8)
    mark_thresholds(distance)
    blocks = {name: values for name, values in by_layer(history).items() if name != "outside"}
    kinds = list(PARTS.values())
    image = layers.imshow([[blocks[name][kind] for name in blocks] for kind in kinds], cmap="cividis", aspect="auto")
    for row, kind in enumerate(kinds):
        for column, name in enumerate(blocks):
            layers.text(column, row, f"{blocks[name][kind]:.2f}", ha="center", va="center", fontsize=8, color="white",
                        bbox={"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 1.5})  # fmt: skip
    layers.set_xticks(range(len(blocks)), list(blocks))
    layers.set_yticks(range(len(kinds)), kinds)
    layers.tick_params(length=0)
    layers.spines[:].set_visible(False)
    layers.set_title(f"Relative weight distance by layer, step {history[-1]['step']:.0f}", fontsize=10)
    figure.colorbar(image, ax=layers, pad=0.02).outline.set_visible(False)
    return figure


def print_table(history: list[dict[str, float]]) -> None:
    """The measurements on held-out text, one line each."""
    columns = ["perplexity", "linearized_perplexity", "taylor_perplexity", "taylor_gap"]
    print(f"{'step':>6}{'relative_weight_distance':>26}" + "".join(f"{column:>24}" for column in columns))
    for row in history:
        values = "".join(f"{row[f'evaluation/{column}']:24.4g}" for column in columns)
        print(f"{row['step']:6.0f}{row['relative_weight_distance']:26.4f}{values}")


def main() -> None:
    """Trains, prints the tables and saves the figure."""
    arguments = parse_arguments()
    monitor, directory, elapsed = train(arguments)
    print_table(monitor.history)
    for layer, parts in by_layer(monitor.history).items():
        print(f"{layer:>10}: " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()))
    counts = ", ".join(f"{ngram_perplexity(length):.2f}" for length in (1, 2, 3))
    print(f"perplexity of unigrams, bigrams and trigrams: {counts}")
    plot(monitor.history).savefig(directory / "language_model.svg")
    print(f"fit: {elapsed:.1f} s, of which {len(monitor.history)} measurements {monitor.seconds['measurements']:.1f} s")
    print(f"Figure: {directory / 'language_model.svg'}\nLogs:   tensorboard --logdir {arguments.output}")


if __name__ == "__main__":
    main()
