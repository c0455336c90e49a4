"""What the commands of ``lightning-ast`` share: LightningCLI with errors of one line, and its saved configuration."""

from lightning_ast.errors import UsageError

__all__ = ["UsageError"]
