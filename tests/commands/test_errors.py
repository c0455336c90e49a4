"""What a user can mend ends in one line and status 2; a programming error in the user's module keeps its traceback."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ast.commands.fit import CommandLineParser
from lightning_ast.commands.messages import condensed, plain_lines, users_error
from tests.helpers.command import BORING, boring, run

SELECTION = "--trainer.callbacks+=SparseSelectionCallback"
CNN = ("fit", "--seed_everything=1", "--model=lightning_ast.demo.ResNet9", "--model.width=4", "--model.in_channels=1")
DIGITS = ("--data=lightning_ast.demo.ImageData", "--trainer.logger=false", "--trainer.accelerator=cpu")

FILES = {
    "binary.yaml": bytes(range(256)),
    "utf16.yaml": "trainer: {}".encode("utf-16"),
    "brackets.yaml": b"a: [b\n c: d",
    "deep.yaml": b"a: " + b"[" * 1100 + b"]" * 1100,
    "tab.yaml": b"a:\n\t- b",
    "text.yaml": b"just text",
    "list.yaml": b"- 1\n- 2\n",
    "empty.yaml": b"",
    "number_as_key.yaml": b"1: 2",
    "unknown_key.yaml": b"nosuch: 1\nmodel: " + BORING.encode(),
    "no_module.yaml": b"model: {class_path: nosuch.Net}",
    "no_class.yaml": b"model: {class_path: lightning_ast.demo.Nosuch}",
    "no_argument.yaml": b"model: {class_path: lightning_ast.demo.ResNet9, init_args: {widht: 8}}",
    "not_a_module.yaml": b"model: {class_path: pathlib.Path}",
    "date.yaml": b"trainer: {max_epochs: 2001-99-99}\nmodel: " + BORING.encode(),
    "precision.yaml": b"trainer: {precision: half}\nmodel: " + BORING.encode(),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "garbage.ckpt").write_bytes(b"garbage")
    return folder


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("binary.yaml", "binary.yaml: expected a YAML file, got: 'utf-8' codec can't decode byte 0x80 in position 128"),
        ("utf16.yaml", "utf16.yaml: expected a YAML file, got: 'utf-8' codec can't decode byte 0xff in position 0"),
        ("brackets.yaml", "brackets.yaml: expected a YAML file, got: while parsing a flow sequence"),
        ("deep.yaml", "deep.yaml: expected a YAML file, got: "),
        ("tab.yaml", "tab.yaml: expected a YAML file, got: "),
        ("text.yaml", "text.yaml: expected settings such as `trainer: ...`, got str"),
        ("list.yaml", "list.yaml: expected settings such as `trainer: ...`, got list"),
        ("empty.yaml", "empty.yaml: expected settings such as `trainer: ...`, got NoneType"),
        ("number_as_key.yaml", "Key must be a string, got: 1."),
        ("unknown_key.yaml", "nosuch"),
        ("no_module.yaml", "model: nosuch.Net: No module named 'nosuch'"),
        ("no_class.yaml", "model: lightning_ast.demo.Nosuch: module 'lightning_ast.demo' has no attribute 'Nosuch'"),
        ("no_argument.yaml", "model: lightning_ast.demo.ResNet9: Option 'widht' is not accepted"),
        ("not_a_module.yaml", "model: "),
        ("date.yaml", "trainer.max_epochs: expected int, got 2001-99-99"),
        ("precision.yaml", "trainer.precision: expected "),
        ("folder", "folder"),
        ("none.yaml", "none.yaml"),
    ],
)
def test_a_configuration_that_cannot_be_used(name: str, told: str, files: Path) -> None:
    for command in ("fit", "advise"):
        done = run(command, "--config", name, cwd=files, status=2)
        assert done.err.startswith("lightning-ast: ")
        assert told in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fit",), "model"),
        (("validate", "--model", "Nosuch"), "model: no class Nosuch is known: give its full path"),
        (("fit", "--config"), "expected one argument"),
        (("fit", "--confíg=ü"), "--confíg=ü"),
        ((*boring(), "--trainer.nosuch=3"), "unrecognized arguments: --trainer.nosuch=3"),
        ((*boring(), "--trainer.max_epochs=x"), "trainer.max_epochs: expected int, got x"),
        ((*boring(), "--ckpt_path=nosuch.ckpt"), "nosuch.ckpt"),
        ((*boring(), "--ckpt_path=garbage.ckpt"), "ckpt_path: expected a checkpoint of a Trainer"),
        ((*boring(), "--trainer.devices=-7"), "`devices` selected with `CPUAccelerator` should be an int > 0."),
        ((*boring(), "--seed_everything=-1"), "seed_everything: -1 is not in bounds"),
        ((*boring(), "--trainer.accumulate_grad_batches=0"), "accumulate_grad_batches: expected an int >= 1, got 0"),
        (
            (*boring(), "--trainer.limit_val_batches=1", "--trainer.val_check_interval=999"),
            "`val_check_interval` (999) must be less than or equal to",
        ),
        ((*boring(), "--ckpt_path=empty.yaml"), "ckpt_path: expected a checkpoint of a Trainer"),
        ((*boring(), "--ckpt_path=/dev/null"), "lightning-ast: "),
        ((*boring(), "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=nope"), "nope"),
        ((*boring(), SELECTION, SELECTION), "more than one stateful callback of type `SparseSelectionCallback`"),
        ((*boring(), "--trainer.max_time=x"), "`Timer(duration='x')` is not a valid duration."),
        ((*boring(), SELECTION, "--trainer.callbacks.target_activation_rate=.nan"), "(0, 1], got nan"),
        ((*CNN, *DIGITS, "--data.data=cifar10", "--data.root=binary.yaml/x"), "cifar10"),
        (
            ("advise", "--seed_everything=1", "--model", BORING, "--budget_seconds=-1"),
            "--budget_seconds: expected a finite number of seconds above 0, got -1",
        ),
        (("advise", "--seed_everything=1", "--model", BORING, "--budget_seconds=1e999"), "above 0, got inf"),
        (("advise", "--seed_everything=1", "--model", BORING, "--budget_seconds=soon"), "invalid float value: 'soon'"),
        (
            ("advise", "--seed_everything=1", "--model", BORING, "--trainer.fast_dev_run=true"),
            "fast_dev_run runs a single batch",
        ),
        (("advise",), "expected --config FILE"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: tuple[str, ...], told: str, files: Path) -> None:
    done = run(*arguments, cwd=files, status=2)
    assert told in done.err, done.err


MODULES = {
    "syntax": ("def x(:\n", SyntaxError),
    "name": ("nosuch\n", NameError),
    "missing": ("import nosuch_package\n", ModuleNotFoundError),
    "value": ("raise ValueError('mine')\n", ValueError),
    "constructor": (
        "import torch\nfrom lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Net(BoringModel):\n    def __init__(self):\n        super().__init__()\n        torch.nn.Linear(-1, 2)\n",
        RuntimeError,
    ),
    "step": (
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Net(BoringModel):\n    def training_step(self, batch, batch_idx):\n        1 / 0\n",
        ZeroDivisionError,
    ),
    "file": (
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Net(BoringModel):\n    def training_step(self, batch, batch_idx):\n        open('nosuch.txt')\n",
        FileNotFoundError,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_programming_error_in_the_users_module_keeps_its_traceback(name: str, tmp_path: Path) -> None:
    text, kind = MODULES[name]
    (tmp_path / f"mine_{name}.py").write_text(text)
    arguments = [each.replace(BORING, f"mine_{name}.Net") for each in boring()]
    with pytest.raises(kind) as raised:
        run(*arguments, cwd=tmp_path)
    shown = [str(entry.path) for entry in raised.traceback]
    place = raised.value.filename if isinstance(raised.value, SyntaxError) else " ".join(shown)
    assert f"mine_{name}.py" in place
    assert raised.value.__cause__ is None, "no error of the parser hides it"


def test_a_module_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine_found.py").write_text("from lightning.pytorch.demos.boring_classes import BoringModel as Net\n")
    before = list(sys.path)
    run(*(each.replace(BORING, "mine_found.Net") for each in boring()), cwd=tmp_path)
    assert sys.path == before


def test_a_loss_that_cannot_be_scored_by_is_told_in_a_line(tmp_path: Path) -> None:
    """Though the user's code stands in the traceback: the message is about it."""
    (tmp_path / "mine_loss.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Net(BoringModel):\n    def training_step(self, batch, batch_idx):\n"
        "        return self.layer(batch).abs().mean()\n"
    )
    by_loss = (SELECTION, "--trainer.callbacks.significance=loss")
    arguments = (each.replace(BORING, "mine_loss.Net") for each in boring(*by_loss))
    done = run(*arguments, cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: ")
    assert "per_sample_loss" in done.last


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "mine_interrupt.py").write_text("raise KeyboardInterrupt\n")
    done = run(*(each.replace(BORING, "mine_interrupt.Net") for each in boring()), cwd=tmp_path, status=130)
    assert done.err == ""


def test_errors_that_need_a_traceback() -> None:
    assert plain_lines(ValueError("a fault of ours")) is None
    loader = FileNotFoundError(
        "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback (most recent"
    )
    assert plain_lines(loader) is None
    assert plain_lines(OSError(28, "No space left on device")) == ["[Errno 28] No space left on device"]
    with pytest.raises(MisconfigurationException) as raised:
        raise MisconfigurationException("raised in this file, a user's")
    assert users_error(raised.value) is raised.value
    assert plain_lines(raised.value) is None


def test_the_parser_raises_argparses_error_where_it_is_asked_to() -> None:
    parser = CommandLineParser(exit_on_error=False)
    parser.add_argument("--a", type=int)
    with pytest.raises(argparse.ArgumentError, match="Expected a <class 'int'>"):
        parser.parse_args(["--a", "x"])


def test_messages_without_alternatives_stay() -> None:
    assert condensed("one\n  two") == "one two"
    assert condensed("") == ""
