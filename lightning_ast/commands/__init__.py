"""The shared parts of the commands: LightningCLI with errors of one line, and its saved configuration."""

from lightning_ast.errors import UsageError

__all__ = ["UsageError"]
