"""A LightningCLI project as the objective: parameters override its options."""

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ntk.sweep.configurations import Configuration, configuration_key
from lightning_ntk.sweep.objective import add_to_path, import_path

if TYPE_CHECKING:  # seconds, which `status` and `table` need not wait for
    from lightning_ntk.callback.monitor import LinearizationMonitor

_LONGEST_NAME = 100


@dataclass(frozen=True)
class CommandLineObjective:
    """Runs a LightningCLI's `fit` with parameters such as `model.init_args.width` as options.

    A `LinearizationMonitor` is added to the Trainer's callbacks if the configuration has none. Each configuration gets its own
    `trainer.default_root_dir`, so that logs and checkpoints do not collide.
    """

    config: tuple[str, ...]  # the files of `python main.py fit --config ...`; later ones override earlier ones
    # Import paths of the LightningModule and the LightningDataModule. None: the configuration names them by `class_path`.
    model: str | None = None
    data: str | None = None
    cli: str | None = None  # import path of a subclass of LightningCLI
    directory: str = "sweep.runs"  # of logs and checkpoints
    search: str = "."  # the directory of modules and files

    def __post_init__(self) -> None:
        if not self.config:
            raise ValueError("Expected at least one configuration file for the LightningCLI but got none.")
        for file in self.config:
            if not Path(self.search, file).is_file():
                raise FileNotFoundError(f"Expected a configuration file of LightningCLI at {Path(self.search, file)}.")

    @property
    def identity(self) -> str:
        """The name under which results are stored."""
        return f"LightningCLI {' '.join(Path(file).name for file in self.config)}"

    def root(self, configuration: Configuration) -> Path:
        """The directory for a configuration's logs and checkpoints.

        TensorBoard shows it as the name of the run.
        """
        settings = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in configuration.items())
        # Settings may be long, and differ only in what a file name cannot have.
        name = re.sub(r"[^-+.,=\w]", "_", settings)[:_LONGEST_NAME]
        digest = hashlib.sha256(configuration_key(configuration).encode()).hexdigest()[:8]
        return Path(self.search, self.directory, f"{name}-{digest}")

    def arguments(self, configuration: Configuration) -> list[str]:
        """The arguments of the command line."""
        files = [f"--config={Path(self.search, file)}" for file in self.config]
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in configuration.items()}
        root = {"trainer.default_root_dir": str(self.root(configuration))}
        return ["fit", *files, *(f"--{name}={value}" for name, value in {**root, **values}.items())]

    def __call__(self, configuration: Configuration) -> "LinearizationMonitor":
        """Trains for one configuration."""
        from jsonargparse import ArgumentError
        from lightning.pytorch.cli import LightningCLI

        from lightning_ntk.callback.monitor import LinearizationMonitor

        add_to_path(self.search)
        base: Any = LightningCLI if self.cli is None else import_path(self.cli, self.search)
        model, data = (path and import_path(path, self.search) for path in (self.model, self.data))
        monitors: list[LinearizationMonitor] = []

        class SweepCLI(base):  # type: ignore[misc]
            def before_fit(self) -> None:
                if hasattr(super(), "before_fit"):
                    super().before_fit()
                monitors.extend(c for c in self.trainer.callbacks if isinstance(c, LinearizationMonitor))
                if not monitors:
                    monitors.append(LinearizationMonitor(progress=False))
                    # First, so that checkpoints and early stopping see its values.
                    self.trainer.callbacks.insert(0, monitors[0])

        # By default jsonargparse ends the process at a wrong option, in the subcommand too.
        raising = {"exit_on_error": False, "fit": {"exit_on_error": False}}
        try:
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # sys.argv is the sweep's
            SweepCLI(model, data, args=self.arguments(configuration), save_config_callback=None, parser_kwargs=raising)
        except ArgumentError as error:
            classless = self.model is None and "'lightning.LightningModule'" in str(error)
            raise ValueError(
                f"Expected a configuration and parameters that the LightningCLI knows but got {configuration}: "
                + ("no class of the model is named, by `class_path` in it or as `model` of lightning_cli. " * classless)
                + str(error)
            ) from error
        if len(monitors) > 1:
            raise ValueError(
                f"Expected at most one LinearizationMonitor among the callbacks of the Trainer but there are {len(monitors)}."
            )
        return monitors[0]
