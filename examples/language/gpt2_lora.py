"""Fine-tune GPT-2 with LoRA on questions and answers from a stream: adapters alone learn, the loss is on the answers.

    python examples/language/gpt2_lora.py --method ours
    python examples/language/gpt2_lora.py --model ./gpt2        # a folder that save_pretrained wrote, or gpt2

The questions are made of the entries of the Jargon File ("What is cruft?"). Without `--model` a tiny GPT-2 over bytes
is first trained on the plain text, so that no weights need to be downloaded; its cost is not counted.
"""

import math
import random
import re
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, IterableDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.recipes import QUIET, counting, load_text, one_cycle, text_windows, work_share

Method = Literal["dense", "shortened", "ours"]
STEPS = 200
SHORTENED = 0.96  # of the dense run's steps: the work of "ours"
PRETRAINING_STEPS = 200
CONTEXT = 128  # tokens of a sample
RANK = 8


class Questions(IterableDataset):
    """An endless stream of questions with their answers, in the form of Hugging Face's models."""

    def __init__(self, entries, encode, seed=0):
        self.entries = entries
        self.encode = encode
        self.seed = seed

    def sample(self, term, answer):
        question = self.encode(f"Q: What is {term}?\nA: ")
        tokens = (question + self.encode(answer))[:CONTEXT]
        rest = CONTEXT - len(tokens)
        labels = [-100] * len(question) + tokens[len(question) :]  # nothing is learned of the question
        values = {"input_ids": tokens + [0] * rest, "labels": labels[:CONTEXT] + [-100] * rest}
        values["attention_mask"] = [1] * len(tokens) + [0] * rest
        return {name: torch.tensor(value) for name, value in values.items()}

    def __iter__(self):
        order = random.Random(self.seed)
        while True:
            yield self.sample(*order.choice(self.entries))


class FineTuned(L.LightningModule):
    """Any causal language model of transformers: the loss is the model's own."""

    def __init__(self, model, lr=3e-3):
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def test_step(self, batch, batch_idx):
        self.log("bits_per_token", self.model(**batch).loss / math.log(2), batch_size=int((batch["labels"] >= 0).sum()))

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr))


def base_model(path, raw):
    """Load a model and its tokenizer, or train a tiny GPT-2 over bytes on the plain text."""
    if path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        return model.train(), tokenizer.encode  # loaded models are in evaluation mode, without dropout
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **still, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(text_windows(raw[:400_000], CONTEXT), batch_size=16, shuffle=True, drop_last=True)
    for (inputs, targets), _ in zip(loader, range(PRETRAINING_STEPS), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    return model, lambda text: list(text.encode())


def train(
    method: Method = "ours", *, seed: int = 0, max_steps: int = -1, text: str | None = None, model: str | None = None
):
    """Train once; return the bits per token of the answers to held-out questions, and the work of the fine-tuning."""
    import peft  # of the extra "recipes"

    raw = load_text(text)
    entries = re.findall(
        r"^ {3}:([^:\n]+):.*\n\n((?: {3}.+\n|\n(?! {3}:))+)", raw.decode(errors="replace"), re.MULTILINE
    )
    entries = [(term, " ".join(answer.split())) for term, answer in entries]
    random.Random(0).shuffle(entries)
    L.seed_everything(seed, verbose=False)
    base, encode = base_model(model, raw)
    lora = peft.LoraConfig(r=RANK, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    tuned = FineTuned(peft.get_peft_model(base, lora))
    steps = round(SHORTENED * STEPS) if method == "shortened" else STEPS
    stages = TwoStageScheduler(warmup_epochs=0.1)  # a share of max_steps: a stream has no epochs
    sparse = [SparseSelectionCallback(mode="partial", target_coverage=0.9), stages]
    callbacks = sparse if method == "ours" else [counting()]
    trainer = L.Trainer(max_steps=steps if max_steps < 0 else max_steps, callbacks=callbacks, **QUIET)
    trainer.fit(tuned, DataLoader(Questions(entries[100:], encode, seed), batch_size=32))
    held_out = [Questions(entries, encode).sample(*entry) for entry in entries[:100]]
    (scores,) = trainer.test(tuned, DataLoader(held_out, batch_size=50), verbose=False)
    return {
        "bits_per_token": scores["bits_per_token"],
        "work": work_share(trainer, length=SHORTENED if method == "shortened" else 1),
    }


if __name__ == "__main__":
    print(auto_cli(train))
