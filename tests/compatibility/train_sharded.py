"""Two processes that train with DDP and with FSDP2, one run after another; Lightning starts the second by this script."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo.data import load_images

MODES = ("mask", "subset", "partial", "prune")
STRATEGIES = ("ddp", "fsdp2", "fsdp2-root")
EPOCHS = 3


class Net(L.LightningModule):
    """Two blocks and a head on digits; FSDP2 gathers the parameters of each at its own time."""

    def __init__(self, shards: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shards = shards
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(2)]
        self.net = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 10))

    def configure_model(self) -> None:
        """Shard the parameters of each block, and with ``"fsdp2-root"`` what is left as well."""
        if self.shards == "ddp" or isinstance(next(self.parameters()), DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.net[1:]:
            fully_shard(block, mesh=mesh)
        if self.shards == "fsdp2-root":
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def strategy_of(name: str) -> Strategy | str:
    """Return a strategy for two processes."""
    return "ddp" if name == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def whole(value: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def trained(mode: str, shards: str, *, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    """Train a network; return what both strategies must agree on."""
    images = load_images("digits")
    data = TensorDataset(images.train_images[:128].float() / 255, images.train_labels[:128])
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.5)  # type: ignore[arg-type]
    callbacks = [selection, TwoStageScheduler(warmup_epochs=1), *options.pop("callbacks", [])]
    trainer = L.Trainer(
        **{"enable_checkpointing": False, "strategy": strategy_of(shards), **options},
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net(shards)
    trainer.fit(module, DataLoader(data, batch_size=16), ckpt_path=ckpt_path)
    sparse = selection.ledger.stages["sparse"]
    return {
        "weights": {name: whole(value) for name, value in module.named_parameters()},
        "selected": sparse.selected,
        "offered": sparse.offered,
        "threshold": float(selection.threshold),
        "dense_ops": dict(selection.dense_ops),
    }


def refused_with_layers_split() -> str:
    """Return the words with which tensor parallelism is refused."""
    try:
        trained("prune", "fsdp2", strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2))
    except Exception as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Train all, and write what was found on each process."""
    warnings.simplefilter("ignore")
    found: dict[Any, Any] = {}
    for mode in MODES:
        for strategy in STRATEGIES:
            found[mode, strategy] = trained(mode, strategy)
    for strategy in ("ddp", "fsdp2"):
        found["accumulated", strategy] = trained("partial", strategy, accumulate_grad_batches=2)
        found["bf16", strategy] = trained("prune", strategy, precision="bf16-mixed")
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    found["saving"] = trained("prune", "fsdp2", callbacks=[keep], enable_checkpointing=True)
    found["resumed"] = trained("prune", "fsdp2", ckpt_path=str(folder / "step=6.ckpt"))
    found["split"] = refused_with_layers_split()
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
