"""The Lightning callback; with sweep/lightning_cli the only place that imports lightning."""

from lightning_ntk.callback.monitor import LinearizationMonitor

__all__ = ["LinearizationMonitor"]
