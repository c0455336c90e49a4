"""Adaptive sparse training in Hugging Face's Trainer: a small BERT reads the pixels of digits as words, two minutes."""

import tempfile
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images


class SparseTrainer(Trainer):
    """A Trainer that opens the gate before each backward of training; everything else is Hugging Face's."""

    def __init__(self, *args: Any, gate: GradientGate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = gate
        self.offered = 0
        self.selected = 0

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, with the gate where its gradient enters the network."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.gate.trace(inputs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        size = len(inputs["labels"])
        self.gate.open(loss, batch_size=size)
        self.offered += size
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Count the samples that were trained on."""
        loss = super().training_step(*args, **kwargs)
        self.selected += len(self.gate.selection.indices)
        return loss


class Words(Dataset):
    """Images of 8 x 8 pixels as 64 words of 17 kinds."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.words = (images.flatten(1).long() * 16) // 255
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def main(max_steps: int = 300) -> None:
    """Train, and print the accuracy and the share of the samples that were trained on."""
    digits = load_images("digits")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=17, num_labels=10, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=360,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = SparseTrainer(
            model,
            settings,
            train_dataset=Words(digits.train_images, digits.train_labels),
            eval_dataset=Words(digits.test_images, digits.test_labels),
            compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
            gate=GradientGate(SampleSelector(target_coverage=0.9)),
        )
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    share = trainer.selected / trainer.offered
    print(f"accuracy {accuracy:.2%}, trained on {share:.1%} of the samples")


if __name__ == "__main__":
    auto_cli(main)
