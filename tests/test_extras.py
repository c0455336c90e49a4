"""A missing optional package is named with the extra that brings it, wherever it is first needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.errors import DataNotFoundError, MissingPackageError
from lightning_ast.extras import needs
from tests.helpers.command import boring, run
from tests.helpers.training import quiet_trainer


def test_the_first_snippet_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"sklearn is missing: pip install 'lightning-ast\[vision\]'"
    ) as raised:
        quiet_trainer().fit(ResNet9(in_channels=1, width=4), datamodule=ImageData("digits", batch_size=64))
    assert raised.value.name == "sklearn.datasets"


@pytest.mark.parametrize("data", ["cifar10", "fashion_mnist"])
def test_torchvision(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr("lightning_ast.demo.data.DEBIAN_FASHION_MNIST", tmp_path)
    with pytest.raises(DataNotFoundError, match=r"torchvision is missing: pip install 'lightning-ast\[vision\]'"):
        ImageData(data, root=str(tmp_path)).setup("fit")  # type: ignore[arg-type]


def test_lightnings_error_about_jsonargparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", _Absent())
    for command in (boring(), ("advise", "--config", "none.yaml")):
        done = run(*command, cwd=tmp_path, status=2)
        assert done.err == "lightning-ast: jsonargparse is missing: pip install 'lightning-ast[cli]'\n"


class _Absent:
    """What Lightning has where the package is not installed."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "Requirement 'jsonargparse[signatures]>=4.27.7' not met"


def test_other_missing_modules_keep_pythons_error() -> None:
    with pytest.raises(ModuleNotFoundError) as raised, needs("vision", "sklearn"):
        import nosuch_module  # noqa: F401
    assert not isinstance(raised.value, MissingPackageError)
