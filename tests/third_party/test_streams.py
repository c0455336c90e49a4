"""Data sets of other packages in mode ``prune``, from local files: LitData, MosaicML, WebDataset, Hugging Face.

MosaicML's package is not among the requirements, because it needs older releases than the others: install it apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import SparseLossMixin
from lightning_ast.errors import ConfigurationError
from lightning_ast.streams import BlockShuffle, IndexedStream, SampleFilter
from tests.helpers.training import SaveAt, assert_same_weights, weights
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, Witness, epochs_by_hand, fit, fresh, plan_by_hand, pruned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:The given NumPy array is not writable",
        "ignore:Your `IterableDataset` has `__len__` defined",
        "ignore::DeprecationWarning",
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]


def samples() -> list[dict[str, Any]]:
    images = Indexed()
    return [{"x": images.x[i].numpy(), "y": int(images.y[i]), "i": i} for i in range(SIZE)]


def write_litdata(folder: Path) -> None:
    pytest.importorskip("litdata")
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_size=40)
    for i, sample in enumerate(samples()):
        cache[i] = sample
    cache.done()
    cache.merge()


def litdata(folder: Path) -> Any:
    from litdata import StreamingDataset

    return StreamingDataset(str(folder), shuffle=True)


def write_mosaic(folder: Path) -> None:
    streaming = pytest.importorskip("streaming")
    columns = {"x": "ndarray", "y": "int", "i": "int"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=2**15) as writer:
        for sample in samples():
            writer.write(sample)


def mosaic(folder: Path) -> Any:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    return StreamingDataset(local=str(folder), shuffle=True, batch_size=32)


INDEXED = {"litdata": (write_litdata, litdata), "mosaicml-streaming": (write_mosaic, mosaic)}


@pytest.fixture(scope="module", params=INDEXED)
def indexed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    write, read = INDEXED[request.param]
    folder = tmp_path_factory.mktemp("stream")
    write(folder)
    return lambda: read(folder)


def blocks(stream: Any, **options: Any) -> DataLoader[Any]:
    dataset = IndexedStream(stream)
    return DataLoader(dataset, batch_size=32, sampler=BlockShuffle(dataset, block_size=40), **options)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_with_an_index_is_pruned_by_it(indexed: Any, workers: int) -> None:
    module = fresh()
    data = blocks(indexed(), num_workers=workers)
    fit(module, data, pruned())
    seen = module.epochs()
    for epoch in range(4):
        data.sampler.set_epoch(epoch)
        drawn = list(data.sampler)
        assert seen[epoch] == (drawn if epoch in (0, 3) else plan_by_hand(module, drawn, epoch=epoch, count=120))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("point", [("epoch end", 1, None), ("batch end", 2, 1)], ids=str)
def test_a_run_over_an_index_resumes_exactly(tmp_path: Path, indexed: Any, point: Any, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    straight, again = fresh(Cycle), fresh(Cycle, seed=7)
    fit(straight, blocks(indexed(), num_workers=workers), pruned(), SaveAt(path, *point))
    fit(again, blocks(indexed(), num_workers=workers), pruned(), ckpt_path=path)
    assert again.batches == straight.batches[-len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))


def test_a_stream_as_it_is_names_what_to_do(indexed: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"StreamingDataset has an index: wrap it, IndexedStream\(dataset\)"):
        fit(fresh(), DataLoader(indexed(), batch_size=32), pruned())


class Keyed(SparseLossMixin, Witness):
    """Reads dicts, and tells the numbers of their samples."""

    def sample_indices(self, batch: Any) -> Tensor:
        return batch["i"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"], batch["i"]), batch_idx)


def write_webdataset(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=50, verbose=0) as writer:
        for sample in samples():
            writer.write({"__key__": f"{sample['i']:06d}", "x.npy": sample["x"], "y.cls": sample["y"]})


def from_webdataset(folder: Path, decoded: list[int]) -> tuple[SampleFilter, Any]:
    import webdataset

    def named(sample: dict[str, Any]) -> dict[str, Any]:
        decoded.append(int(sample["__key__"]))
        return {"x": sample["x.npy"], "y": sample["y.cls"], "i": int(sample["__key__"])}

    sample_filter = SampleFilter(size=SIZE, key=lambda sample: int(sample["__key__"]))
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return sample_filter, webdataset.WebDataset(shards, shardshuffle=False).select(sample_filter).decode().map(named)


def write_hugging_face(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = samples()
    columns = {name: [row[name] for row in rows] for name in ("y", "i")} | {"x": [row["x"].tolist() for row in rows]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))


def from_hugging_face(folder: Path, decoded: list[int]) -> tuple[SampleFilter, Any]:
    import datasets

    def read(sample: dict[str, Any]) -> dict[str, Any]:
        decoded.append(int(sample["i"]))
        return sample

    sample_filter = SampleFilter(size=SIZE, key=lambda sample: int(sample["i"]))
    stream = datasets.load_from_disk(str(folder)).to_iterable_dataset(num_shards=4)
    return sample_filter, stream.filter(sample_filter).map(read).with_format("torch")


STREAMS = {"webdataset": (write_webdataset, from_webdataset), "datasets": (write_hugging_face, from_hugging_face)}


@pytest.fixture(scope="module", params=STREAMS)
def streamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    write, read = STREAMS[request.param]
    folder = tmp_path_factory.mktemp("stream")
    write(folder)
    return lambda decoded: read(folder, decoded)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_a_filter_in_front_of_decoding(streamed: Any, options: Any) -> None:
    decoded: list[int] = []
    sample_filter, stream = streamed(decoded)
    module = fresh(Keyed)
    fit(module, DataLoader(stream, batch_size=32, **options), pruned(sample_filter=sample_filter))
    planned = epochs_by_hand(module)
    assert {epoch: sorted(numbers) for epoch, numbers in module.epochs().items()} == planned
    if not options:
        assert decoded == [number for epoch in range(4) for number in planned[epoch]], "no other was decoded"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("point", [("epoch end", 1, None), ("batch end", 2, 0)], ids=str)
def test_a_filtered_run_resumes_exactly(tmp_path: Path, streamed: Any, point: Any, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    runs = []
    for save, start, seed in ((SaveAt(path, *point), None, 0), (None, path, 7)):
        sample_filter, stream = streamed([])
        runs.append(fresh(Keyed, seed=seed))
        data = DataLoader(stream, batch_size=32, num_workers=workers)
        fit(runs[-1], data, pruned(sample_filter=sample_filter), *([save] if save else []), ckpt_path=start)
    straight, again = runs
    assert again.batches == straight.batches[-len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_hugging_face_in_torch_format(tmp_path: Path, workers: int) -> None:
    write_hugging_face(tmp_path / "rows")
    import datasets

    rows = datasets.load_from_disk(str(tmp_path / "rows")).with_format("torch")
    runs = []
    for save, start in ((SaveAt(tmp_path / "run.ckpt", "batch end", 2, 1), None), (None, tmp_path / "run.ckpt")):
        torch.manual_seed(0)
        runs.append(Keyed())
        fit(
            runs[-1],
            DataLoader(rows, batch_size=32, num_workers=workers),
            pruned(),
            *([save] if save else []),
            ckpt_path=start,
        )
    straight, again = runs
    assert straight.epochs() == epochs_by_hand(straight)
    assert again.batches == straight.batches[-len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))
