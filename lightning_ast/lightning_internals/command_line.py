"""LightningCLI with its private steps as public methods, for a command line that has errors of its own to add."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

__all__ = ["OpenCLI"]


class OpenCLI(LightningCLI):
    """LightningCLI whose private steps may be overridden by name; each does what Lightning's does."""

    def read_checkpoint_arguments(self) -> None:
        """Take the hyperparameters of ``ckpt_path`` as arguments of the module."""
        super()._parse_ckpt_path()

    def set_seed(self) -> None:
        """Do what ``seed_everything`` asks for."""
        super()._set_seed()

    def run_command(self, name: str) -> None:
        """Call the Trainer's method of this name."""
        super()._run_subcommand(name)

    def _parse_ckpt_path(self) -> None:  # Lightning 2.5.0 has no such step, and never calls this
        self.read_checkpoint_arguments()

    def _set_seed(self) -> None:
        self.set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)
