"""The callback for the Trainer of transformers: the same comparison, without Lightning."""

from lightning_ntk.huggingface.callback import LinearizationCallback

__all__ = ["LinearizationCallback"]
