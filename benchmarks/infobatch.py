"""InfoBatch's rule beside ours, on the same model, data and schedule.

Each epoch drops a random half of the samples whose remembered loss is below the mean and doubles the loss of the other
half; the last eighth of the run is on all samples. Its epochs' lengths are not known before, so the one-cycle
schedule follows the share of the run that is done instead of a number of steps.
Source: Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning, ICLR 2024, arXiv 2303.04947.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast.demo import ImageData, ResNet9

PRUNE_RATIO = 0.5
PRUNED_SHARE = 0.875
_CYCLE = 10_000


class InfoBatchData(ImageData):
    """Images whose loader of each epoch (``reload_dataloaders_every_n_epochs=1``) holds the samples that are left."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not hasattr(self, "scores"):
            self.scores = torch.ones(len(self.images.train_labels))

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        size = len(self.scores)
        self.weights = torch.ones(size)
        kept = torch.ones(size, dtype=torch.bool)
        if trainer.current_epoch < PRUNED_SHARE * trainer.max_epochs:
            learned = self.scores < self.scores.mean()
            kept = ~learned | (torch.rand(size) >= PRUNE_RATIO)
            self.weights[learned] = 1 / (1 - PRUNE_RATIO)
        order = kept.nonzero().squeeze(1)
        self.order = order[torch.randperm(len(order))]
        loader = super().train_dataloader()
        return DataLoader(
            loader.dataset,
            batch_size=self.batch_size,
            sampler=self.order.tolist(),
            collate_fn=loader.collate_fn,
            drop_last=True,
        )


class InfoBatchResNet9(ResNet9):
    """A module with rescaled losses, remembered losses, and a schedule by progress."""

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        data: Any = self.trainer.datamodule
        images, labels = batch
        indices = data.order[batch_idx * data.batch_size :][: len(labels)]
        losses = F.cross_entropy(self(images), labels, reduction="none")
        data.scores[indices] = losses.detach().cpu()
        return losses * data.weights[indices].to(losses.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=_CYCLE, pct_start=self.warmup_share, anneal_strategy="linear"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        loop = self.trainer.fit_loop
        done = (self.trainer.current_epoch + (loop.batch_idx + 1) / loop.max_batches) / self.trainer.max_epochs
        scheduler.last_epoch = min(_CYCLE - 1, round(done * (_CYCLE - 1))) - 1
        scheduler.step()
