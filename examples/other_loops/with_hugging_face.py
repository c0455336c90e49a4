"""Adaptive sparse training in Hugging Face's Trainer: a small BERT reads the pixels of digits as words, two minutes."""

import tempfile
from typing import Literal

import torch
from jsonargparse import auto_cli
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images

Method = Literal["dense", "ours"]
STEPS = 300


class SparseTrainer(Trainer):
    """A Trainer that opens the gate before each backward of training; everything else is Hugging Face's."""

    def __init__(self, *args, gate, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = gate
        self.selected = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.gate.trace(inputs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.gate.open(loss, batch_size=len(inputs["labels"]))
        return loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.selected += len(self.gate.selection.indices)
        return loss


def words(images, labels):
    """Return the samples of images of 8 x 8 pixels as 64 words of 17 kinds."""
    pixels = (images.flatten(1).long() * 16) // 255
    return [{"input_ids": each, "labels": label} for each, label in zip(pixels, labels, strict=True)]


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1) -> dict[str, float]:
    """Train once; return the test accuracy, and the share of the samples that the backward ran over."""
    digits = load_images("digits")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    steps = STEPS if max_steps < 0 else max_steps
    batches = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 360}
    schedule = {"max_steps": steps, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "seed": seed}
    silent = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SparseTrainer(
            BertForSequenceClassification(BertConfig(vocab_size=17, num_labels=10, **sizes)),
            TrainingArguments(folder, use_cpu=True, dataloader_drop_last=True, **batches, **schedule, **silent),
            train_dataset=words(digits.train_images, digits.train_labels),
            eval_dataset=words(digits.test_images, digits.test_labels),
            compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
            gate=GradientGate(SampleSelector(target_coverage=0.9 if method == "ours" else 1.0)),
        )
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    return {"test_accuracy": float(accuracy), "trained_on": trainer.selected / (64 * steps)}


if __name__ == "__main__":
    print(auto_cli(train))
