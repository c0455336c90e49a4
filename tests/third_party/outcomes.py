"""What the callback does with LightningModules that others wrote: the table that the tests here hold it to.

``exact``: the gradient is that of the module's own loss over the selected samples, to rounding. ``approximate``: it
trains, but BatchNorm (``partial``: its backward; ``subset``: its forward too) or draws of a whole batch (masks, mixup)
see other samples than an exact masking would. ``refused``: before or at the first batch, with a message that matches.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["OUTCOMES", "Outcome"]

ALL = ("mask", "subset", "partial", "prune")
HAND_WRITTEN = "no torch loss function was called in the training step"
UNREDUCED = "was called with reduction='none' and averaged by hand"
SEVERAL = r"\d losses were captured"
PICKED = "were picked by an index or a mask"
JOINED = "several rows a sample that do not lie together"
TERM = "adds a term to the captured loss that depends on the samples too"


class Outcome(NamedTuple):
    """One row.

    Attributes:
        package: as on PyPI.
        module: key of the case in this package's test file.
        modes: in which the row holds.
        outcome: ``"exact"``, ``"approximate"`` or ``"refused"``.
        note: for people: why, and what to do.
        message: regular expression that the refusal matches.
        dense: whether some op of the backward has no row rule in ``partial``.
    """

    package: str
    module: str
    modes: tuple[str, ...]
    outcome: str
    note: str = ""
    message: str = ""
    dense: bool = False


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


def _refused(package: str, module: str, message: str, note: str, modes: tuple[str, ...] = ALL) -> Outcome:
    return Outcome(package, module, modes, "refused", note, message)


_SMP, _TF, _LIGHTLY, _TU, _GEO = (
    "segmentation-models-pytorch",
    "transformers",
    "lightly",
    "torch-uncertainty",
    "torchgeo",
)
_PF, _TAB = "pytorch-forecasting", "pytorch-tabular"

OUTCOMES: list[Outcome] = [
    Outcome("lightning", "BoringModel", ALL, "exact"),
    Outcome("lightning", "ManualOptimBoringModel", ("mask", "partial", "prune"), "exact", "manual optimization"),
    _refused(
        "lightning", "ManualOptimBoringModel", "with manual optimization", "needs per_sample_loss: works", ("subset",)
    ),
    _refused("lightning", "DemoModel", HAND_WRITTEN, "sum of outputs; per_sample_loss works"),
    *_drawn("lightning", "LightningTransformer", "dropout is drawn for the selected samples"),
    Outcome("lightning", "LightningLSTM", ("mask",), "exact", "hidden state across batches"),
    Outcome("lightning", "LightningLSTM", ("partial",), "exact", "the recurrent layer goes dense", dense=True),
    Outcome("lightning", "LightningLSTM", ("prune",), "exact", "but a hidden state means nothing in pruned batches"),
    _refused("lightning", "LightningLSTM", "failed on the .* selected samples alone", "the state's size", ("subset",)),
    _refused("lightning tutorials", "GAN", SEVERAL, "two losses of two optimizers: no remedy", ("mask", "partial")),
    _refused("lightning tutorials", "GAN", SEVERAL, "two losses of two optimizers: no remedy", ("prune",)),
    _refused("lightning tutorials", "GAN", "with manual optimization", "two optimizers: no remedy", ("subset",)),
    *_batchnorm(_SMP, "Unet, CrossEntropyLoss"),
    _refused(_SMP, "Unet, DiceLoss", HAND_WRITTEN, "a loss of the whole batch; one of each image works"),
    _refused(_SMP, "Unet, JaccardLoss", HAND_WRITTEN, "a loss of the whole batch; one of each image works"),
    _refused(_SMP, "Unet, SoftCrossEntropyLoss", HAND_WRITTEN, "reduction=None and per_sample_loss"),
    _refused(_SMP, "Unet, SoftBCEWithLogitsLoss", UNREDUCED, "reduction=None and per_sample_loss; or BCEWithLogitsLoss"),
    _refused(_SMP, "Unet, FocalLoss", UNREDUCED, "reduction=None and per_sample_loss"),
    Outcome(_TF, "BertForSequenceClassification", ALL, "exact"),
    Outcome(_TF, "BertForSequenceClassification, regression", ALL, "exact"),
    Outcome(_TF, "BertForTokenClassification", ALL, "exact", "labels of -100 count for nothing"),
    Outcome(_TF, "BertForMaskedLM", ALL, "exact"),
    Outcome(_TF, "BertForMultipleChoice", ALL, "exact"),
    Outcome(_TF, "ViTForImageClassification", ALL, "exact"),
    Outcome(_TF, "GPT2LMHeadModel", ALL, "exact"),
    Outcome(_TF, "T5ForConditionalGeneration", ALL, "exact"),
    _refused(_TF, "BertForQuestionAnswering", SEVERAL, "start and end; per_sample_loss works"),
    _refused(_TF, "CLIPModel", SEVERAL, "contrastive: a sample has no loss of its own"),
    _refused(_TF, "Wav2Vec2ForCTC", "`ctc_loss` has no per-sample form", "per_sample_loss with reduction='none'"),
    Outcome(_LIGHTLY, "LinearClassifier", ALL, "exact", "with pytorch_lightning.Trainer; frozen backbone: saves little"),
    *_drawn(_LIGHTLY, "MAE", "other patches are masked in scoring"),
    Outcome(_LIGHTLY, "MoCo, memory bank", ("mask", "partial", "prune"), "exact"),
    _refused(_LIGHTLY, "MoCo, memory bank", "changes parameters", "the momentum encoder moves twice", ("subset",)),
    _refused(_LIGHTLY, "SimCLR, NTXentLoss", JOINED, "contrastive: a sample has no loss of its own"),
    _refused(_LIGHTLY, "VICRegLoss", TERM, "statistics of the batch: a sample has no loss of its own"),
    *_batchnorm(_LIGHTLY, "SimSiam, per_sample_loss -cos", "losses below 0; BatchNorm", dense=True),
    _refused(_LIGHTLY, "BarlowTwinsLoss", HAND_WRITTEN, "a statistic of the batch: a sample has no loss of its own"),
    _refused(_LIGHTLY, "DCLLoss", HAND_WRITTEN, "contrastive: a sample has no loss of its own"),
    _refused(_LIGHTLY, "SimSiam", HAND_WRITTEN, "per_sample_loss works"),
    Outcome(_TU, "ClassificationRoutine", ALL, "exact"),
    *_drawn(_TU, "ClassificationRoutine, mixup", "samples are mixed with other partners"),
    Outcome(_TU, "ClassificationRoutine, ELBOLoss of 1", ALL, "exact", "the KL of the weights stays whole"),
    _refused(_TU, "ClassificationRoutine, ELBOLoss of 3", SEVERAL, "one loss a draw; per_sample_loss works"),
    Outcome(_TU, "RegressionRoutine", ALL, "exact"),
    _refused(_TU, "ClassificationRoutine, packed ensemble", JOINED, "one row a member, members first"),
    _refused(_TU, "SegmentationRoutine", PICKED, "per_sample_loss with ignore_index works"),
    _refused(_TU, "SegmentationRoutine, invalid pixels", f"{PICKED}|a multiple of it", "per_sample_loss works"),
    _refused(_TU, "SegmentationRoutine, whole images invalid", PICKED, "per_sample_loss with ignore_index works"),
    *_batchnorm(_GEO, "ClassificationTask, ce", dense=True),
    *_batchnorm(_GEO, "ClassificationTask, bce", dense=True),
    _refused(_GEO, "ClassificationTask, focal", UNREDUCED, "smp's FocalLoss"),
    Outcome(_GEO, "SemanticSegmentationTask, ce", ALL, "exact", "ignore_index"),
    _refused(_GEO, "SemanticSegmentationTask, jaccard", HAND_WRITTEN, "smp's JaccardLoss"),
    *_batchnorm(_GEO, "RegressionTask", dense=True),
    Outcome(_GEO, "PixelwiseRegressionTask", ALL, "exact"),
    _refused(_PF, "TemporalFusionTransformer, QuantileLoss", HAND_WRITTEN, "per_sample_loss works"),
    _refused(_PF, "NBeats, MASE", HAND_WRITTEN, "needs per_sample_loss"),
    _refused(_PF, "DeepAR, NormalDistributionLoss", HAND_WRITTEN, "needs per_sample_loss"),
    _refused(_PF, "DecoderMLP, MAE", HAND_WRITTEN, "needs per_sample_loss"),
    Outcome(_PF, "DecoderMLP, MSELoss", ("mask", "partial", "prune"), "exact"),
    _refused(_PF, "DecoderMLP, MSELoss", "metrics are held still while scoring", "its loss is a metric", ("subset",)),
    _refused("chemprop", "MPNN", f"{UNREDUCED}|metrics are held still", "the mixin works", ("mask", "subset", "partial")),
    _refused("chemprop", "MPNN", "override SparseLossMixin.count_samples", "needs the mixin", ("prune",)),
    _refused("torch-geometric", "GIN", "got DataBatch without any", "SparseLossMixin works, in each mode"),
    _refused("gluonts", "DeepARLightningModule", HAND_WRITTEN, "per_sample_loss works"),
    *_batchnorm(_TAB, "CategoryEmbeddingModel, classification", dense=True),
    *_batchnorm(_TAB, "CategoryEmbeddingModel, regression", dense=True),
    _refused(_TAB, "CategoryEmbeddingModel, two targets", SEVERAL, "one loss a target; needs per_sample_loss"),
    *_batchnorm(_TAB, "FTTransformerModel", "BatchNorm of the continuous inputs", dense=True),
    _refused(
        "scvi-tools", "SCVI TrainingPlan", HAND_WRITTEN, "per_sample_loss works", ("mask", "subset", "partial")
    ),
    _refused("scvi-tools", "SCVI TrainingPlan", "needs batch_size", "its loader samples whole batches", ("prune",)),
    _refused("scvi-tools", "SCANVI SemiSupervisedTrainingPlan", TERM, "the ELBO beside the classifier's loss",
             ("mask", "subset", "partial")),
    _refused(
        "scvi-tools", "SCANVI SemiSupervisedTrainingPlan", "iterates in a way of its own", "two loaders in one", ("prune",)
    ),
]  # fmt: skip
