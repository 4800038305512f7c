"""Training on short documents: several in a row (`--pack_documents`) against one per row, in real tokens per second.

    python benchmarks/packing.py --corpus ../shared/data/corpora/chnsenticorp.txt --vocab <vocabulary>
    python benchmarks/packing.py --quick

A step is forward, backward and update of a GPT-2-like model. Both sides take the same number of rows of the same
length; padding does not count as tokens. Times are seconds on the processor, alternating in one process on one thread.
The second table compares attention inside documents with a boolean mask over the whole row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import measure

SHARED = measure.ROOT.parent / "shared/data"
SIZES = {
    "emb_size": 512, "hidden_size": 512, "feed_forward_size": 2048, "num_heads": 8, "num_layers": 8,
    "hidden_act": "gelu_fast", "dropout": 0.1, "max_seq_length": 1024, "embedding": ("word", "pos"),
    "encoder": "transformer", "mask": "causal", "layernorm_positioning": "pre", "target": ("lm",), "tie_weights": True,
}  # fmt: skip


def batches_of(options: argparse.Namespace, store: Any, tokenizer: Any, *, packed: bool) -> tuple[list[Any], int]:
    """Returns the first batches of an epoch, and how many rows the epoch has."""
    from tencentpretrain.config.data import DataConfig
    from tencentpretrain.data.loader import Loader
    from tencentpretrain.data.packing import build_processor

    given = {"data_processor": "lm", "seq_length": options.seq_length, "pack_documents": packed}
    processor = build_processor(DataConfig.model_validate(given), tokenizer)
    loader = Loader(store, processor, batch_size=options.batch_size, seed=7, shuffle=True, num_workers=0)
    return list(islice(iter(loader), options.rounds + 1)), loader.epoch_size


def trainer_of(vocab_size: int, batches: list[Any], bf16: bool) -> Any:
    """Returns a function that takes a step with the next batch."""
    from tencentpretrain.config.model import ModelConfig
    from tencentpretrain.config.train import OptimConfig, PrecisionConfig
    from tencentpretrain.engines.local import LocalEngine
    from tencentpretrain.model import build_model
    from tencentpretrain.optim.build import build_optimizer

    engine = LocalEngine(PrecisionConfig(bf16=bf16, device="cpu"))
    model = build_model(ModelConfig.model_validate(SIZES), vocab_size, seed=7).train()
    optimizer = engine.prepare(model, lambda placed: build_optimizer(placed, OptimConfig(learning_rate=1e-4)))
    remaining = iter(batches)

    def step() -> None:
        with engine.autocast():
            loss = model(next(remaining)).loss
        engine.backward(loss)
        engine.update(optimizer, (), max_norm=1.0)

    return step


def attention_figures(rounds: int) -> list[dict[str, Any]]:
    """Times attention of packed rows, forward and backward, in blocks and with a mask over the whole row."""
    import torch

    from tencentpretrain.layers.documents import document_attention
    from tencentpretrain.layers.dot_product import dot_product_attention
    from tencentpretrain.layers.masks import causal_visibility, document_mask, same_document

    figures = []
    for mean_length in (20, 60, 200):
        generator = torch.Generator().manual_seed(mean_length)
        edges = torch.rand(4, 512, generator=generator) < 1 / mean_length
        document_ids = edges.long().cumsum(dim=1) + 1
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(4, 512, 8, 64).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
            blocks = document_mask("causal", document_ids, None).documents
            mask = same_document(document_ids) & causal_visibility(512, document_ids.device)
            assert blocks is not None

            def in_blocks(q: Any = q, k: Any = k, v: Any = v, blocks: Any = blocks) -> None:
                document_attention(q, k, v, blocks, scale=0.125).sum().backward()

            def masked(q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> None:
                dot_product_attention(q, k, v, mask=mask, scale=0.125).sum().backward()

            in_blocks(), masked()
            seconds = measure.alternate(rounds, in_blocks, masked, clock=time.process_time)
            ratio = measure.spread([whole / block for block, whole in zip(*seconds, strict=True)])
            name = str(dtype).removeprefix("torch.")
            figures.append({"mean_length": mean_length, "dtype": name, "mask_over_blocks": ratio})
    return figures


def main() -> None:
    """Measures both and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, default=SHARED / "corpora/chnsenticorp.txt", help="one document per line"
    )
    parser.add_argument("--vocab", type=Path, default=SHARED / "vocab/google_zh_vocab.txt", help="its vocabulary")
    parser.add_argument("--seq_length", type=int, default=256, help="positions of a row (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side (default %(default)s)")
    parser.add_argument("--precisions", default="fp32,bf16", help="number formats (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of two rows; writes no file")
    options = parser.parse_args()
    measure.pin(1)
    if options.quick:
        options.rounds, options.batch_size, options.precisions = 1, 2, "fp32"

    import torch

    from tencentpretrain.config.data import CorpusConfig
    from tencentpretrain.data.build import build_store
    from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer

    torch.set_num_threads(1)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=str(options.vocab)))
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = CorpusConfig.model_validate({"corpus_path": str(options.corpus)})
        store = build_store(
            corpus, Path(folder) / "store", processor="lm", record_format="lines", tokenizer=lambda: tokenizer
        ).store
        sides = [batches_of(options, store, tokenizer, packed=packed) for packed in (True, False)]
        for precision in options.precisions.split(","):
            steps = [trainer_of(tokenizer.vocab_size, batches, precision == "bf16") for batches, _ in sides]
            for step in steps:
                step()
            seconds = measure.alternate(options.rounds, *steps, clock=time.process_time)
            rates = [
                [batch.token_count / taken for batch, taken in zip(batches[1:], side, strict=True)]
                for (batches, _), side in zip(sides, seconds, strict=True)
            ]
            ratio = measure.spread([packed / padded for packed, padded in zip(*rates, strict=True)])
            cells.append({
                "precision": precision, "ratio": ratio, "packed_tokens_per_second": measure.spread(rates[0], 1),
                "padded_tokens_per_second": measure.spread(rates[1], 1),
            })  # fmt: skip
    rows = {"packed": sides[0][1], "padded": sides[1][1]}
    real = {
        name: sum(batch.token_count for batch in batches) / sum(batch.token_ids.numel() for batch in batches)
        for name, (batches, _) in zip(rows, sides, strict=True)
    }
    attention = attention_figures(options.rounds)
    measure.print_table(
        ("precision", "packed tok/s", "padded tok/s", "ratio", "lowest", "highest"),
        [
            [cell["precision"], cell["packed_tokens_per_second"]["median"], cell["padded_tokens_per_second"]["median"],
             cell["ratio"]["median"], cell["ratio"]["lowest"], cell["ratio"]["highest"]]
            for cell in cells
        ],
    )  # fmt: skip
    print(f"rows of an epoch: {rows}; share of real tokens in the rows measured: {real}\n")
    measure.print_table(
        ("document length", "dtype", "mask / blocks"),
        [[cell["mean_length"], cell["dtype"], cell["mask_over_blocks"]["median"]] for cell in attention],
    )
    if not options.quick:
        measure.write_results("packing", {
            "environment": measure.environment(1, "torch"), "corpus": options.corpus.name,
            "seq_length": options.seq_length, "batch_size": options.batch_size, "model": SIZES,
            "rows_of_an_epoch": rows, "share_of_real_tokens": real, "cells": cells, "attention": attention,
        })  # fmt: skip


if __name__ == "__main__":
    main()
