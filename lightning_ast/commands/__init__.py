"""What the commands of ``lightning-ast`` share: LightningCLI with errors of one line, and its saved configuration."""

from lightning_ast.commands.messages import UsageError

__all__ = ["UsageError"]
