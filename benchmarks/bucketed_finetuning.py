"""Fine-tuning with rows of like length in a batch (`--bucket_by_length`) against the plain order, in tokens per second.

    python benchmarks/bucketed_finetuning.py --train <table> --vocab <vocabulary>
    python benchmarks/bucketed_finetuning.py --quick

A step is forward, backward and update of a classifier; batches are as wide as their longest row on both sides. Padding
does not count as tokens. Times are seconds on the processor, alternating in one process on one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import measure

SHARED = measure.ROOT.parent / "shared/data"


def main() -> None:
    """Measures both orders and writes the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=SHARED / "tasks/chnsenticorp/train.tsv", help="training table")
    parser.add_argument("--vocab", type=Path, default=SHARED / "vocab/google_zh_vocab.txt", help="vocabulary")
    parser.add_argument("--config", default="models/bert/mini_config.json", help="model (default %(default)s)")
    parser.add_argument("--seq_length", type=int, default=256, help="longest row (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each side (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two steps of short rows; writes no file")
    options = parser.parse_args()
    measure.pin(1)
    if options.quick:
        options.steps, options.seq_length = 2, 128

    import torch

    from tencentpretrain.config.loading import load_config
    from tencentpretrain.config.train import OptimConfig, PrecisionConfig
    from tencentpretrain.data.batch import Batch
    from tencentpretrain.engines.local import LocalEngine
    from tencentpretrain.model import build_model
    from tencentpretrain.optim.build import build_optimizer
    from tencentpretrain.tasks.examples import bucketed_batches, encode_texts, shuffled_batches
    from tencentpretrain.tasks.heads import ClassificationHead, TaskModel
    from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer

    torch.set_num_threads(1)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=str(options.vocab)))
    header, *lines = options.train.read_text(encoding="utf-8").splitlines()
    column = header.split("\t").index("text_a")
    examples = encode_texts([line.split("\t")[column] for line in lines], None, tokenizer, options.seq_length)
    orders = {
        "bucketed": list(bucketed_batches(examples.lengths, options.batch_size, seed=7, epoch=1)),
        "shuffled": list(shuffled_batches(len(examples), options.batch_size, seed=7, epoch=1)),
    }
    positions = {
        name: sum(len(rows) * int(examples.lengths[rows].max()) for rows in order) for name, order in orders.items()
    }

    def trainer_of(batches: list[Batch]) -> Any:
        config = load_config(str(measure.ROOT / options.config), target=(), decoder=None)
        body = build_model(config, tokenizer.vocab_size, seed=7)
        model = TaskModel(body, ClassificationHead(config, 2)).train()
        engine = LocalEngine(PrecisionConfig(device="cpu"))
        optimizer = engine.prepare(model, lambda placed: build_optimizer(placed, OptimConfig(learning_rate=1e-5)))
        remaining = iter(batches)

        def step() -> None:
            batch = next(remaining)
            logits = model(batch)
            engine.backward(torch.nn.functional.cross_entropy(logits, torch.zeros(batch.size, dtype=torch.int64)))
            engine.update(optimizer, (), max_norm=1.0)

        return step

    # Batches spread over the whole epoch, so that long and short ones are measured in their true proportion.
    taken = {
        name: [order[len(order) * number // (options.steps + 1)] for number in range(options.steps + 1)]
        for name, order in orders.items()
    }
    batches = {
        name: [examples.batch(rows, pad_id=tokenizer.pad_id) for rows in chosen] for name, chosen in taken.items()
    }
    steps = [trainer_of(batches[name]) for name in orders]
    for step in steps:
        step()
    seconds = measure.alternate(options.steps, *steps, clock=time.process_time)
    rates = {
        name: sum(batch.token_count for batch in batches[name][1:]) / sum(side)
        for name, side in zip(orders, seconds, strict=True)
    }
    # What one position costs, times the positions of the whole epoch: free of which batches were drawn.
    cost = {
        name: sum(side) / sum(batch.token_ids.numel() for batch in batches[name][1:])  # type: ignore[union-attr]
        for name, side in zip(orders, seconds, strict=True)
    }
    epoch = {name: cost[name] * positions[name] for name in orders}
    real = int(examples.lengths.sum())
    share = {name: round(real / count, 4) for name, count in positions.items()}
    ratio = rates["bucketed"] / rates["shuffled"]
    measure.print_table(
        ("order", "real tokens of an epoch's positions", "tokens/s", "epoch, s"),
        [[name, share[name], round(rates[name], 1), round(epoch[name], 1)] for name in orders],
    )
    whole = epoch["shuffled"] / epoch["bucketed"]
    print(f"tokens/s, bucketed / shuffled: {ratio:.3f} over the steps measured, {whole:.3f} over an epoch")
    if not options.quick:
        measure.write_results("bucketed_finetuning", {
            "environment": measure.environment(1, "torch"), "table": options.train.name, "rows": len(examples),
            "model": options.config, "seq_length": options.seq_length, "batch_size": options.batch_size,
            "share_of_real_tokens": share, "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
            "ratio": round(ratio, 3), "epoch_ratio": round(whole, 3),
            "epoch_processor_seconds": {name: round(value, 1) for name, value in epoch.items()},
            "processor_seconds": dict(zip(orders, seconds, strict=True)),
        })  # fmt: skip


if __name__ == "__main__":
    main()
