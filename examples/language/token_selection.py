"""Select tokens inside the loss, as Rho-1 does (arXiv 2404.07965): those that a reference model finds easier.

    python examples/language/token_selection.py --method ours

The first quarter of the text to train on is clean. In the rest the bytes of every second window are shuffled, so that
nothing can be learned from their order. The reference model was trained on the clean quarter alone. The significance
of a token is its excess loss: its loss under the model less its loss under the reference. The other tokens get no
gradient, as in `mode="mask"`. This saves no compute: forward and backward run over all tokens, and the reference model
costs extra.
"""

import math
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import SampleSelector
from lightning_ast.recipes import GPT, QUIET, counting, load_text, one_cycle, text_windows, work_share

Method = Literal["dense", "reference", "random", "loss", "ours", "ours_at_0.8"]
EPOCHS = 4
REFERENCE_EPOCHS = 4
CONTEXT = 64  # bytes of a sample
CLEAN_BYTES = 50_000
TRAIN_BYTES = 200_000  # the clean ones included
TEST_BYTES = 50_000
TOKEN_RATE = 0.6  # the share of the tokens of a batch that the gradient is taken of


class LanguageModel(L.LightningModule):
    """Next-byte prediction, with a gradient from the selected tokens alone."""

    def __init__(self, method: str = "dense", lr: float = 3e-3):
        super().__init__()
        self.method = method
        self.lr = lr
        self.net = GPT(context=CONTEXT, width=64, layers=2, heads=4)
        rate = 0.8 if method == "ours_at_0.8" else TOKEN_RATE
        self.selector = SampleSelector(target_activation_rate=rate, gate="topk")

    def token_losses(self, inputs, targets):
        """Return the loss of each token, ``(B, T)``."""
        return F.cross_entropy(self.net(inputs).transpose(1, 2), targets, reduction="none")

    def training_step(self, batch, batch_idx):
        inputs, targets, reference = batch
        losses = self.token_losses(inputs, targets)
        if self.method in ("dense", "reference"):
            return losses.mean()
        others = {"loss": losses.detach(), "random": torch.rand_like(losses)}
        significance = others.get(self.method, losses.detach() - reference).flatten()
        kept = self.selector.select(significance - significance.min()).indices  # tokens in order: the offset is free
        return losses.flatten()[kept].mean()

    def test_step(self, batch, batch_idx):
        self.log("bits_per_byte", self.token_losses(*batch).mean() / math.log(2), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1))


def partly_spoiled(windows: TensorDataset, *, clean: int) -> TensorDataset:
    """Shuffle the bytes of every second window behind the first ``clean`` ones."""
    inputs, targets = windows.tensors
    text = torch.cat([inputs, targets[:, -1:]], dim=1)
    order = torch.rand(text.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    text[clean::2] = text.gather(1, order)[clean::2]
    return TensorDataset(text[:, :-1], text[:, 1:])


def fit(model: LanguageModel, windows: TensorDataset, reference: torch.Tensor, *, epochs: int, max_steps: int):
    """Train on windows with the reference's losses beside them; return the trainer."""
    trainer = L.Trainer(max_epochs=epochs, max_steps=max_steps, callbacks=[counting()], **QUIET)
    data = TensorDataset(*windows.tensors, reference)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True, drop_last=True))
    return trainer


def token_losses(model: LanguageModel, windows: TensorDataset) -> torch.Tensor:
    """Return the losses of all tokens, ``(N, T)``, under a trained model."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model.token_losses(*batch) for batch in DataLoader(windows, batch_size=256)])


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, text: str | None = None) -> dict[str, float]:
    """Train once; return the bits per byte of clean held-out text, and the work as a share of the dense run's."""
    raw = load_text(text)
    clean = text_windows(raw[:CLEAN_BYTES], CONTEXT)
    windows = partly_spoiled(text_windows(raw[:TRAIN_BYTES], CONTEXT), clean=len(clean))
    test_set = text_windows(raw[-TEST_BYTES:], CONTEXT)
    reference = torch.zeros(windows.tensors[0].shape)
    work = 0.0
    L.seed_everything(seed, verbose=False)
    model = LanguageModel(method)
    if method in ("reference", "ours", "ours_at_0.8"):
        teacher = model if method == "reference" else LanguageModel()
        trainer = fit(teacher, clean, reference[: len(clean)], epochs=REFERENCE_EPOCHS, max_steps=max_steps)
        work = work_share(trainer, length=len(clean) * REFERENCE_EPOCHS / (len(windows) * EPOCHS))
    if method.startswith("ours"):
        reference = token_losses(teacher, windows)
        work += 1 / 3 / EPOCHS  # one forward of three, once
    if method != "reference":
        trainer = fit(model, windows, reference, epochs=EPOCHS, max_steps=max_steps)
        work += work_share(trainer)
    (scores,) = trainer.test(model, DataLoader(test_set, batch_size=256), verbose=False)
    return {"bits_per_byte": scores["bits_per_byte"], "work": work}


if __name__ == "__main__":
    print(auto_cli(train))
