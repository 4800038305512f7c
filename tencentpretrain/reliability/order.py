"""R12, R14: which samples a step sees depends on nothing but the step."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tencentpretrain.checkpoint.training import CheckpointFolder
from tencentpretrain.config.run import load_run
from tencentpretrain.data.batch import Batch
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.samples import open_dataset
from tencentpretrain.registry import ROWS
from tencentpretrain.reliability import runs
from tencentpretrain.reliability.row import Row, Scale
from tencentpretrain.tokenizers import build_tokenizer
from tencentpretrain.train.data import TrainingData, open_data

_BATCH, _EPOCH, _EPOCHS = 4, 40, 3


def data_of(flags: Sequence[str]) -> TrainingData:
    """Opens the data of a run as `pretrain` does."""
    run = load_run([*flags, "--output_model_path", "unused"])
    target = build_tokenizer(run.tgt_tokenizer) if run.tgt_tokenizer else None
    dataset = open_dataset(run.data.dataset_path, run.data.data_processor)
    return open_data(run.data, dataset, build_tokenizer(run.tokenizer), target)


def batch_bytes(batch: Batch) -> bytes:
    """Returns all numbers of a batch."""
    tensors = [batch.token_ids, batch.segment_ids, *batch.labels.values()]
    tensors += [tensor for tensor in (batch.decoder_token_ids, batch.decoder_segment_ids) if tensor is not None]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)  # type: ignore[union-attr]


def _drawn(loader: Loader, count: int) -> list[bytes]:
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        return [batch_bytes(batch) for batch in itertools.islice(batches, count)]


@ROWS.register("R12")
def check_places(scale: Scale, folder: Path) -> Row:
    """Every place of three epochs as the place to continue from."""
    steps = _EPOCHS * _EPOCH
    interval = 1 if scale == "full" else _EPOCH
    flags = runs.prepare("mlm", folder, steps, interval, lines=_BATCH * _EPOCH, longest=20, batch_size=_BATCH)
    flags += ["--num_workers", "0", "--save_total_limit", "0"]
    data = data_of(flags)
    whole = data.loader(start=0, rank=0, world_size=1)
    exact = whole.epoch_size == _BATCH * _EPOCH
    expected = _drawn(whole, steps)
    rest = steps if scale == "full" else 4
    equal = 0
    for place in range(steps + 1):
        loader = data.loader(start=place * _BATCH, rank=0, world_size=1)
        count = min(rest, steps - place)
        equal += _drawn(loader, count) == expected[place : place + count]
    epochs = [expected[first : first + _EPOCH] for first in range(0, steps, _EPOCH)]
    distinct = len({tuple(epoch) for epoch in epochs}) == _EPOCHS
    alone = folder / "alone"
    runs.train_alone(flags, alone)
    places = range(0, steps + 1, interval)
    ended = sum(_continued_from(flags, alone, folder / f"from-{place}", place, steps) for place in places)
    return Row(
        name="R12",
        promised=(
            "resume in any epoch, at its end, at step 0, the last step, after it: sample ids equal the uninterrupted "
            "list: 3 epochs x every step of a 40-step epoch"
        ),
        reached=(
            f"{equal}/{steps + 1} places: the {'whole rest' if scale == 'full' else f'next {rest} steps'} equal in "
            f"every number; {ended}/{len(places)} whole runs continued there end identical"
        ),
        passed=exact and distinct and equal == steps + 1 and ended == len(places),
    )


def _continued_from(flags: Sequence[str], alone: Path, output: Path, place: int, steps: int) -> bool:
    """Takes the checkpoints after a step away and lets the run continue."""
    runs.copy_run(alone, output)
    checkpoints = CheckpointFolder(runs.checkpoints_of(output))
    for step in checkpoints.steps():
        if step > place:
            shutil.rmtree(checkpoints.path(step))
    if place == steps:  # a finished run is left as it is, so its weights are those it wrote
        shutil.copy(f"{alone}-{steps}", f"{output}-{steps}")
    good = runs.train(flags, output) == 0 and not runs.differences(alone, output, steps)
    shutil.rmtree(f"{output}.run")
    for file in output.parent.glob(f"{output.name}-*"):
        file.unlink()
    return good


@ROWS.register("R14")
def check_workers(scale: Scale, folder: Path) -> Row:
    """Loader processes, buffer and preprocessing processes."""
    counts = (0, 1, 2, 7, 16) if scale == "full" else (0, 2)
    steps = 60 if scale == "full" else 12
    flags = runs.prepare("bert", folder, steps, 6)
    data = data_of(flags)
    first = 8
    batches = []
    for count in counts:
        config = data.config.model_copy(update={"num_workers": count, "instances_buffer_size": 7 + count})
        changed = TrainingData(config=config, dataset=data.dataset, dev_dataset=None, processor=data.processor)
        batches.append(_drawn(changed.loader(start=first, rank=0, world_size=1), 80))
    same_batches = sum(drawn == batches[0] for drawn in batches)
    stores = set()
    for count in (max(1, count) for count in counts):
        place = folder / f"store-{count}"
        source = ["--corpus_path", str(folder / "corpus.txt"), "--dataset_path", str(place), "--shard_bytes", "2000"]
        cut = flags[2 : flags.index("--config_path")]
        status = runs.run(
            runs.command("preprocess"), [*source, *cut, "--processes_num", str(count)], folder / f"{place.name}.txt"
        )
        stores.add((status, _digest(place)))
    alone = folder / "alone"
    runs.train_alone(flags, alone, "--num_workers", "0")
    ended = 0
    for count in counts[1:]:  # the second half with another number of processes than the first
        output = folder / f"workers-{count}"
        runs.copy_run(alone, output)
        checkpoints = CheckpointFolder(runs.checkpoints_of(output))
        for step in checkpoints.steps()[1:]:
            shutil.rmtree(checkpoints.path(step))
        more = ["--num_workers", str(count), "--instances_buffer_size", str(10 + count)]
        ended += runs.train(flags, output, *more) == 0 and not runs.differences(alone, output, steps)
    return Row(
        name="R14",
        promised="loader workers, prefetch, buffer, preprocessing processes 0, 1, 2, 7, 16: identical",
        reached=(
            f"{', '.join(map(str, counts))} loader processes: {same_batches}/{len(counts)} give the same 80 batches, "
            f"{ended}/{len(counts) - 1} runs changed to them half-way end identical; {len(stores)} different data set "
            "from as many preprocessing processes"
        ),
        passed=same_batches == len(counts)
        and ended == len(counts) - 1
        and len(stores) == 1
        and next(iter(stores))[0] == 0,
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
