"""LightningCLI whose private steps tell in a line what is wrong, and which runs a command by a public method."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

from lightning_ast.errors import UsageError

__all__ = ["OpenCLI"]


class OpenCLI(LightningCLI):
    """LightningCLI that refuses a bad checkpoint and a bad seed by name; ``run_command`` may be overridden."""

    def run_command(self, name: str) -> None:
        """Call the Trainer's method of this name."""
        super()._run_subcommand(name)

    def _parse_ckpt_path(self) -> None:  # Lightning 2.5.0 has no such step, and never calls this
        try:
            super()._parse_ckpt_path()
        except UsageError as error:
            raise UsageError(f"ckpt_path: the checkpoint was saved with other hyperparameters: {error}") from error
        except Exception as error:
            raise UsageError(f"ckpt_path: expected a checkpoint of a Trainer, got {type(error).__name__}") from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UsageError(f"seed_everything: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)
