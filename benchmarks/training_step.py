"""Training step against `transformers` (SDPA, fused AdamW): same shapes, alternating in one process.

    python benchmarks/training_step.py --threads 2
    python benchmarks/training_step.py --quick

Both sides run with freed memory kept in the process (see engines/host_memory.py), which helps both.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict
from typing import Any

import measure


def main() -> None:
    """Measures every cell and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side per cell (default %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps of each side that do not count (default %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=12, help="layers of both models (default %(default)s)")
    parser.add_argument("--batch_scale", type=float, default=1.0, help="factor on batch sizes (default %(default)s)")
    parser.add_argument("--cells", default="bert,gpt2", help="models to measure (default %(default)s)")
    parser.add_argument("--precisions", default="fp32,bf16", help="number formats (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds of three-layer models; writes no file")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.warmup, options.layers = 3, 1, 3
    measure.pin(options.threads)

    import steps
    import torch

    torch.set_num_threads(options.threads)
    shapes: dict[str, tuple[steps.Kind, int, int]] = {"bert": ("bert", 16, 128), "gpt2": ("gpt2", 8, 256)}
    rows: list[list[object]] = []
    figures: list[dict[str, Any]] = []
    for name in options.cells.split(","):
        for precision in options.precisions.split(","):
            kind, batch, length = shapes[name]
            batch = max(1, round(batch * options.batch_scale))
            cell = steps.Cell(kind=kind, batch=batch, length=length, bf16=precision == "bf16", layers=options.layers)
            sample = steps.draw_sample(cell)
            ours, theirs = steps.our_step(cell, sample), steps.their_step(cell, sample)
            for _ in range(options.warmup):
                ours()
                theirs()
            our_seconds, their_seconds = measure.alternate(options.rounds, ours, theirs)
            ratio = measure.spread([b / a for a, b in zip(our_seconds, their_seconds, strict=True)])
            rates = [measure.spread([cell.tokens / s for s in side], 1) for side in (our_seconds, their_seconds)]
            speeds = {"tokens_per_second": rates[0], "transformers_tokens_per_second": rates[1]}
            figures.append({**asdict(cell), "ratio": ratio, **speeds})
            rows.append(
                [cell.name, *(rate["median"] for rate in rates), ratio["median"], ratio["lowest"], ratio["highest"]]
            )
            measure.print_table(("step", "ours tok/s", "transformers tok/s", "ratio", "lowest", "highest"), rows[-1:])
            del ours, theirs
            gc.collect()
    print()
    measure.print_table(("step", "ours tok/s", "transformers tok/s", "ratio", "lowest", "highest"), rows)
    if not options.quick:
        facts = measure.environment(options.threads, "torch", "transformers")
        measure.write_results("training_step", {"environment": facts, "cells": figures})


if __name__ == "__main__":
    main()
