"""What the callback does with LightningModules that others wrote: the table that the tests here hold it to.

``exact``: the gradient is that of the module's own loss over the selected samples, to rounding. ``approximate``: it
trains on the selected rows of the gradient, but the loss is one of the whole batch (contrastive, Dice), or BatchNorm
(``partial``: its backward; ``subset``: its forward too) or draws of a whole batch (dropout, masks, mixup) see other
samples than an exact masking would. ``refused``: before or at the first batch, with a message that matches.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["OUTCOMES", "Outcome"]

ALL = ("mask", "subset", "partial", "prune")
CONTRASTIVE = "contrastive: a sample's rows follow the others too"
STATE = "failed on the .* selected samples alone"


class Outcome(NamedTuple):
    """One row.

    Attributes:
        package: as on PyPI.
        module: key of the case in this package's test file.
        modes: in which the row holds.
        outcome: ``"exact"``, ``"approximate"`` or ``"refused"``.
        note: for people: why, and what to do.
        message: regular expression that the refusal matches.
        dense: whether some op of the backward has no row rule in ``partial``; None where it depends on the batch.
        own_mean: Whether the loss is a mean over tokens, pixels or nodes: in ``subset`` the step divides by those of
            the selected samples, so that its gradient is that of ``mask`` up to a factor.
    """

    package: str
    module: str
    modes: tuple[str, ...]
    outcome: str
    note: str = ""
    message: str = ""
    dense: bool | None = False
    own_mean: bool = False


def _batchnorm(package: str, module: str, note: str = "BatchNorm", *, dense: bool = False) -> list[Outcome]:
    return [
        Outcome(package, module, ("mask", "prune"), "exact"),
        Outcome(package, module, ("subset", "partial"), "approximate", note, dense=dense),
    ]


def _drawn(package: str, module: str, note: str) -> list[Outcome]:
    return [
        Outcome(package, module, ("mask", "partial", "prune"), "exact"),
        Outcome(package, module, ("subset",), "approximate", note),
    ]


def _dense(package: str, module: str, note: str) -> list[Outcome]:
    return [
        Outcome(package, module, ("mask", "subset", "prune"), "exact"),
        Outcome(package, module, ("partial",), "exact", note, dense=True),
    ]


def _own_mean(package: str, module: str, of: str, note: str = "", *, dense: bool = False) -> list[Outcome]:
    by_rows = ("mask", "prune") if dense else ("mask", "partial", "prune")
    return [
        Outcome(package, module, by_rows, "exact", note),
        *([Outcome(package, module, ("partial",), "exact", f"{note}; goes dense", dense=True)] if dense else []),
        Outcome(package, module, ("subset",), "exact", f"divides by the {of} of the selected samples", own_mean=True),
    ]


def _of_batch(package: str, module: str, note: str = "a loss of the whole batch") -> Outcome:
    return Outcome(package, module, ALL, "approximate", note)


def _refused(package: str, module: str, message: str, note: str, modes: tuple[str, ...] = ALL) -> Outcome:
    return Outcome(package, module, modes, "refused", note, message)


_SMP, _TF, _LIGHTLY, _TU, _GEO = (
    "segmentation-models-pytorch",
    "transformers",
    "lightly",
    "torch-uncertainty",
    "torchgeo",
)
_PF, _TAB, _SCVI = "pytorch-forecasting", "pytorch-tabular", "scvi-tools"

OUTCOMES: list[Outcome] = [
    Outcome("lightning", "BoringModel", ALL, "exact"),
    Outcome("lightning", "ManualOptimBoringModel", ALL, "exact", "manual optimization"),
    Outcome("lightning", "DemoModel", ALL, "exact", "its loss is a sum"),
    *_drawn("lightning", "LightningTransformer", "dropout is drawn for the selected samples"),
    Outcome("lightning", "LightningLSTM", ("mask",), "exact", "hidden state across batches"),
    Outcome("lightning", "LightningLSTM", ("partial",), "exact", "the recurrent layer goes dense", dense=True),
    Outcome("lightning", "LightningLSTM", ("prune",), "exact", "but a hidden state means nothing in pruned batches"),
    _refused("lightning", "LightningLSTM", STATE, "its hidden state has the full batch's size", ("subset",)),
    _of_batch("lightning tutorials", "GAN", "what the generator draws belongs to no sample: it stays whole"),
    *_batchnorm(_SMP, "Unet, CrossEntropyLoss"),
    _of_batch(_SMP, "Unet, DiceLoss"),
    _of_batch(_SMP, "Unet, JaccardLoss"),
    *_batchnorm(_SMP, "Unet, SoftCrossEntropyLoss"),
    *_batchnorm(_SMP, "Unet, SoftBCEWithLogitsLoss"),
    *_batchnorm(_SMP, "Unet, FocalLoss"),
    Outcome(_TF, "BertForSequenceClassification", ALL, "exact"),
    Outcome(_TF, "BertForSequenceClassification, regression", ALL, "exact"),
    *_own_mean(_TF, "BertForTokenClassification", "tokens", "labels of -100 count for nothing"),
    *_own_mean(_TF, "BertForMaskedLM", "masked tokens"),
    Outcome(_TF, "BertForMultipleChoice", ALL, "exact"),
    Outcome(_TF, "BertForQuestionAnswering", ALL, "exact", "two losses"),
    Outcome(_TF, "ViTForImageClassification", ALL, "exact"),
    Outcome(_TF, "GPT2LMHeadModel", ALL, "exact"),
    Outcome(_TF, "T5ForConditionalGeneration", ALL, "exact"),
    _of_batch(_TF, "CLIPModel", CONTRASTIVE),
    Outcome(_TF, "Wav2Vec2ForCTC", ALL, "exact", "its loss is a sum"),
    Outcome("peft", "GPT2LMHeadModel with LoRA", ALL, "exact", "frozen head; the adapters start at zero"),
    Outcome("schedulefree", "AdamWScheduleFree", ALL, "exact"),
    Outcome("torchvision", "RetinaNet", ALL, "exact", "lists of images; a dict of losses"),
    _of_batch("torchvision", "FasterRCNN", "proposals are not rows of the samples: the box head stays whole, as is warned"),
    Outcome(_LIGHTLY, "LinearClassifier", ALL, "exact", "with pytorch_lightning.Trainer; frozen backbone: saves little"),
    *_drawn(_LIGHTLY, "MAE", "other patches are masked in scoring"),
    Outcome(_LIGHTLY, "MoCo, memory bank", ("mask", "partial", "prune"), "exact"),
    _refused(_LIGHTLY, "MoCo, memory bank", "changes parameters", "the momentum encoder moves twice", ("subset",)),
    _of_batch(_LIGHTLY, "SimCLR, NTXentLoss", CONTRASTIVE),
    _of_batch(_LIGHTLY, "DCLLoss", CONTRASTIVE),
    _of_batch(_LIGHTLY, "VICRegLoss", "statistics of the batch"),
    _of_batch(_LIGHTLY, "BarlowTwinsLoss", "a statistic of the batch"),
    *_batchnorm(_LIGHTLY, "SimSiam"),
    *_batchnorm(_LIGHTLY, "SimSiam, per_sample_loss -cos", "losses below 0; BatchNorm"),
    Outcome(_TU, "ClassificationRoutine", ALL, "exact"),
    _of_batch(_TU, "ClassificationRoutine, mixup", "a sample's rows are its partner's too, as is warned"),
    Outcome(_TU, "ClassificationRoutine, ELBOLoss of 1", ALL, "exact", "the KL of the weights stays whole"),
    Outcome(_TU, "ClassificationRoutine, ELBOLoss of 3", ALL, "exact", "the KL of the weights stays whole"),
    Outcome(_TU, "RegressionRoutine", ALL, "exact"),
    Outcome(_TU, "ClassificationRoutine, packed ensemble", ALL, "exact", "one row a member, members first"),
    Outcome(_TU, "SegmentationRoutine", ALL, "exact"),
    *_own_mean(_TU, "SegmentationRoutine, invalid pixels", "pixels", "invalid pixels are cut out of the loss"),
    Outcome(_TU, "SegmentationRoutine, whole images invalid", ALL, "exact"),
    *_batchnorm(_GEO, "ClassificationTask, ce", dense=True),
    *_batchnorm(_GEO, "ClassificationTask, bce", dense=True),
    *_batchnorm(_GEO, "ClassificationTask, focal", dense=True),
    *_own_mean(_GEO, "SemanticSegmentationTask, ce", "pixels", "ignore_index"),
    _of_batch(_GEO, "SemanticSegmentationTask, jaccard"),
    *_batchnorm(_GEO, "RegressionTask", dense=True),
    Outcome(_GEO, "PixelwiseRegressionTask", ALL, "exact"),
    *_dense(_PF, "TemporalFusionTransformer, QuantileLoss", "parts of the backward go dense"),
    Outcome(_PF, "NBeats, MASE", ALL, "exact"),
    *_dense(_PF, "DeepAR, NormalDistributionLoss", "the recurrent layer goes dense"),
    Outcome(_PF, "DecoderMLP, MAE", ALL, "exact"),
    Outcome(_PF, "DecoderMLP, MSELoss", ALL, "exact"),
    Outcome("chemprop", "MPNN", ("mask", "prune"), "exact"),
    Outcome("chemprop", "MPNN", ("partial",), "exact", "message passing goes dense", dense=True),
    _refused("chemprop", "MPNN", STATE, "its graphs cannot be sliced; the mixin's select_batch works", ("subset",)),
    *_dense("torch-geometric", "GIN", "message passing goes dense"),
    *_own_mean("torch-geometric", "GIN, nodes", "nodes", "a node is a row of its graph", dense=True),
    *_own_mean("torch-geometric", "GIN, edges", "edges", "an edge is a row of its graph", dense=True),
    *_dense("gluonts", "DeepARLightningModule", "the recurrent layer goes dense"),
    *_batchnorm(_TAB, "CategoryEmbeddingModel, classification", dense=True),
    *_batchnorm(_TAB, "CategoryEmbeddingModel, regression", dense=True),
    *_batchnorm(_TAB, "CategoryEmbeddingModel, two targets", dense=True),
    *_batchnorm(_TAB, "FTTransformerModel", "BatchNorm of the continuous inputs", dense=True),
    Outcome(_SCVI, "SCVI TrainingPlan", ("mask", "prune"), "exact"),
    Outcome(_SCVI, "SCVI TrainingPlan", ("subset", "partial"), "approximate", "BatchNorm, and draws of the latent",
            dense=None),
    Outcome(_SCVI, "SCANVI SemiSupervisedTrainingPlan", ("mask",), "exact"),
    Outcome(_SCVI, "SCANVI SemiSupervisedTrainingPlan", ("subset", "partial"), "approximate",
            "BatchNorm, and draws of the latent", dense=None),
    _refused(_SCVI, "SCANVI SemiSupervisedTrainingPlan", "iterates in a way of its own", "two loaders in one", ("prune",)),
]  # fmt: skip
