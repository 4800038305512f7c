"""The same training step twice: with this package and with `transformers`.

Same sizes, vocabulary, rates, labels per batch, optimizer and clipping. Call `measure.pin` before importing this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from measure import ROOT
from torch import Tensor, nn

from tencentpretrain.config.loading import load_config
from tencentpretrain.config.train import OptimConfig, PrecisionConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.model import build_model
from tencentpretrain.optim.build import build_optimizer

Kind = Literal["bert", "gpt2"]
Step = Callable[[], None]
VOCAB_SIZE = {"bert": 21128, "gpt2": 50257}
CONFIGS = {"bert": "models/bert/base_config.json", "gpt2": "models/gpt2/config.json"}
NAMES = {"bert": "BERT-base", "gpt2": "GPT-2 small"}
MAX_NORM = 1.0
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One shape in one number format."""

    kind: Kind
    batch: int
    length: int
    bf16: bool
    layers: int = 12

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def name(self) -> str:
        return f"{NAMES[self.kind]} {self.batch} x {self.length} {'bf16' if self.bf16 else 'fp32'}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Random tokens without padding. BERT predicts 15 % of them and one class per row, GPT-2 every next token."""

    token_ids: Tensor
    labels: Tensor
    classes: Tensor


def draw_sample(cell: Cell) -> Sample:
    """Draws the batch that both sides train on."""
    generator = torch.Generator().manual_seed(7)
    shape = (cell.batch, cell.length)
    token_ids = torch.randint(5, VOCAB_SIZE[cell.kind], shape, generator=generator)
    labels = token_ids
    if cell.kind == "bert":
        chosen = torch.randperm(cell.tokens, generator=generator)[: round(0.15 * cell.tokens)]
        labels = torch.zeros(cell.tokens, dtype=torch.int64)
        labels[chosen] = token_ids.flatten()[chosen]
    return Sample(
        token_ids=token_ids,
        labels=labels.view(shape),
        classes=torch.randint(0, 2, (cell.batch,), generator=generator),
    )


def our_step(cell: Cell, sample: Sample, *, compiled: bool = False) -> Step:
    """Returns a function that takes one step as the training loop does: engine, optimizer, clipping."""
    config = load_config(str(ROOT / CONFIGS[cell.kind]), num_layers=cell.layers)
    engine = LocalEngine(PrecisionConfig(bf16=cell.bf16, device="cpu", compile=compiled))
    model = build_model(config, VOCAB_SIZE[cell.kind], seed=7).train()
    settings = OptimConfig(learning_rate=LEARNING_RATE, max_grad_norm=MAX_NORM)
    optimizer = engine.prepare(model, lambda placed: build_optimizer(placed, settings))
    labels = {"mlm": sample.labels, "sp": sample.classes} if cell.kind == "bert" else {"lm": sample.labels}
    batch = Batch(
        token_ids=sample.token_ids,
        segment_ids=torch.ones_like(sample.token_ids),
        labels=labels,
        token_count=cell.tokens,
        has_padding=False,
    )

    def step() -> None:
        with engine.autocast():
            loss = model(batch).loss
        engine.backward(loss)
        engine.update(optimizer, (), max_norm=MAX_NORM)

    return step


def their_step(cell: Cell, sample: Sample, *, compiled: bool = False) -> Step:
    """Returns a function that takes one step with `transformers`, SDPA attention and torch's fused AdamW."""
    import transformers

    model: nn.Module
    if cell.kind == "bert":
        bert = transformers.BertConfig(vocab_size=VOCAB_SIZE["bert"], num_hidden_layers=cell.layers)
        model = transformers.BertForPreTraining._from_config(bert, attn_implementation="sdpa")
        inputs = {
            "input_ids": sample.token_ids,
            "labels": torch.where(sample.labels > 0, sample.labels, -100),
            "next_sentence_label": sample.classes,
        }
    else:
        gpt2 = transformers.GPT2Config(vocab_size=VOCAB_SIZE["gpt2"], n_layer=cell.layers, use_cache=False)
        model = transformers.GPT2LMHeadModel._from_config(gpt2, attn_implementation="sdpa")
        inputs = {"input_ids": sample.token_ids, "labels": sample.labels}
    model.train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cell.bf16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
