"""What the commands of ``lightning-ast`` share: LightningCLI with errors of one line, and its saved configuration."""

__all__: list[str] = []
