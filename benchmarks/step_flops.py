"""FLOPs of whole training steps, scoring included, as shares of dense: measured beside the cost model.

    python benchmarks/step_flops.py

Counts every operation of the run with torch's FlopCounterMode (not the ledger): ResNet-9 on digits. RowOps shows it the
row-sized ops of `partial`. Writes a record.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from record import QUIET, provenance, save
from torch.utils.flop_counter import FlopCounterMode

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import RowOps, cost_share
from lightning_ast.demo import ImageData, ResNet9

STEPS = 20


def flops(callback: SparseSelectionCallback | None) -> int:
    """Count all FLOPs of a run of 20 steps."""
    pl.seed_everything(0, verbose=False)
    model = ResNet9(1, width=16)
    data = ImageData("digits", batch_size=128)
    trainer = pl.Trainer(
        max_steps=STEPS,
        limit_val_batches=0,
        accelerator="cpu",
        callbacks=[] if callback is None else [callback],
        **QUIET,
    )
    with FlopCounterMode(display=False) as counter, RowOps():
        trainer.fit(model, datamodule=data)
    return counter.get_total_flops()


def main() -> None:
    """Measure, print, write the record."""
    dense = flops(None)
    rows: list[dict[str, Any]] = []
    for mode in ("mask", "subset", "partial"):
        for rate in (0.4, 0.1):
            callback = SparseSelectionCallback(target_activation_rate=rate, mode=mode)
            share = flops(callback) / dense
            saved = callback.savings["flops"]
            assert saved is not None
            observed = callback.ledger.selected / callback.ledger.offered
            rows.append(
                {
                    "mode": mode,
                    "target": rate,
                    "observed_rate": round(observed, 4),
                    "measured_share": round(share, 4),
                    "ledger_share": round(1 - saved, 4),
                    "formula_share": round(cost_share(mode, rate), 4),
                    "formula_at_observed_rate": round(cost_share(mode, observed), 4),
                }
            )
            print(rows[-1])
    record = {
        "benchmark": "step-flops",
        "model": "ResNet-9, width 16, digits 8x8, B=128",
        "steps": STEPS,
        "rows": rows,
        **provenance(),
    }
    save(record, "step-flops", indent=1)


if __name__ == "__main__":
    main()
