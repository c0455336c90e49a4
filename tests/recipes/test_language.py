"""The recipes for language models: each script runs, tiny, on real text, and does what its page promises."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_ast.errors import DataNotFoundError
from lightning_ast.recipes import GPT, load_text, text_windows
from tests.helpers.recipes import EXAMPLES, recipe

TEXT = EXAMPLES.parent / "docs" / "which-mode.md"  # real English, and always there
SMALL = {"TRAIN_BYTES": 8_000, "TEST_BYTES": 2_000}


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return recipe("language/gpt", monkeypatch, runs={"epochs": 4}, **SMALL)


def test_a_dense_gpt_learns_and_costs_one(gpt: ModuleType) -> None:
    figures = gpt.train("dense", text=str(TEXT))
    assert figures["work"] == 1
    assert figures["bits_per_byte"] < 7  # 8 bits are what it knows at the start


@pytest.mark.parametrize("method", ["ours", "partial", "random"])
def test_the_sparse_methods_of_gpt_cost_less(gpt: ModuleType, method: str) -> None:
    figures = gpt.train(method, text=str(TEXT))
    assert 0.3 < figures["work"] < 1
    assert figures["bits_per_byte"] < 8


def test_a_gpt_cannot_see_the_future() -> None:
    torch.manual_seed(0)
    net = GPT(context=8, width=16, layers=2, heads=2)
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 256
    same = (net(tokens) == net(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    sizes = {"EPOCHS": 2, "REFERENCE_EPOCHS": 2, "CLEAN_BYTES": 2_200, **SMALL}
    return recipe("language/token_selection", monkeypatch, **sizes)


def test_selecting_tokens_costs_more_than_dense_training(tokens: ModuleType) -> None:
    assert tokens.train("dense", text=str(TEXT))["work"] == 1
    assert tokens.train("reference", text=str(TEXT))["work"] == pytest.approx(2_200 / 8_000, rel=0.05)
    ours = tokens.train("ours", text=str(TEXT))
    reference = 2_200 / 8_000  # as many epochs, on the clean part
    assert ours["work"] == pytest.approx(1 + reference + 1 / 6, rel=0.05)


def test_only_the_selected_tokens_get_a_gradient(tokens: ModuleType) -> None:
    torch.manual_seed(0)
    model = tokens.LanguageModel("ours")
    inputs, targets = text_windows(TEXT.read_bytes()[:1_000], tokens.CONTEXT).tensors
    losses = model.token_losses(inputs, targets)
    losses.retain_grad()
    model.token_losses = lambda *_: losses
    reference = torch.rand(losses.shape) * 8
    model.training_step((inputs, targets, reference), 0).backward()
    kept = losses.grad.flatten() != 0
    excess = (losses.detach() - reference).flatten()
    assert kept.float().mean() == pytest.approx(tokens.TOKEN_RATE, abs=0.01)
    assert excess[kept].min() >= excess[~kept].max()


def test_spoiled_windows_hold_the_same_bytes_in_another_order(tokens: ModuleType) -> None:
    windows = text_windows(TEXT.read_bytes()[:4_000], tokens.CONTEXT)
    before = windows.tensors[0].clone()
    spoiled, targets = tokens.partly_spoiled(windows, clean=10).tensors
    same = (spoiled == before).all(1)
    assert same[:10].all()
    assert not same[10::2].any()
    assert same[11::2].all()
    assert (spoiled[:, 1:] == targets[:, :-1]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # transformers, called by peft
@pytest.mark.parametrize("method", ["dense", "ours"])
def test_lora_trains_its_adapters_alone(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = recipe("language/gpt2_lora", monkeypatch, STEPS=12, PRETRAINING_STEPS=3)
    entry = "   :word{0}: n.\n\n   The meaning of the word, and {0} more.\n\n"
    text = tmp_path / "text.txt"
    text.write_text("".join(entry.format(i) for i in range(300)))
    models = []
    monkeypatch.setattr(lora, "FineTuned", lambda model, make=lora.FineTuned: models.append(make(model)) or models[-1])
    bases = []
    make_base = lora.base_model

    def base_model(*arguments: object) -> object:
        model, encode = make_base(*arguments)
        bases.append({name: value.clone() for name, value in model.state_dict().items()})
        return model, encode

    monkeypatch.setattr(lora, "base_model", base_model)
    figures = lora.train(method, text=str(text))
    assert figures["work"] == 1 if method == "dense" else figures["work"] < 1
    after = {
        name.replace("base_layer.", ""): value for name, value in models[0].model.get_base_model().state_dict().items()
    }
    adapters = {name: value for name, value in after.items() if "lora_" in name}
    assert all((after[name] == value).all() for name, value in bases[0].items())
    assert any(value.any() for name, value in adapters.items() if "lora_B" in name)  # they begin at zero


def test_a_text_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"none at .*nothing\.txt(?s:.*)jargon-text"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(DataNotFoundError, match="more than 64 bytes, got 3"):
        text_windows(b"abc", 64)
