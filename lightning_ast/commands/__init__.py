"""The shared parts of the commands: LightningCLI with errors of one line."""

__all__: list[str] = []
