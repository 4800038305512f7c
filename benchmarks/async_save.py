"""How long a save holds up training, with saving in the step and in the background. Writes results/async_save.json."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

import torch

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.model import build_model
from tencentpretrain.optim.build import build_optimizer
from tencentpretrain.train.recorder import RunRecorder
from tencentpretrain.train.run_folder import RunFolder
from tencentpretrain.train.signals import StopRequest
from tencentpretrain.train.trainer import Trainer

_VOCAB_SIZE, _LENGTH, _BATCH = 8000, 128, 8


class _Batches:
    position = 0
    waiting_seconds = 0.0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.position)
            token_ids = torch.randint(1, _VOCAB_SIZE, (_BATCH, _LENGTH + 1), generator=generator)
            self.position += _BATCH
            segment_ids = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
            yield Batch(token_ids=token_ids[:, :-1], segment_ids=segment_ids, labels={"lm": token_ids[:, 1:]})


def measure(folder: Path, *, async_save: bool, steps: int, save_steps: int, layers: int, threads: int) -> dict:
    """Trains and returns seconds: of a step far from saves, that `save` holds the loop, and of steps during a save."""
    config = ModelConfig(
        emb_size=512, hidden_size=512, feed_forward_size=2048, num_heads=8, num_layers=layers, hidden_act="gelu",
        max_seq_length=_LENGTH, dropout=0.0, embedding=("word", "pos"), encoder="transformer", mask="causal",
        target=("lm",),
    )  # fmt: skip
    engine = LocalEngine(PrecisionConfig(device="cpu", threads=threads))
    model = build_model(config, _VOCAB_SIZE, seed=1)
    optimizer = engine.prepare(model, lambda prepared: build_optimizer(prepared, OptimConfig()))
    settings = TrainConfig(output_model_path=str(folder / "model"), total_steps=steps, save_checkpoint_steps=save_steps)
    ends: list[float] = []
    held: list[float] = []
    with RunFolder(settings.output_model_path, 1) as run_folder:
        recorder = RunRecorder(
            run_folder, published=lambda name: True, model_format="bin", async_save=async_save, identity={}
        )
        save, progress = recorder.save, recorder.progress

        def timed_save(trainer, weights_names):
            began = time.perf_counter()
            save(trainer, weights_names)
            held.append(time.perf_counter() - began)

        def timed_progress(step):
            progress(step)
            ends.append(time.perf_counter())

        recorder.save, recorder.progress = timed_save, timed_progress
        with recorder:
            trainer = Trainer(
                model, optimizer, engine, learning_rate=lambda updates: 1e-4, batches=_Batches(), config=settings,
                recorder=recorder,
            )  # fmt: skip
            trainer.fit(StopRequest())
    # The step after a save begins when the save lets the loop go; a sync save is not part of any step.
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    quiet = statistics.median(seconds[save_steps // 2 : save_steps - 1])
    interval = [ends[number * save_steps - 1] for number in range(1, steps // save_steps)]
    whole = [after - before for before, after in itertools.pairwise(interval)]
    path = run_folder.checkpoints.path(steps)
    return {
        "async_save": async_save,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checkpoint_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "step_seconds": quiet,
        "held_seconds": statistics.median(held[:-1]),
        "held_seconds_all": [round(one, 4) for one in held],
        "seconds_between_saves": statistics.median(whole),
        "stall_seconds": statistics.median(whole) - save_steps * quiet,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save_steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "async_save.json")
    options = parser.parse_args()
    rows = []
    for async_save in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                measure(
                    Path(folder),
                    async_save=async_save,
                    steps=options.steps,
                    save_steps=options.save_steps,
                    layers=options.layers,
                    threads=options.threads,
                )
            )
        print(json.dumps(rows[-1]), flush=True)
    load = os.getloadavg()[0]
    result = {"cores": os.cpu_count(), "load_average": round(load, 1), "threads": options.threads, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
