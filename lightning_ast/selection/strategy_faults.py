"""Strategies of Lightning that no mode can be combined with: each is found before the first batch, with the reason."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy

from lightning_ast.lightning_internals.run_limits import accumulation

__all__ = ["strategy_faults"]


def strategy_faults(trainer: pl.Trainer) -> list[str]:
    """Find what is wrong with how the trainer spreads a step over its processes."""
    strategy = trainer.strategy
    found = []
    if isinstance(strategy, ParallelStrategy) and trainer.world_size > 1:
        parts = strategy.distributed_sampler_kwargs["num_replicas"]
        if parts != trainer.world_size:
            found.append(
                f"{type(strategy).__name__} splits layers over processes (tensor parallelism): {trainer.world_size} "
                f"processes share {parts} part(s) of the data, and those with the same samples would each select "
                f"others. Set data_parallel_size={trainer.world_size} and tensor_parallel_size=1, and shard the "
                "parameters with fully_shard."
            )
    if isinstance(strategy, DeepSpeedStrategy):
        if strategy.zero_stage_3:
            found.append(
                "DeepSpeed's stage 3 gathers the parameters within the forward, by a way that no test here can run: "
                "use stage=1 or 2, or ModelParallelStrategy with fully_shard, which shards the parameters too."
            )
        if max(accumulation(trainer).values()) > 1:
            found.append(
                "DeepSpeed accumulates gradients out of sight, so micro-batches that keep different numbers of samples "
                "cannot be weighted alike: set accumulate_grad_batches=1, or use DDP or FSDP2."
            )
    return found
