"""Train a small GPT on bytes of a text. A sample is a window of the text; figure: bits per byte of held-out text.

python examples/language/gpt.py --method ours
"""

import argparse
import math

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.recipes import GPT, QUIET, chance, counting, load_text, one_cycle, text_windows, work_share

METHODS = ("dense", "shortened", "random", "partial", "ours")
EPOCHS = 6
SHORTENED = 0.89  # of the dense run's steps: the work of "ours"
RANDOM_RATE = 0.83  # the share that "ours" comes to
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


def callbacks(method):
    """Return what differs between the methods: everything else is the same run."""
    stages = TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)
    if method == "ours":
        return [SparseSelectionCallback(mode="prune", target_coverage=0.9), stages]
    if method == "partial":
        return [SparseSelectionCallback(mode="partial", target_coverage=0.9), stages]
    if method == "random":
        rate = {"target_activation_rate": RANDOM_RATE, "significance": chance}
        return [SparseSelectionCallback(mode="prune", prune_steps="keep", **rate), stages]
    return [counting()]


def train(method: str, *, seed: int = 0, max_steps: int = -1, text: str | None = None) -> dict[str, float]:
    """Train once; return the bits per byte of held-out text, and the work as a share of the dense run's."""
    raw = load_text(text)
    train_set = text_windows(raw[:TRAIN_BYTES], CONTEXT)
    test_set = text_windows(raw[-TEST_BYTES:], CONTEXT)
    loader = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
    steps = round(SHORTENED * EPOCHS * len(loader)) if method == "shortened" else max_steps
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=EPOCHS, max_steps=steps, callbacks=callbacks(method), accelerator="auto", **QUIET)
    model = LanguageModel()
    trainer.fit(model, loader)
    (scores,) = trainer.test(model, DataLoader(test_set, batch_size=256), verbose=False)
    return {
        "bits_per_byte": scores["bits_per_byte"],
        "work": work_share(trainer, length=SHORTENED if method == "shortened" else 1),
    }


def main() -> None:
    """Read the arguments, train, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1 trains to the end")
    parser.add_argument("--text", help="a text file, plain or .gz; by default the Jargon File of Debian's jargon-text")
    options = parser.parse_args()
    print(train(options.method, seed=options.seed, max_steps=options.max_steps, text=options.text))


if __name__ == "__main__":
    main()
