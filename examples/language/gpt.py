"""Train a small GPT on bytes of a text. A sample is a window of the text; figure: bits per byte of held-out text.

python examples/language/gpt.py --method ours
"""

import math
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from lightning_ast.recipes import GPT, Comparison, chance, load_text, one_cycle, text_windows

Method = Literal["dense", "shortened", "random", "partial", "ours"]
RUNS = Comparison(
    epochs=6,
    shortened=0.89,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "keep", "target_activation_rate": 0.83, "significance": chance},
        "partial": {"mode": "partial", "target_coverage": 0.9},
        "ours": {"mode": "prune", "target_coverage": 0.9},
    },
)
CONTEXT = 64  # bytes of a sample
TRAIN_BYTES = 200_000
TEST_BYTES = 50_000


class LanguageModel(L.LightningModule):
    """Next-byte prediction: plain Lightning code that knows nothing of selection."""

    def __init__(self, lr: float = 3e-3):
        super().__init__()
        self.lr = lr
        self.net = GPT(context=CONTEXT, width=64, layers=2, heads=4)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten())

    def test_step(self, batch, batch_idx):
        inputs, targets = batch
        nats = F.cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten())
        self.log("bits_per_byte", nats / math.log(2), batch_size=len(inputs))

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1))


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, text: str | None = None) -> dict[str, float]:
    """Train once; return the bits per byte of held-out text, and the work as a share of the dense run's."""
    raw = load_text(text)
    train_set = text_windows(raw[:TRAIN_BYTES], CONTEXT)
    test_set = text_windows(raw[-TEST_BYTES:], CONTEXT)
    loader = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(loader), max_steps=max_steps)
    model = LanguageModel()
    trainer.fit(model, loader)
    (scores,) = trainer.test(model, DataLoader(test_set, batch_size=256), verbose=False)
    return {"bits_per_byte": scores["bits_per_byte"], "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
