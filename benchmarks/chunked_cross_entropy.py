"""Loss and gradients of a large vocabulary: projected a few rows at a time against all logits at once.

    python benchmarks/chunked_cross_entropy.py
    python benchmarks/chunked_cross_entropy.py --quick

Peak memory is that of separate processes that run one forward and backward pass each, less what the process held
before. Times are seconds on the processor, alternating in one process on one thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import measure

FORMS = ("plain", "fused")


def prepared(form: str, rows: int, hidden_size: int, vocab_size: int) -> Callable[[], tuple[float, Any]]:
    """Returns a function that makes loss and gradients of a fixed head and fixed hidden states."""
    import torch

    from tencentpretrain.engines.host_memory import keep_freed_memory
    from tencentpretrain.layers import cross_entropy

    keep_freed_memory()
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(rows, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(hidden_size**-0.5).requires_grad_()
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)

    def once() -> tuple[float, Any]:
        hidden.grad = weight.grad = None
        if form == "plain":
            total, _ = cross_entropy.cross_entropy_sum(torch.nn.functional.linear(hidden, weight), labels)
        else:
            total, _ = cross_entropy.linear_cross_entropy_sum(hidden, weight, None, labels)
        (total / rows).backward()
        return float(total.detach()), (hidden.grad, weight.grad)

    return once


def peak_of(form: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs one pass in a process of its own; returns its peak resident memory in MB, before it and in all."""
    command = [sys.executable, __file__, "--one", form, "--rows", options.rows, "--hidden_size", options.hidden_size]
    command += ["--vocab_size", options.vocab_size]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_one(options: argparse.Namespace) -> None:
    """Prints the peak memory of one pass; what the process of a form runs."""
    import torch

    torch.set_num_threads(1)
    once = prepared(options.one, options.rows, options.hidden_size, options.vocab_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total, _ = once()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"before_mb": round(before), "peak_mb": round(peak), "loss": total}))


def main() -> None:
    """Measures both forms and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="hidden states (default %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=512, help="their width (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=131072, help="classes (default %(default)s)")
    parser.add_argument("--timed_rows", type=int, default=512, help="hidden states when timing (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each form (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small vocabulary; writes no file")
    parser.add_argument("--one", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure.pin(1)
    if options.quick:
        options.vocab_size, options.rows, options.timed_rows, options.rounds = 16384, 512, 256, 1
    if options.one:
        run_one(options)
        return
    peaks = {form: peak_of(form, options) for form in FORMS}

    import torch

    torch.set_num_threads(1)
    steps = [prepared(form, options.timed_rows, options.hidden_size, options.vocab_size) for form in FORMS]
    (plain_loss, plain), (fused_loss, fused) = (step() for step in steps)
    differences = {
        "loss": abs(fused_loss - plain_loss) / plain_loss,
        **{
            name: float((ours - theirs).norm() / theirs.norm())
            for name, ours, theirs in zip(("hidden", "weight"), fused, plain, strict=True)
        },
    }
    del plain, fused
    gc.collect()
    seconds = measure.alternate(options.rounds, *steps, clock=time.process_time)
    ratio = measure.spread([fused / plain for plain, fused in zip(*seconds, strict=True)])
    extra = {form: peaks[form]["peak_mb"] - peaks[form]["before_mb"] for form in FORMS}
    logits = options.rows * options.vocab_size * 4 / 2**20
    measure.print_table(
        ("form", "peak MB", "of the pass", "seconds"),
        [
            [form, int(peaks[form]["peak_mb"]), int(extra[form]), measure.spread(seconds[index])["median"]]
            for index, form in enumerate(FORMS)
        ],
    )
    print(f"logits {logits:.0f} MB; fused / plain time {ratio['median']}; relative differences {differences}")
    if not options.quick:
        measure.write_results("chunked_cross_entropy", {
            "environment": measure.environment(1, "torch"),
            "rows": options.rows, "hidden_size": options.hidden_size, "vocab_size": options.vocab_size,
            "logits_mb": logits, "peaks": peaks, "peak_of_the_pass_mb": extra,
            "peak_ratio": round(extra["fused"] / extra["plain"], 3), "timed_rows": options.timed_rows,
            "processor_seconds": {form: measure.spread(seconds[index]) for index, form in enumerate(FORMS)},
            "time_ratio": ratio, "relative_differences": differences,
        })  # fmt: skip


if __name__ == "__main__":
    main()
