"""``advise`` for a configuration of LightningCLI: the file that ``lightning-ast fit --config`` takes, as it is."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lightning_ast.advice import advise, render

__all__ = ["advise_command"]


def advise_command(arguments: list[str], *, budget_seconds: float) -> None:
    """Run ``lightning-ast advise`` with the arguments of ``fit``; print the report."""
    cli = _configured(arguments)
    advice = advise(cli.trainer, cli.model, cli.datamodule, budget_seconds=budget_seconds)
    if cli.remark is not None:
        sys.stdout.write(f"{cli.remark}\n")
    render(advice)


def _configured(arguments: list[str]) -> Any:
    """Make everything that ``fit`` would make of the arguments, for one device, with nothing that writes files."""
    from lightning.pytorch.loggers.logger import DummyLogger

    from lightning_ast.commands.fit import CommandLine

    class Configured(CommandLine):
        remark: str | None = None

        def before_instantiate_classes(self) -> None:
            """Ask for one device: what is measured is one process."""
            trainer = self.config["fit"]["trainer"]
            asked = {name: trainer[name] for name in ("devices", "num_nodes", "strategy")}
            devices = asked["devices"]
            if devices in ("auto", "-1", -1):
                several = torch.accelerator.device_count() > 1
            else:
                several = len(devices) > 1 if isinstance(devices, list) else devices not in (None, 1, "1")
            if several or (asked["num_nodes"] or 1) > 1:
                self.remark = (
                    f"The configuration asks for devices={asked['devices']!r}, num_nodes={asked['num_nodes']!r}: what "
                    "follows is for one device, with the whole training data."
                )
            asked_loggers = trainer["logger"]
            self.loggers = len(asked_loggers) if isinstance(asked_loggers, list) else int(asked_loggers is not False)
            trainer["devices"] = trainer["num_nodes"] = 1
            for name in ("logger", "enable_progress_bar", "enable_model_summary"):
                trainer[name] = False
            # other strategies (FSDP, DeepSpeed) are what is to be measured, or refuse one device in their own words
            if str(asked["strategy"]).startswith("ddp"):
                trainer["strategy"] = "auto"

        def after_instantiate_classes(self) -> None:
            """Put loggers that take everything and write nothing."""
            # as many as were asked for: modules write to `self.logger`, or to one of `self.loggers` by its number
            self.trainer.loggers = [DummyLogger() for _ in range(self.loggers)]

        def run_command(self, name: str) -> None:
            """Train nothing."""

    return Configured(["fit", *arguments], save_config_callback=None)
