"""The Lightning callback."""

from lightning_ntk.callback.monitor import LinearizationMonitor

__all__ = ["LinearizationMonitor"]
