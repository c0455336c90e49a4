"""Hugging Face models, whose loss is computed inside the model, in a module as in Lightning's tutorials."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, loader, rows

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Finetuned(pl.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.model(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bert(head: str, **options: Any) -> Finetuned:
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **SMALL, **STILL, **options)
    return Finetuned(getattr(transformers, f"BertFor{head}")(config))


def vit() -> Finetuned:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **SMALL, **STILL)
    return Finetuned(transformers.ViTForImageClassification(config))


def gpt2() -> Finetuned:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, **still)
    return Finetuned(transformers.GPT2LMHeadModel(config))


def t5() -> Finetuned:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return Finetuned(transformers.T5ForConditionalGeneration(config))


def clip() -> Finetuned:
    text = transformers.CLIPTextConfig(vocab_size=50, max_position_embeddings=32, **SMALL)
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **SMALL)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)

    class Clip(Finetuned):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch, return_loss=True).loss

    return Clip(transformers.CLIPModel(config))


def wav2vec_ctc() -> Finetuned:
    config = transformers.Wav2Vec2Config(
        vocab_size=20, **SMALL, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip
    return Finetuned(transformers.Wav2Vec2ForCTC(config))


def samples(**fields: Tensor) -> Any:
    count = len(next(iter(fields.values())))
    return loader([{name: values[i] for name, values in fields.items()} for i in range(count)])


def tokens(**labels: Tensor) -> Any:
    ids = torch.randint(5, 50, (256, 16))
    mask = torch.ones_like(ids)
    mask[::3, 10:] = 0
    return samples(input_ids=ids, attention_mask=mask, **labels)


def masked_tokens() -> Tensor:
    labels = torch.randint(5, 50, (256, 16))
    labels[torch.rand(256, 16) > 0.3] = -100
    return labels


def images(**more: Tensor) -> Any:
    channels = 3 if more else 1
    pixels = torch.rand(256, channels, 8, 8)
    return samples(pixel_values=pixels, **(more or {"labels": torch.randint(0, 10, (256,))}))


CASES = {
    "BertForSequenceClassification": Case(
        lambda: bert("SequenceClassification", num_labels=3), lambda: tokens(labels=torch.randint(0, 3, (256,)))
    ),
    "BertForSequenceClassification, regression": Case(
        lambda: bert("SequenceClassification", num_labels=1), lambda: tokens(labels=torch.rand(256))
    ),
    "BertForTokenClassification": Case(
        lambda: bert("TokenClassification", num_labels=50), lambda: tokens(labels=masked_tokens())
    ),
    "BertForMaskedLM": Case(lambda: bert("MaskedLM"), lambda: tokens(labels=masked_tokens())),
    "BertForMultipleChoice": Case(
        lambda: bert("MultipleChoice"),
        lambda: samples(input_ids=torch.randint(5, 50, (256, 4, 8)), labels=torch.randint(0, 4, (256,))),
    ),
    "BertForQuestionAnswering": Case(
        lambda: bert("QuestionAnswering"),
        lambda: tokens(start_positions=torch.randint(0, 5, (256,)), end_positions=torch.randint(5, 10, (256,))),
    ),
    "ViTForImageClassification": Case(vit, images),
    "GPT2LMHeadModel": Case(gpt2, lambda: tokens(labels=torch.randint(0, 50, (256, 16)))),
    "T5ForConditionalGeneration": Case(t5, lambda: tokens(labels=torch.randint(0, 50, (256, 12)))),
    "CLIPModel": Case(clip, lambda: images(input_ids=torch.randint(0, 49, (256, 8)))),
    "Wav2Vec2ForCTC": Case(
        wav2vec_ctc,
        lambda: samples(input_values=torch.randn(64, 800), labels=torch.randint(1, 20, (64, 4))),
    ),
}


@rows("transformers")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
