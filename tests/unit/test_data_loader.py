"""The stream of batches: each sample once an epoch, exact restart, the same for any number of workers and ranks."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import make_processor, make_store

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.data.legacy import LegacyDataset
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.samples import SampleStream, open_dataset
from tencentpretrain.data.settings import with_store_settings
from tencentpretrain.errors import DataFormatError, ResourceError
from tencentpretrain.registry import PROCESSORS


def flat(batch: Batch) -> bytes:
    tensors = [batch.token_ids, batch.segment_ids, *batch.labels.values(), batch.decoder_token_ids]
    return b"".join(np.asarray(tensor).tobytes() for tensor in tensors if tensor is not None)


def batches(loader: Loader, count: int) -> list[bytes]:
    return [flat(batch) for batch in islice(iter(loader), count)]


@pytest.mark.parametrize("name", ["bert", "mlm", "lm", "t5"])
def test_restart_at_every_position(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path, name)
    processor = make_processor(tmp_path, name)
    share = {"batch_size": 7, "seed": 5, "shuffle": True, "num_workers": 0}
    whole = Loader(store, processor, **share)
    count = 2 * sum(whole._stream.epoch_sizes()) // 7 + 2
    expected = batches(whole, count)
    assert whole.position == count * 7
    for start in range(count):
        resumed = Loader(store, processor, start=start * 7, **share)
        assert batches(resumed, 1) == expected[start : start + 1]
    assert len(set(expected)) > count // 2


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, num_workers: int) -> None:
    store = make_store(tmp_path, "bert")
    processor = make_processor(tmp_path, "bert")
    drawn = batches(Loader(store, processor, batch_size=4, seed=5, shuffle=True, start=8, num_workers=0), 40)
    loader = Loader(store, processor, batch_size=4, seed=5, shuffle=True, start=8, num_workers=num_workers)
    assert batches(loader, 40) == drawn
    assert loader.position == 8 + 160
    assert loader.waiting_seconds > 0


def test_every_sample_once_an_epoch_over_ranks(tmp_path: Path) -> None:
    store = make_store(tmp_path, "lm")
    processor = make_processor(tmp_path, "lm")
    stream = SampleStream(store, processor, seed=5, shuffle=False)
    size = stream.epoch_sizes()[0]
    expected = Counter(stream[index].token_ids.tobytes() for index in range(size))
    for shuffle in (True, False):
        shuffled = SampleStream(store, processor, seed=5, shuffle=shuffle)
        for epoch in range(3):
            seen = Counter(shuffled[epoch * size + index].token_ids.tobytes() for index in range(size))
            assert seen == expected
    single = Loader(store, processor, batch_size=6, seed=5, shuffle=True, num_workers=0)
    ranks = [
        Loader(store, processor, batch_size=2, seed=5, shuffle=True, rank=rank, world_size=3, num_workers=0)
        for rank in range(3)
    ]
    for whole, *parts in islice(zip(single, *ranks, strict=False), 30):
        rows = [np.asarray(part.token_ids) for part in parts]
        assert np.array_equal(np.asarray(whole.token_ids), np.stack(rows, axis=1).reshape(6, -1))
    assert {loader.position for loader in ranks} == {single.position}


def test_epochs_differ_and_seeds_differ(tmp_path: Path) -> None:
    store = make_store(tmp_path, "lm")
    processor = make_processor(tmp_path, "lm")
    size = Loader(store, processor, batch_size=1, seed=5, shuffle=True).epoch_size
    first = batches(Loader(store, processor, batch_size=size, seed=5, shuffle=True, num_workers=0), 2)
    other = batches(Loader(store, processor, batch_size=size, seed=6, shuffle=True, num_workers=0), 1)
    assert len({*first, *other}) == 3
    plain = batches(Loader(store, processor, batch_size=size, seed=5, shuffle=False, num_workers=0), 2)
    assert plain[0] == plain[1]


def test_static_masks_come_back_and_dynamic_ones_do_not(tmp_path: Path) -> None:
    store = make_store(tmp_path, "mlm")
    for dynamic, versions in ((False, 3), (True, 7)):
        processor = make_processor(tmp_path, "mlm", dup_factor=3, dynamic_masking=dynamic)
        size = Loader(store, processor, batch_size=1, seed=5, shuffle=False).epoch_size
        seen = batches(Loader(store, processor, batch_size=size, seed=5, shuffle=False, num_workers=0), 7)
        assert len(set(seen)) == versions


def test_batch_larger_than_the_data_and_no_data(tmp_path: Path) -> None:
    store = make_store(tmp_path, "lm", "w1 w2\nw3\n")
    processor = make_processor(tmp_path, "lm")
    batch = next(iter(Loader(store, processor, batch_size=5, seed=1, shuffle=True, num_workers=0)))
    assert batch.size == 5
    empty = make_store(tmp_path / "short", "lm", "w1 w2\n")
    packed = make_processor(tmp_path / "short", "lm", full_sentences=True)
    with pytest.raises(DataFormatError, match="not a single sample"):
        Loader(empty, packed, batch_size=5, seed=1, shuffle=True)
    pairs = make_store(tmp_path / "pairs", "prefixlm", "w1 " * 30 + "\tw2\n")
    with pytest.raises(DataFormatError, match="too long for seq_length"):
        Loader(pairs, make_processor(tmp_path / "pairs", "prefixlm"), batch_size=5, seed=1, shuffle=True)


def test_an_error_in_a_worker_arrives(tmp_path: Path) -> None:
    store = make_store(tmp_path, "lm")
    loader = Loader(store, make_processor(tmp_path, "lm"), batch_size=4, seed=1, shuffle=True, num_workers=1)
    shard = store.path / store.header.shards[-1].name
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataFormatError, match=shard.name):
        batches(loader, 60)


@pytest.mark.parametrize("name", sorted(PROCESSORS.names()))
def test_old_data_sets_are_read(tmp_path: Path, name: str) -> None:
    """The instances that a processor writes in the old form give the batches that it gives itself."""
    store = make_store(tmp_path, name)
    processor = make_processor(tmp_path, name, loss_on_final_pad=True)
    plan = processor.plan(store, 0)
    examples = [processor.sample(store, plan, index, np.random.default_rng(index)) for index in range(len(plan))]
    path = tmp_path / "dataset.pt"
    with path.open("wb") as file:
        for example in examples:
            pickle.dump(processor.encode_instance(example), file)
    dataset = open_dataset(path, name)
    assert isinstance(dataset, LegacyDataset)
    assert len(dataset) == len(examples)
    data = with_store_settings(DataConfig(data_processor=name, loss_on_final_pad=True), dataset, lambda key: False)
    assert data.seq_length == 24
    loader = Loader(
        dataset, type(processor)(data, *_tokenizer(tmp_path)), batch_size=4, seed=1, shuffle=False, num_workers=1
    )
    found = list(islice(iter(loader), 3))
    expected = processor.collate(examples[:4])
    assert found[0].size == 4
    if name not in ("mlm", "t5", "cls_mlm", "bart"):  # whose old instances are masked when they are read
        assert flat(found[0]) == flat(expected)


def _tokenizer(folder: Path) -> tuple[Any]:
    from data_samples import tokenizer_of

    return (tokenizer_of(folder)(),)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never-made-by-a-data-set"),))


def test_old_data_sets_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "dataset.pt"
    good = ((([2, 5, 3], 4)), [3])
    for bad in (_Evil(), ([2, _Evil()], 4), np.array([1]), {"a": 1}, [1], 5):
        path.write_bytes(pickle.dumps(good) + pickle.dumps(bad))
        with pytest.raises(DataFormatError, match="instance 1 at byte") as caught:
            open_dataset(path, "lm")
        assert str(path) in str(caught.value)
    assert not Path("/tmp/never-made-by-a-data-set").exists()
    path.write_bytes(pickle.dumps(good)[:-3])
    with pytest.raises(DataFormatError, match="instance 0"):
        open_dataset(path, "lm")
    path.write_bytes(pickle.dumps(good))
    dataset = open_dataset(path, "bert")
    processor = make_processor(tmp_path, "bert")
    with pytest.raises(DataFormatError, match="do not have the form"):
        next(iter(Loader(dataset, processor, batch_size=1, seed=1, shuffle=False, num_workers=0)))


def test_a_killed_loader_process_is_reported(tmp_path: Path) -> None:
    store = make_store(tmp_path, "lm")
    loader = Loader(store, make_processor(tmp_path, "lm"), batch_size=4, seed=1, shuffle=True, num_workers=1)
    iterator = iter(loader)
    next(iterator)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(ResourceError, match="loader process 0 ended"):
        list(islice(iterator, 100))
