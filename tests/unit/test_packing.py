"""Several documents in a row: none sees another, each is computed as if it stood alone, every sample comes once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import WORDS, corpus_text, make_processor, make_store, tokenizer_of
from torch import Tensor

from tencentpretrain.config.data import DataConfig
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import IGNORE_LABEL, Batch
from tencentpretrain.data.legacy import LegacyDataset
from tencentpretrain.data.loader import Loader
from tencentpretrain.data.packing import build_processor, pack
from tencentpretrain.data.samples import check_dataset
from tencentpretrain.data.store import Store
from tencentpretrain.errors import ConfigError, DataFormatError
from tencentpretrain.layers.documents import document_positions, document_spans
from tencentpretrain.model import Model, build_model
from tencentpretrain.taps import Taps

VOCAB = 77
SIZES: dict[str, Any] = {
    "emb_size": 32,
    "hidden_size": 32,
    "feed_forward_size": 64,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_act": "gelu",
    "dropout": 0.0,
    "max_seq_length": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"embedding": ("word", "pos"), "mask": "causal", "target": ("lm",), "layernorm_positioning": "pre"},
    "llama": {
        "embedding": ("word",),
        "mask": "causal",
        "target": ("lm",),
        "rotary_position_embedding": True,
        "num_kv_heads": 2,
        "feed_forward": "gated",
        "hidden_act": "silu",
        "layernorm": "rms",
        "layernorm_positioning": "pre",
    },
    "window": {"embedding": ("word", "pos"), "mask": "causal", "target": ("lm",), "sliding_window": 5},
    "alibi": {"embedding": ("word",), "mask": "causal", "target": ("lm",), "alibi_position_embedding": True},
    "sinusoidal": {"embedding": ("word", "sinusoidalpos"), "mask": "causal", "target": ("lm",)},
    "prefix": {"embedding": ("word", "pos", "seg"), "mask": "causal_with_prefix", "target": ("lm",)},
    "bert": {"embedding": ("word", "pos", "seg"), "mask": "fully_visible", "target": ("mlm",)},
    "relative": {
        "embedding": ("word",),
        "mask": "fully_visible",
        "target": ("mlm",),
        "relative_position_embedding": True,
    },
    "residual": {
        "embedding": ("word", "pos", "seg"),
        "mask": "fully_visible",
        "target": ("mlm",),
        "residual_attention": True,
    },
    "residual causal": {
        "embedding": ("word", "pos"),
        "mask": "causal",
        "target": ("lm",),
        "residual_attention": True,
    },
}


def tiny(kind: str, **changes: Any) -> Model:
    config = ModelConfig.model_validate({"encoder": "transformer", **SIZES, **MODELS[kind], **changes})
    return build_model(config, VOCAB, seed=3, std=0.3).eval()


def packed_batch(lengths: list[list[int]], width: int, kind: str, *, seed: int = 0) -> Batch:
    """Returns rows of documents; each document begins with a prompt of a third of it (segment 1)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    token_ids = torch.randint(5, VOCAB, shape, generator=generator)
    labels = torch.randint(5, VOCAB, shape, generator=generator)
    segment_ids, document_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, row_lengths in enumerate(lengths):
        begin = 0
        for number, length in enumerate(row_lengths, start=1):
            document_ids[row, begin : begin + length] = number
            segment_ids[row, begin : begin + length] = 1
            if kind == "prefix":
                segment_ids[row, begin + length // 3 + 1 : begin + length] = 2
            begin += length
        token_ids[row, begin:] = 0
    return Batch(
        token_ids=token_ids,
        segment_ids=segment_ids,
        labels={MODELS[kind]["target"][0]: labels.masked_fill(document_ids == 0, IGNORE_LABEL)},
        document_ids=document_ids,
        has_padding=bool((document_ids == 0).any()),
    )


def logits_of(model: Model, batch: Batch, bf16: bool = False) -> Tensor:
    """Returns (B, S, V)."""
    head = model.target.get_submodule(model.target.names[0])
    precision = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    with torch.no_grad(), precision:
        hidden, _ = model.features(batch)
        return head.predict(hidden).float()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_neighbour_changes_nothing_at_all(kind: str, bf16: bool) -> None:
    """Exactly 0.0, whichever of the documents is replaced, at several lengths."""
    model = tiny(kind)
    for row_lengths, width in (([3, 9, 4], 16), ([1, 1, 30, 17], 64), ([61, 67], 128), ([96, 5, 20, 79], 200)):
        batch = packed_batch([row_lengths, row_lengths[::-1]], width, kind)
        assert isinstance(batch.token_ids, Tensor)
        assert batch.document_ids is not None
        before = logits_of(model, batch, bf16)
        for number in range(1, len(row_lengths) + 1):
            other = batch.document_ids == number
            changed = batch.token_ids.where(~other, (batch.token_ids + 7) % (VOCAB - 5) + 5)
            after = logits_of(model, dataclasses.replace(batch, token_ids=changed), bf16)
            kept = (batch.document_ids > 0) & ~other
            assert (after - before)[kept].abs().max().item() == 0.0
            assert (after - before)[other].abs().max().item() > 0.0


@pytest.mark.parametrize("kind", list(MODELS))
def test_packed_is_as_separate(kind: str) -> None:
    """Per-token losses within 1e-6, and the same gradients."""
    model = tiny(kind, hidden_act="gelu", layernorm_eps=1e-6)
    lengths = [[3, 9, 4, 21], [40, 1], [7, 8, 9]]
    batch = packed_batch(lengths, 48, kind)
    name = model.target.names[0]
    assert isinstance(batch.token_ids, Tensor)
    assert isinstance(batch.segment_ids, Tensor)
    assert batch.document_ids is not None
    packed = model(batch).losses[name]
    packed_gradients = torch.autograd.grad(packed.total, list(model.parameters()), allow_unused=True)
    joint = logits_of(model, batch)
    total, count, gradients = torch.zeros(()), 0, [torch.zeros_like(weight) for weight in model.parameters()]
    for row, begin, end in document_spans(batch.document_ids):
        alone = Batch(
            token_ids=batch.token_ids[row : row + 1, begin:end],
            segment_ids=batch.segment_ids[row : row + 1, begin:end],
            labels={name: batch.labels[name][row : row + 1, begin:end]},
            has_padding=False,
        )
        loss = model(alone).losses[name]
        labels = alone.labels[name].flatten()
        each = [
            torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
            for logits in (joint[row, begin:end], logits_of(model, alone)[0])
        ]
        assert (each[0] - each[1]).abs().max().item() <= 1e-6 * max(1.0, each[1].max().item())
        total, count = total + loss.total.detach(), count + int(loss.count)
        for summed, gradient in zip(
            gradients, torch.autograd.grad(loss.total, list(model.parameters()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                summed += gradient
    assert int(packed.count) == count
    torch.testing.assert_close(packed.total.detach(), total, rtol=1e-6, atol=0)
    for gradient, wanted in zip(packed_gradients, gradients, strict=True):
        found = torch.zeros_like(wanted) if gradient is None else gradient
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * max(1.0, wanted.abs().max().item()))


def test_gradients_do_not_leak() -> None:
    """The loss of one document has no gradient at the vectors of another."""
    model = tiny("llama").train()
    batch = packed_batch([[10, 12, 9]], 32, "llama")
    assert batch.document_ids is not None
    labels = batch.labels["lm"].masked_fill(batch.document_ids != 2, IGNORE_LABEL)
    with Taps(model, "embedding") as taps:
        loss = model(dataclasses.replace(batch, labels={"lm": labels})).losses["lm"].total
        (gradient,) = torch.autograd.grad(loss, taps["embedding"])
    own = (batch.document_ids == 2)[0]
    assert (gradient[0, own].abs().sum(-1) > 0).all()
    assert gradient[0, ~own].abs().max().item() == 0.0


def test_an_infinity_stays_in_its_document() -> None:
    model = tiny("gpt2")
    batch = packed_batch([[10, 12]], 24, "gpt2")
    assert isinstance(batch.token_ids, Tensor)
    batch.token_ids[0, :10] = 6
    batch.token_ids[0, 10:22] = 7
    before = logits_of(model, batch)
    with torch.no_grad():
        model.embedding.get_parameter("word.embedding.weight")[6] = float("inf")
    after = logits_of(model, batch)
    assert not after[0, :10].isfinite().any()
    assert torch.equal(after[0, 10:22], before[0, 10:22])


def test_dropout_and_recomputation() -> None:
    """With dropout, recomputing the layers draws the same masks; long documents take torch's kernel without it."""
    model = tiny("gpt2", dropout=0.3).train()
    batch = packed_batch([[10, 12, 9], [31]], 32, "gpt2")
    gradients = []
    for recompute in (False, True):
        model.set_gradient_checkpointing(recompute)
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(model(batch).loss, list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_long_documents(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents beyond the explicit form's length go through torch's kernel one by one."""
    model = tiny(kind)
    batch = packed_batch([[20, 4, 30], [9, 8]], 60, kind)
    explicit = logits_of(model, batch)
    monkeypatch.setattr("tencentpretrain.layers.documents.LONGEST_EXPLICIT", 16)
    monkeypatch.setattr("tencentpretrain.layers.dot_product.LONGEST_EXPLICIT", 16)
    real = batch.document_ids != 0
    torch.testing.assert_close(logits_of(model, batch)[real], explicit[real], rtol=1e-5, atol=1e-5)


def test_blocks_agree_with_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boolean mask, which other devices take, gives what the blocks give."""
    batches = {kind: packed_batch([[20, 4, 30], [9, 8]], 60, kind) for kind in ("gpt2", "llama", "window", "bert")}
    models = {kind: tiny(kind) for kind in batches}
    blocks = {kind: logits_of(models[kind], batch) for kind, batch in batches.items()}
    monkeypatch.setattr("tencentpretrain.layers.masks.is_fast", lambda tensor: False)
    for kind, batch in batches.items():
        real = batch.document_ids != 0
        torch.testing.assert_close(logits_of(models[kind], batch)[real], blocks[kind][real], rtol=1e-5, atol=1e-5)


def test_positions_restart() -> None:
    document_ids = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
    assert document_positions(document_ids).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert document_spans(document_ids) == ((0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 1), (1, 1, 8))


def test_models_that_cannot_keep_documents_apart_are_refused() -> None:
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_heads", "feed_forward_size")}
    config = ModelConfig.model_validate({**sizes, "embedding": ("word",), "encoder": "lstm", "target": ("lm",)})
    model = build_model(config, VOCAB)
    with pytest.raises(ConfigError, match="pack_documents"):
        model(packed_batch([[3, 4]], 8, "gpt2"))


def test_pack_fills_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 40, 5000), 128)
    order, begins = pack(lengths, 128)
    assert sorted(order.tolist()) == list(range(5000))
    sums = np.add.reduceat(lengths[order], begins[:-1])
    assert sums.max() <= 128
    assert len(sums) <= 1.01 * lengths.sum() / 128 + 1
    assert [pack(np.zeros(0, np.int64), 8)[1].tolist(), pack(np.array([8]), 8)[1].tolist()] == [[0], [0, 1]]


def documents_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Returns each document of a batch: tokens, segments and labels."""
    assert batch.document_ids is not None
    assert isinstance(batch.token_ids, Tensor)
    assert isinstance(batch.segment_ids, Tensor)
    fields = [batch.token_ids, batch.segment_ids, *batch.labels.values()]
    return [
        tuple(tuple(field[row, begin:end].tolist()) for field in fields)
        for row, begin, end in document_spans(batch.document_ids)
    ]


def packed_processor(folder: Path, name: str, **settings: Any) -> Any:
    given = {"data_processor": name, "seq_length": 24, "pack_documents": True, **settings}
    return build_processor(DataConfig.model_validate(given), tokenizer_of(folder)())


@pytest.mark.parametrize("name", ["lm", "llm_pretrain", "llm_sft"])
def test_packed_rows_hold_every_sample_once(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path, name)
    plain, packing = make_processor(tmp_path, name), packed_processor(tmp_path, name)
    plan = plain.plan(store, 0)
    rng = np.random.default_rng(0)
    single = plain.collate([plain.sample(store, plan, index, rng) for index in range(len(plan))])
    assert isinstance(single.token_ids, Tensor)
    assert isinstance(single.segment_ids, Tensor)
    expected: Counter[tuple[Any, ...]] = Counter()
    for row in range(len(plan)):
        real = int((single.segment_ids[row] > 0).sum())
        fields = [single.token_ids, single.segment_ids, *single.labels.values()]
        expected[tuple(tuple(field[row, :real].tolist()) for field in fields)] += 1

    rows = packing.plan(store, 0)
    assert rows.size < len(plan)
    loader = Loader(store, packing, batch_size=1, seed=1, shuffle=True, num_workers=0)
    batches = list(islice(iter(loader), rows.size))
    assert Counter(document for batch in batches for document in documents_of(batch)) == expected
    assert sum(batch.token_count for batch in batches) == single.token_count
    width = 23 if name == "llm_sft" else 24
    assert all(batch.token_ids.shape == (1, width) for batch in batches)  # type: ignore[union-attr]
    assert all(((batch.document_ids > 0) == (batch.segment_ids > 0)).all() for batch in batches)  # type: ignore


def test_packed_masks_come_from_the_row_s_generator(tmp_path: Path) -> None:
    store = make_store(tmp_path, "mlm")
    packing = packed_processor(tmp_path, "mlm")
    share = {"batch_size": 3, "seed": 5, "shuffle": True, "num_workers": 0}
    whole = list(islice(iter(Loader(store, packing, **share)), 12))
    resumed = list(islice(iter(Loader(store, packing, start=6 * 3, **share)), 6))
    for first, second in zip(whole[6:], resumed, strict=True):
        assert documents_of(first) == documents_of(second)
    labels = torch.cat([batch.labels["mlm"].flatten() for batch in whole])
    assert (labels > 0).any()


def restored_text(store: Store, processor: Any) -> list[list[int]]:
    plan = processor.plan(store, 0)
    rng = np.random.default_rng(0)
    batch = processor.collate([processor.sample(store, plan, index, rng) for index in range(len(plan))])
    return [list(tokens) for tokens, *_ in documents_of(batch)]


def test_full_sentences_with_documents_apart(tmp_path: Path) -> None:
    """A window holds pieces of documents; the last token of each has nothing to predict."""
    store = make_store(tmp_path, "lm")
    processor = packed_processor(tmp_path, "lm", full_sentences=True)
    plan = processor.plan(store, 0)
    rng = np.random.default_rng(0)
    batch = processor.collate([processor.sample(store, plan, index, rng) for index in range(len(plan))])
    assert not batch.has_padding
    cls_id, sep_id = processor.cls_id, processor.sep_id
    pieces = documents_of(batch)
    assert max(len(documents_of(dataclasses.replace(batch, **{
        name: getattr(batch, name)[row : row + 1] for name in ("token_ids", "segment_ids", "document_ids")
    }, labels={}))) for row in range(len(plan))) > 2  # fmt: skip
    for tokens, _, labels in pieces:
        assert cls_id not in tokens[1:]
        assert sep_id not in tokens[:-1]
        ends = tokens[-1] == sep_id
        inside = labels[:-1] if ends else labels[: len(tokens) - 1]
        assert list(inside) == list(tokens[1:])
        if ends:
            assert labels[-1] == IGNORE_LABEL
        else:
            assert labels[-1] >= 0
    leaking = make_processor(tmp_path, "lm", full_sentences=True)
    assert leaking.collate([leaking.sample(store, plan, 0, rng)]).document_ids is None

    masked = packed_processor(tmp_path, "mlm", full_sentences=True)
    pieces_of_mlm = restored_text(make_store(tmp_path / "mlm", "mlm"), masked)
    assert sum(map(len, pieces_of_mlm)) > 0
    assert max(map(len, pieces_of_mlm)) <= 24


def test_blank_documents(tmp_path: Path) -> None:
    """Empty documents are CLS SEP, or nothing; neither breaks the numbering."""
    text = "\n".join(["w1 w2 w3", "", "", "w4", " ".join(WORDS), ""] * 5) + "\n"
    store = make_store(tmp_path, "lm", text)
    for settings in ({"keep_blank_lines": True}, {}):
        for full_sentences in (True, False):
            processor = packed_processor(tmp_path, "lm", full_sentences=full_sentences, **settings)
            plan = processor.plan(store, 0)
            examples = [processor.sample(store, plan, index, np.random.default_rng(0)) for index in range(len(plan))]
            batch = processor.collate(examples)
            assert batch.document_ids is not None
            assert ((batch.document_ids > 0) == (batch.segment_ids > 0)).all()


def test_refusals(tmp_path: Path) -> None:
    store = make_store(tmp_path, "bert", corpus_text("sentences"))
    processor = packed_processor(tmp_path, "bert")
    with pytest.raises(ConfigError, match=r"pack_documents.*'bert'"):
        processor.plan(store, 0)
    old = object.__new__(LegacyDataset)
    old.path = tmp_path / "dataset.pt"
    with pytest.raises(DataFormatError, match="pack_documents"):
        check_dataset(old, packed_processor(tmp_path, "lm", full_sentences=True))


def test_settings_are_checked(tmp_path: Path) -> None:
    from tencentpretrain.config.run import load_run

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n", encoding="utf-8")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "emb_size": 8, "hidden_size": 8, "layers_num": 1, "embedding": ["word"], "encoder": "lstm", "target": ["lm"],
        "hidden_act": "gelu", "dropout": 0.1, "tie_weights": False, "mask": "causal",
    }), encoding="utf-8")  # fmt: skip
    flags = ["--config_path", str(config), "--vocab_path", str(vocabulary), "--output_model_path", "x.bin"]
    with pytest.raises(ConfigError, match="pack_documents: only a transformer"):
        load_run([*flags, "--data_processor", "lm", "--pack_documents", "--dataset_path", str(tmp_path)])
