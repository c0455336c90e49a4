"""The private names of Lightning, torchmetrics and torch that this folder uses: why, and the versions checked with.

When a new version of Lightning comes out, the tests tell which of them are gone. What the folder's files change is
tested by the behaviour that they exist for; this table tells where to look first.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIGHTNING", "PRIVATE_NAMES", "TORCH", "TORCHMETRICS", "PrivateName"]

LIGHTNING = ("2.5.0", "2.6.6")
NEWER_LIGHTNING = ("2.6.6",)
TORCHMETRICS = ("1.4.0", "1.9.0")
TORCH = ("2.6.0", "2.14.1")


@dataclass(frozen=True)
class PrivateName:
    """A name that may change without notice.

    Attributes:
        owner: The object that has it: ``trainer`` and a path from it, or the import path of a module or a class.
        name: The attribute's name.
        why: The reason for using it; completes "it is used to".
        checked: The versions of the owner's package that it was checked with. Where the first is not the oldest
            supported one, the versions before it do not have the name.
    """

    owner: str
    name: str
    why: str
    checked: tuple[str, ...] = LIGHTNING


_FIT = "trainer.fit_loop"
_EPOCH = "trainer.fit_loop.epoch_loop"
_VALIDATION = "trainer.fit_loop.epoch_loop.val_loop"
_CONNECTOR = "trainer._logger_connector"
_STRATEGY = "trainer.strategy"
_FETCHER = "lightning.pytorch.loops.fetchers._PrefetchDataFetcher"
_COMBINED = "lightning.pytorch.utilities.combined_loader.CombinedLoader"
_DEALT = "lightning.fabric.utilities.distributed._DatasetSamplerWrapper"
_CLI = "lightning.pytorch.cli.LightningCLI"
_RESULT = "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric"
_AVERAGING = "lightning.pytorch.callbacks.StochasticWeightAveraging"
_METRIC = "torchmetrics.MeanMetric"
_SCALER = "torch.amp.GradScaler"
_HELD = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced")
_COMPILE = "compile the networks of a module that is compiled as a whole"
_BEGIN = "begin the epoch after a checkpoint as any other"
_LEFT = ("_lightning_module", "_model", "_optimizers")

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    # leading the fit loop
    PrivateName("lightning.pytorch.loops.fit_loop", "_FitLoop", "make loops for a copied Trainer, and name their type"),
    PrivateName("lightning.pytorch.loops.fetchers", "_DataFetcher", "name the type of what fetches batches"),
    PrivateName("lightning.fabric.utilities.data", "_set_sampler_epoch", "set the samplers' epoch ahead of its plan"),
    PrivateName(_FIT, "_data_fetcher", "replace what batches are fetched from, and count those handed out"),
    PrivateName(_FIT, "_combined_loader", "read the user's loaders, and have them set up anew"),
    PrivateName(_FIT, "on_advance_start", "hear of an epoch before every callback does"),
    PrivateName(_FIT, "on_save_checkpoint", "leave the state of loaders out where a plan keeps the place"),
    PrivateName(_FIT, "_load_combined_loader_states", "leave loaders at their start where a plan keeps the place"),
    PrivateName(_FIT, "setup_data", "set the loaders up before Lightning does"),
    PrivateName(_FIT, "max_batches", "announce the batches of a pruned epoch"),
    PrivateName(_FIT, "epoch_progress", "count the epochs that were trained"),
    PrivateName(_FETCHER, "_combined_loader", "tell whether the loader before is still the one to fetch from"),
    PrivateName(_FETCHER, "combined_loader", "stop the workers of the loader before"),
    PrivateName(_FETCHER, "iterator", "let go of the iterator of the loader before"),
    PrivateName(_FETCHER, "setup", "give the fetcher another loader"),
    PrivateName(_FETCHER, "fetched", "count the batches handed to the loop"),
    PrivateName(_FETCHER, "batches", "leave out the batches that are fetched ahead"),
    # loaders
    PrivateName(_COMBINED, "_iterator", "let the user's loader tell the length of an epoch"),
    PrivateName(_COMBINED, "_mode", "combine other loaders in the same way"),
    PrivateName(_COMBINED, "_load_state_dicts", "bring loaders that know their place to it"),
    PrivateName("lightning.pytorch.utilities.combined_loader", "_SUPPORTED_MODES", "make an iterator without a start"),
    PrivateName("lightning.fabric.utilities.types", "_Stateful", "recognise loaders that restore their own position"),
    PrivateName(_DEALT, "_sampler", "find the generators of a sampler that is dealt out to the processes"),
    # resuming
    PrivateName(_FIT, "_combined_loader_states_to_load", "bring loaders that know their place to it"),
    PrivateName(_FIT, "_last_train_dl_reload_epoch", "reload the loaders when the uninterrupted run would"),
    PrivateName(_VALIDATION, "_last_val_dl_reload_epoch", "reload the validation loaders when that run would"),
    PrivateName(_VALIDATION, "_combined_loader", "tell whether the validation loaders were set up"),
    PrivateName(_VALIDATION, "setup_data", "set the validation loaders up"),
    PrivateName(_FIT, "restarted_mid_epoch", "find the place in the epoch of a checkpoint"),
    PrivateName(_FIT, "restarted_on_epoch_end", "find the place in the epoch of a checkpoint"),
    PrivateName(_EPOCH, "restarted_on_train_batch_end", "find the place in the epoch of a checkpoint"),
    *(PrivateName(loop, "reset_restart_stage", _BEGIN) for loop in (_FIT, _EPOCH)),
    *(PrivateName(loop, "_restarting", _BEGIN) for loop in (_FIT, _EPOCH, _VALIDATION)),
    PrivateName(_FIT, "_resuming_from_checkpoint", "start the loader of a resumed run's epoch late", NEWER_LIGHTNING),
    PrivateName(_FIT, "is_resuming", "tell a resumed run from one that a tuner put back", NEWER_LIGHTNING),
    # a step and what it logs
    PrivateName(_EPOCH, "batch_progress", "count batches"),
    PrivateName(_EPOCH, "max_steps", "end a measurement from within, and not by the user's limit"),
    PrivateName(_EPOCH, "_batches_that_stepped", "know the step under which Lightning's loggers write"),
    PrivateName(_EPOCH, "_results", "keep values of an earlier step from being written again"),
    PrivateName(_RESULT, "has_reset", "keep values of an earlier step from being written again"),
    PrivateName(_FIT, "_should_accumulate", "know whether Lightning will write what a batch logs"),
    PrivateName(_FIT, "_skip_backward", "know whether a step has a backward"),
    PrivateName("trainer", "_logger_connector", "show values when it is too late for module.log"),
    PrivateName(_CONNECTOR, "should_update_logs", "know whether the loggers take what a step logs"),
    PrivateName(_CONNECTOR, "_callback_metrics", "show values when it is too late for module.log"),
    PrivateName(_CONNECTOR, "_logged_metrics", "read and show values without reducing them over the processes"),
    PrivateName(_CONNECTOR, "_progress_bar_metrics", "show values in the progress bar, and remove them"),
    PrivateName("trainer", "_val_check_time_interval", "read a validation interval that is a time", NEWER_LIGHTNING),
    PrivateName("lightning.pytorch.LightningModule", "_compiler_ctx", _COMPILE),
    PrivateName("torch.nn.Module", "_compiled_call_impl", _COMPILE, TORCH),
    PrivateName("torch.nn.Module", "_call_impl", _COMPILE, TORCH),
    PrivateName("torch._dynamo.eval_frame", "innermost_fn", "run a compiled step as it was written", TORCH),
    PrivateName(_AVERAGING, "_max_epochs", "leave out the epoch that weight averaging adds"),
    PrivateName(_SCALER, "_scale", "read the loss scale without waiting for the device", TORCH),
    # a copied Trainer
    PrivateName("lightning.pytorch.loops.evaluation_loop", "_EvaluationLoop", "make loops for a copied Trainer"),
    PrivateName("lightning.pytorch.loops.prediction_loop", "_PredictionLoop", "make loops for a copied Trainer"),
    PrivateName("lightning.pytorch.loops.training_epoch_loop", "_TrainingEpochLoop", "make loops for a copied Trainer"),
    PrivateName("trainer", "_loggers", "give a copied Trainer loggers that write nothing"),
    *(PrivateName(_STRATEGY, name, "leave out of a copied Trainer what an earlier fit left") for name in _LEFT),
    PrivateName(_STRATEGY, "_lightning_optimizers", "find the optimizers that a step calls by itself"),
    PrivateName("lightning.pytorch.strategies.launchers", "_MultiProcessingLauncher", "know if processes are started"),
    # the command line
    PrivateName(_CLI, "_parse_ckpt_path", "tell what is wrong with a checkpoint's arguments", NEWER_LIGHTNING),
    PrivateName(_CLI, "_set_seed", "tell what is wrong with a seed"),
    PrivateName(_CLI, "_run_subcommand", "name the callback that is at fault"),
    # torchmetrics
    *(PrivateName(_METRIC, name, "hold a metric still", TORCHMETRICS) for name in _HELD),
)
