"""What fits together: processor, targets, tokenizer, parts and lengths. Said before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tencentpretrain.config.cli import Parsed
from tencentpretrain.config.data import DataConfig
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.names import name_problem
from tencentpretrain.config.train import LoraConfig, TrainConfig
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import TOKENIZERS, nearest
from tencentpretrain.tokenizers.config import TokenizerConfig

TEXT_PAIR_PROCESSORS = frozenset({"mt"})
_MASKING = frozenset({"bert", "albert", "mlm", "t5", "bart", "cls_mlm", "vilt"})
_FULL_SENTENCES = frozenset({"lm", "llm_pretrain", "mlm", "t5"})
_PACKED = ("lm", "llm_pretrain", "llm_sft", "mlm")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a data processor needs of the model it feeds.

    Args:
        targets: exactly these.
        decoder: its samples have a target side.
        masks: what the self-attention of a transformer encoder may see; empty: anything.
        instead: other processors for other targets, for the message.
    """

    targets: frozenset[str]
    decoder: bool = False
    masks: tuple[str, ...] = ()


_LM = frozenset({"lm"})
_LEFT_ONLY = ("causal",)
NEEDS: dict[str, Needs] = {
    "bert": Needs(targets=frozenset({"mlm", "sp"})),
    "albert": Needs(targets=frozenset({"mlm", "sp"})),
    "mlm": Needs(targets=frozenset({"mlm"})),
    "lm": Needs(targets=_LM, masks=_LEFT_ONLY),
    "llm_pretrain": Needs(targets=_LM, masks=_LEFT_ONLY),
    "llm_sft": Needs(targets=_LM, masks=("causal", "causal_with_prefix")),
    "prefixlm": Needs(targets=_LM, masks=("causal_with_prefix", "causal")),
    "bilm": Needs(targets=frozenset({"bilm"})),
    "mt": Needs(targets=_LM, decoder=True),
    "t5": Needs(targets=_LM, decoder=True),
    "gsg": Needs(targets=_LM, decoder=True),
    "bart": Needs(targets=_LM, decoder=True),
    "cls": Needs(targets=frozenset({"cls"})),
    "cls_mlm": Needs(targets=frozenset({"mlm", "cls"})),
}


def pretrain_problems(parsed: Parsed) -> Iterator[str]:
    """Yields contradictions between model, data, tokenizer and optimization."""
    yield from _data_problems(parsed)
    data, model = parsed.get(DataConfig), parsed.get(ModelConfig)
    yield from _target_problems(data, model)
    yield from _length_problems(data, model)
    if data.pack_documents:
        yield from _packing_problems(data, model)
    for key in parsed.get(TrainConfig).allow_change:
        if key not in parsed.origin:
            yield f"allow_change: names {key!r}, which is no setting{nearest(key, parsed.origin)}"
    if parsed.get(LoraConfig).use_lora and model.encoder != "transformer" and model.decoder is None:
        yield f"use_lora: adapters sit in attention layers, and encoder {model.encoder!r} has none"


def pretrain_notices(parsed: Parsed) -> Iterator[str]:
    """Yields settings that were given and do nothing in this run."""
    data, model = parsed.get(DataConfig), parsed.get(ModelConfig)
    yield from model_notices(parsed, model)
    processor = data.data_processor
    for key in ("whole_word_masking", "span_masking", "span_geo_prob", "span_max_length"):
        if parsed.given(key) and processor not in _MASKING:
            yield f"{key}: has no effect with processor {processor!r}, which masks nothing"
    if data.full_sentences and processor not in _FULL_SENTENCES:
        yield f"full_sentences: has no effect with processor {processor!r} (only {', '.join(sorted(_FULL_SENTENCES))})"
    if parsed.given("short_seq_prob") and processor not in ("bert", "albert"):
        yield f"short_seq_prob: has no effect with processor {processor!r} (only bert, albert)"
    if parsed.given("sentence_selection_strategy") and processor != "gsg":
        yield f"sentence_selection_strategy: has no effect with processor {processor!r} (only gsg)"
    if parsed.given("text_infilling") and processor != "bart":
        yield f"text_infilling: has no effect with processor {processor!r} (only bart)"
    if parsed.given("instances_buffer_size"):
        yield "instances_buffer_size: has no effect; samples are shuffled over the whole data set"
    if processor == "llm_sft" and not model.prefix_lm_loss:
        yield "prefix_lm_loss: is off, so llm_sft also trains on the prompts; true trains on the answers only"


def model_notices(parsed: Parsed, model: ModelConfig) -> Iterator[str]:
    """Yields keys of the model that were given and that no chosen part reads."""
    transformer = model.encoder in ("transformer", "dual") or model.decoder is not None
    readers = {
        "kernel_size": (model.encoder in ("gatedcnn", "dual"), "encoder 'gatedcnn'"),
        "block_size": (model.encoder in ("gatedcnn", "dual"), "encoder 'gatedcnn'"),
        "bidirectional": (model.encoder in ("rnn", "lstm", "gru", "dual"), "encoders 'rnn', 'lstm' and 'gru'"),
        "heads_num": (transformer, "a transformer"),
        "feedforward_size": (transformer, "a transformer"),
        "local_kv_heads_num": (transformer, "a transformer"),
        "rope_theta": (model.rotary_position_embedding or model.encoder == "dual", "rotary positions"),
        "rope_scaling": (model.rotary_position_embedding or model.encoder == "dual", "rotary positions"),
        "relative_attention_buckets_num": (model.relative_position_embedding, "relative positions"),
        "decoder_layers_num": (model.decoder is not None, "a decoder"),
        "tgt_embedding": (model.decoder is not None, "a decoder"),
        "labels_num": ("cls" in model.target, "target 'cls'"),
        "pooling": (bool({"cls", "clr"} & {*model.target}) or model.encoder == "dual", "targets 'cls' and 'clr'"),
        "tie_weights": (bool({"mlm", "lm"} & {*model.target}) or model.encoder == "dual", "targets 'mlm' and 'lm'"),
        "prefix_lm_loss": ("lm" in model.target, "target 'lm'"),
        "has_lmtarget_bias": ("lm" in model.target, "target 'lm'"),
        "label_smoothing": ("lm" in model.target, "target 'lm'"),
        "ignore_index": (model.label_smoothing is not None, "label smoothing"),
        "projection": ("clr" in model.target, "target 'clr'"),
        "feature_size": (model.projection, "a projection"),
        "layernorm_form": (model.layernorm == "normal" or model.embedding_layernorm, "the normal norm"),
    }
    for key, (read, reader) in readers.items():
        if parsed.given(key) and not read:
            yield f"{key}: has no effect here; only {reader} reads it"


def _data_problems(parsed: Parsed) -> Iterator[str]:
    data, tokenizer = parsed.get(DataConfig), parsed.get(TokenizerConfig, "tokenizer")
    processor = data.data_processor
    problem = name_problem("data processor", processor)
    if problem:
        yield f"data_processor: {problem}"
        return
    try:
        kind = TOKENIZERS.canonical(tokenizer.tokenizer)
    except ConfigError:
        return  # reported by the tokenizer's own section
    if kind == "virtual":
        yield f"tokenizer: 'virtual' has no text vocabulary, but processor {processor!r} reads text"
    if data.whole_word_masking and data.span_masking:
        yield "span_masking: spans and whole words are two ways to choose what is masked; take one"
    for key in ("dev_dataset_path",):
        if getattr(data, key) and getattr(data, key) == data.dataset_path:
            yield f"{key}: is the training data set itself, so it would validate nothing"


def _target_problems(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    needs = NEEDS.get(data.data_processor)
    if needs is None:
        return
    if model.streams is not None and "clr" not in model.target:
        yield "target: a two-stream model pre-trains with 'clr' only; this file is for fine-tuning"
        return
    if set(model.target) != needs.targets:
        wanted = " ".join(sorted(needs.targets))
        others = sorted(name for name, other in NEEDS.items() if other.targets == set(model.target))
        instead = f" (for target {' '.join(model.target)}: --data_processor {' or '.join(others)})" if others else ""
        yield f"target: is {' '.join(model.target)}, but processor {data.data_processor!r} needs {wanted}{instead}"
    if needs.decoder and model.decoder is None:
        yield f'decoder: processor {data.data_processor!r} needs an encoder-decoder model; set "decoder": "transformer"'
    if not needs.decoder and model.decoder is not None:
        yield f"decoder: processor {data.data_processor!r} has no target side; use t5, bart, gsg or mt, or no decoder"
    if needs.masks and model.encoder == "transformer" and model.mask not in needs.masks:
        allowed = " or ".join(needs.masks)
        yield f"mask: is {model.mask}, so a position would see its own label; {data.data_processor!r} needs {allowed}"
    if needs.masks and (model.bidirectional or model.encoder in ("birnn", "bilstm", "bigru")):
        key = "bidirectional" if model.bidirectional else "encoder"
        yield f"{key}: reads right to left too, so with {data.data_processor!r} a position would see its own label"
    if "bilm" in needs.targets and model.encoder not in ("birnn", "bilstm", "bigru"):
        yield f"encoder: target 'bilm' needs two independent directions (birnn, bilstm, bigru), not {model.encoder!r}"
    if data.data_processor == "prefixlm" and model.prefix_lm_loss:
        yield "prefix_lm_loss: processor 'prefixlm' already trains on the continuation alone; leave it out"
    if "cls" in needs.targets and model.num_labels is None:
        yield "labels_num: target 'cls' needs it: the number of classes in the corpus"


def _packing_problems(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    if data.data_processor not in _PACKED:
        yield f"pack_documents: is not possible with processor {data.data_processor!r} (only {', '.join(_PACKED)})"
    if model.encoder != "transformer" or model.decoder is not None:
        other = "a decoder" if model.decoder is not None else f"encoder {model.encoder!r}"
        yield f"pack_documents: only a transformer without decoder keeps the documents of a row apart, not {other}"
    scaling = model.rope_scaling
    if model.rotary_position_embedding and scaling is not None and scaling.type == "dynamic":
        yield (
            "pack_documents: cannot be combined with the rope_scaling type 'dynamic', whose frequencies depend on the "
            "length of the row; choose another type"
        )


def _length_problems(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    one_less = data.data_processor == "llm_sft"
    length = data.seq_length - one_less
    rows = f"but the position table has {model.max_seq_length} rows (max_seq_length)"
    if "pos" in model.embedding and length > model.max_seq_length:
        yield f"seq_length: is {data.seq_length}, {rows}"
    if model.decoder is None or "pos" not in model.tgt_embedding:
        return
    target = {"mt": data.tgt_seq_length, "gsg": data.tgt_seq_length - 1, "bart": data.seq_length - 1}.get(
        data.data_processor, 0
    )
    if target > model.max_seq_length:
        key = "seq_length" if data.data_processor == "bart" else "tgt_seq_length"
        yield f"{key}: is {getattr(data, key)}, {rows}"
