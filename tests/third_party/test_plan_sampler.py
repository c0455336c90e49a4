"""The plan as a sampler in the Trainer of Hugging Face, as docs/samples.md shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core import SampleSelector, SignificanceHistory, SignificanceSampler, plan_epoch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SIZE = 64


class Net(nn.Module):
    """As small as the Trainer allows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.layer(x))


def train(folder: Path, *, resume: bool = False, epochs: int = 3) -> tuple[SignificanceSampler, list[Any], Net]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sampler = SignificanceSampler(SIZE, target_activation_rate=0.5)
    seen: list[Any] = []

    class SparseTrainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> SignificanceSampler:
            return sampler

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            indices = inputs.pop("index")
            outputs = model(**inputs)
            losses = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
            if model.training:
                sampler.observe(indices, losses)
                seen.append((sampler.epoch, indices.tolist(), losses.detach()))
            return (losses.mean(), outputs) if return_outputs else losses.mean()

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SIZE, 4, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)
    rows = [{"index": i, "x": x[i], "labels": y[i]} for i in range(SIZE)]
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    net = Net()
    SparseTrainer(model=net, args=settings, train_dataset=rows).train()
    return sampler, seen, net


def test_each_epoch_loads_its_plan(tmp_path: Path) -> None:
    _, seen, _ = train(tmp_path)
    for epoch in (1, 2):
        history = SignificanceHistory(SIZE)
        for before in range(epoch):
            for at, indices, losses in seen:
                if at == before:
                    history.observe(torch.tensor(indices), losses)
            history.fold()
        draws = torch.randperm(SIZE, generator=torch.Generator().manual_seed(epoch))
        plan = plan_epoch(history, draws, epoch=epoch, count=32, selector=SampleSelector(weighting="none"))
        assert [i for at, indices, _ in seen if at == epoch for i in indices] == plan.indices.tolist()
