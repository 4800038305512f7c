"""How near BERT-base training comes to the time that its matrix products alone need.

The bound divides the floating-point operations of all products of one step by the best rate that this machine reaches
on any product of the model, measured as a plain product of contiguous matrices. A second bound adds up the measured
times of every product, forward and backward. A profile tells what the rest of the step is spent on.

    python benchmarks/matmul_bound.py --threads 2
    python benchmarks/matmul_bound.py --threads 2 --compile     # also `transformers` compiled, which takes minutes
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import measure

if TYPE_CHECKING:
    import steps
    import torch

HIDDEN, INNER, HEADS, HEAD_DIM = 768, 3072, 12, 64

CLASSES = {
    "dropout": (
        r"_?(Add)?Dropout|_ExplicitAttention|(native_)?dropout|bernoulli|ge$|threshold_|relu|clamp_min|abs|bitwise|random"
    ),
    "matrix products": r"(add|badd|b)?mm|(mkldnn_)?linear$|_?scaled_dot_product|_flash_attention",
    "softmax of attention and loss": r"_?(log_)?softmax|nll_loss|logsumexp|amax|argmax|scatter|gather|_CrossEntropySum",
    "activation": r"gelu|silu|tanh|sigmoid|erf",
    "norms": r"(native_)?layer_norm|_ToolkitNorm",
    "optimizer and clipping": r"_fused_adamw|linalg_vector_norm|_foreach|Optimizer",
    "casts, copies, transposes": r"copy_|_to_copy|cat|clone|contiguous",
    "embedding": r"embedding|index",
    "sums, products and fills by element": r"add_?$|mul_?$|sub_?$|div_?$|sum|fill_|zero|where|neg|pow|rsub",
}
"""Names of profiled operations, matched at their beginning, without the prefix `aten::`."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product (rows, inner) x (inner, columns) that occurs `count` times in a forward pass, `batch` at a time."""

    name: str
    rows: int
    inner: int
    columns: int
    count: int
    batch: int = 1

    @property
    def operations(self) -> int:
        """Floating-point operations of one forward pass; the backward pass has twice as many."""
        return 2 * self.rows * self.inner * self.columns * self.batch * self.count

    def backward(self) -> tuple[Product, Product]:
        """The products for the gradients of both factors."""
        name, rows, inner, columns = self.name, self.rows, self.inner, self.columns
        return (
            Product(
                name=f"{name}, grad 1", rows=rows, inner=columns, columns=inner, count=self.count, batch=self.batch
            ),
            Product(
                name=f"{name}, grad 2", rows=inner, inner=rows, columns=columns, count=self.count, batch=self.batch
            ),
        )


def products(cell: steps.Cell, vocab_size: int) -> list[Product]:
    """Lists the products of a forward pass."""
    tokens, heads, predicted = cell.tokens, cell.batch * HEADS, round(0.15 * cell.tokens)
    length, layers = cell.length, cell.layers
    return [
        Product(name="query, key, value, output", rows=tokens, inner=HIDDEN, columns=HIDDEN, count=4 * layers),
        Product(name="feed-forward up", rows=tokens, inner=HIDDEN, columns=INNER, count=layers),
        Product(name="feed-forward down", rows=tokens, inner=INNER, columns=HIDDEN, count=layers),
        Product(name="scores", rows=length, inner=HEAD_DIM, columns=length, count=layers, batch=heads),
        Product(name="mixing", rows=length, inner=length, columns=HEAD_DIM, count=layers, batch=heads),
        Product(name="mlm transform", rows=predicted, inner=HIDDEN, columns=HIDDEN, count=1),
        Product(name="vocabulary", rows=predicted, inner=HIDDEN, columns=vocab_size, count=1),
    ]


def seconds_of(product: Product, dtype: torch.dtype, repeats: int) -> float:
    """Measures one product, plain and contiguous: the median of some repeats."""
    import torch

    left = torch.randn(product.batch, product.rows, product.inner).to(dtype)
    right = torch.randn(product.batch, product.inner, product.columns).to(dtype)
    if product.batch == 1:
        left, right = left[0], right[0]
    output = left @ right
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.matmul(left, right, out=output)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def bounds(cell: steps.Cell, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Measures every product of a step and derives both bounds."""
    import torch

    dtype = torch.bfloat16 if cell.bf16 else torch.float32
    rows, rates, total, operations = [], [], 0.0, 0
    for forward in products(cell, vocab_size):
        for product in (forward, *forward.backward()):
            seconds = seconds_of(product, dtype, repeats)
            rate = product.operations / product.count / seconds
            rates.append(rate)
            total += seconds * product.count
            operations += product.operations
            milliseconds = round(1e3 * seconds, 3)
            rows.append({"product": product.name, "milliseconds": milliseconds, "gflops": round(rate / 1e9, 1)})
    best = max(rates)
    return {
        "operations": operations,
        "best_gflops": round(best / 1e9, 1),
        "seconds_at_best_rate": round(operations / best, 4),
        "seconds_of_products": round(total, 4),
        "tokens_per_second_at_best_rate": round(cell.tokens * best / operations, 1),
        "tokens_per_second_of_products": round(cell.tokens / total, 1),
        "products": rows,
    }


def breakdown(step: steps.Step) -> dict[str, float]:
    """Profiles one step: the share of each class of operations, by time spent in the operation itself."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
        kind = next((kind for kind, pattern in CLASSES.items() if re.match(pattern, name)), "other")
        times[kind] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: round(seconds / total, 4) for kind, seconds in sorted(times.items(), key=lambda item: -item[1])}


def main() -> None:
    """Measures the bound, then each side's share of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples per step (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sample (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count (default %(default)s)")
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bfloat16")
    parser.add_argument("--compile", action="store_true", help="also measure `transformers` compiled")
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds; writes no file")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.warmup = 2, 1
    measure.pin(options.threads)

    import steps
    import torch

    torch.set_num_threads(options.threads)
    layers = 2 if options.quick else 12
    cell = steps.Cell(kind="bert", batch=options.batch, length=options.length, bf16=not options.fp32, layers=layers)
    sample = steps.draw_sample(cell)
    sides = {"ours": steps.our_step(cell, sample), "transformers": steps.their_step(cell, sample)}
    if options.compile:
        sides["transformers compiled"] = steps.their_step(cell, sample, compiled=True)
    for _ in range(options.warmup):
        for step in sides.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    repeats = 3 if options.quick else 7
    bound_rounds = [bounds(cell, steps.VOCAB_SIZE["bert"], repeats)]
    for _ in range(options.rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    bound_rounds.append(bounds(cell, steps.VOCAB_SIZE["bert"], repeats))
    bound = min(bound_rounds, key=lambda each: each["seconds_at_best_rate"])  # the faster one is the stricter bound
    figures: dict[str, Any] = {}
    for name in sides:
        figures[name] = {
            "tokens_per_second": measure.spread([cell.tokens / value for value in seconds[name]], 1),
            "share_of_best_rate": measure.spread([bound["seconds_at_best_rate"] / value for value in seconds[name]]),
            "share_of_products": measure.spread([bound["seconds_of_products"] / value for value in seconds[name]]),
            "breakdown": breakdown(sides[name]) if "compiled" not in name else None,
        }
    del sides
    gc.collect()

    print(f"{cell.name}, {options.threads} threads: {bound['operations'] / 1e12:.2f} T operations per step")
    measure.print_table(("product", "ms", "Gflop/s"), [list(row.values()) for row in bound["products"]])
    print()
    keys = ("tokens_per_second", "share_of_best_rate", "share_of_products")
    measure.print_table(
        ("side", "tokens/s", "share of bound", "share of summed products"),
        [
            ["bound (best rate)", bound["tokens_per_second_at_best_rate"], 1.0, ""],
            ["bound (summed products)", bound["tokens_per_second_of_products"], "", 1.0],
            *(
                [
                    name,
                    *(figure[key]["median"] for key in keys),
                ]
                for name, figure in figures.items()
            ),
        ],
    )
    kinds = sorted({kind for figure in figures.values() for kind in figure["breakdown"] or {}})
    profiled = [name for name, figure in figures.items() if figure["breakdown"]]
    print()
    measure.print_table(
        ("share of the step", *profiled),
        [[kind, *(f"{figures[name]['breakdown'].get(kind, 0):.1%}" for name in profiled)] for kind in kinds],
    )
    if not options.quick:
        facts = measure.environment(options.threads, "torch", "transformers")
        settings = {"batch": cell.batch, "length": cell.length, "bf16": cell.bf16, "labels": round(0.15 * cell.tokens)}
        measure.write_results(
            "matmul_bound", {"environment": facts, "settings": settings, "bound": bound, "sides": figures}
        )


if __name__ == "__main__":
    main()
