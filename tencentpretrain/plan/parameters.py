"""The tensors of a model, by name and shape, told from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.train import LoraConfig
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import ENCODERS

GATES = {"rnn": 1, "lstm": 4, "gru": 3, "birnn": 1, "bilstm": 4, "bigru": 3}
"""Rows of a recurrent weight per hidden unit."""

_TWO_WAY = frozenset({"birnn", "bilstm", "bigru"})
_ADAPTED = (0, 2)
"""Query and value among the linear layers of an attention."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter.

    Fields:
        name: as `model.named_parameters()` has it.
        trained: whether it gets a gradient.
        matmul: whether it is the matrix of a linear layer or recurrence (tables and norms are not).
    """

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    matmul: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]


def size_of(value: int | None, key: str) -> int:
    """Returns a size.

    Raises:
        ConfigError: it is not set.
    """
    if value is None:
        raise ConfigError(f"{key}: is missing, but the model needs it")
    return value


def weights_of(
    config: ModelConfig, vocab_size: int, *, tgt_vocab_size: int | None = None, lora: LoraConfig | None = None
) -> list[Weight]:
    """Returns every parameter once; a tied one under its first name.

    Args:
        vocab_size: rows of the source word table.
        tgt_vocab_size: rows of the target word table and the heads, where a model has two vocabularies.
        lora: adapters, if they are used.

    Raises:
        ConfigError: a size is missing.
    """
    tgt_vocab_size = tgt_vocab_size or vocab_size
    found = [*_embedding("embedding", config, config.embedding, vocab_size), *_encoder("encoder", config)]
    shared = set()
    if config.decoder is not None:
        found += _embedding("tgt_embedding", config, config.tgt_embedding, tgt_vocab_size)
        found += _decoder(config)
        if config.share_embedding:
            shared.add("tgt_embedding.word.embedding.weight")
    found += _targets(config, tgt_vocab_size)
    head = tied_head(config)
    if head is not None:
        shared.add(head)
    found = [weight for weight in found if weight.name not in shared]
    return _with_adapters(found, lora) if lora is not None and lora.use_lora else found


def tied_head(config: ModelConfig) -> str | None:
    """Returns the name of the head's weight where it is a word table, or None."""
    if not config.tie_weights or "word" not in (*config.embedding, *(config.tgt_embedding if config.decoder else ())):
        return None
    for target, layer in (("mlm", "linear_2"), ("lm", "output_layer")):
        if target in config.target:
            return f"target.{target}.{layer}.weight"
    return None


def tied_table(config: ModelConfig) -> str:
    """Returns the name of the word table that a tied head shares."""
    own = config.decoder is not None and "mlm" not in config.target and "word" in config.tgt_embedding
    part = "tgt_embedding" if own and not config.share_embedding else "embedding"
    return f"{part}.word.embedding.weight"


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[Weight]:
    yield Weight(name=f"{name}.weight", shape=(outputs, inputs), matmul=True)
    if bias:
        yield Weight(name=f"{name}.bias", shape=(outputs,))


def _norm(name: str, kind: str, size: int) -> Iterator[Weight]:
    for what in ("gamma", "beta") if kind == "normal" else ("weight",):
        yield Weight(name=f"{name}.{what}", shape=(size,))


def _embedding(prefix: str, config: ModelConfig, names: Sequence[str], vocab_size: int) -> Iterator[Weight]:
    if "dual" in names:
        yield from _dual_embedding(prefix, config, vocab_size)
        return
    width = size_of(config.emb_size, "emb_size")
    rows = {"word": vocab_size, "pos": config.max_seq_length, "seg": 3}
    if "speech" in config.embedding:
        rows["pos"] = max(rows["pos"], config.max_audio_frames)
    for name in names:
        if name in rows:
            yield Weight(name=f"{prefix}.{name}.embedding.weight", shape=(rows[name], width))
        elif name != "sinusoidalpos":
            raise ConfigError(f"embedding: a plan for {name!r} is not possible")
    if config.embedding_layernorm:
        yield from _norm(f"{prefix}.layer_norm", "normal", width)


def _dual_embedding(prefix: str, config: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    streams = config.streams or ()
    for number, stream in enumerate(streams[:1] if config.tie_weights else streams):
        yield from _embedding(f"{prefix}.dual.embedding_{number}", stream, stream.embedding, vocab_size)
    if config.dual_layernorm:
        for number, stream in enumerate(streams):
            if stream.embedding_layernorm:
                width = size_of(stream.emb_size, "emb_size")
                yield from _norm(f"{prefix}.dual.stream_{number}_layer_norm", "normal", width)


def _encoder(prefix: str, config: ModelConfig) -> Iterator[Weight]:
    kind = ENCODERS.canonical(config.encoder)
    if kind == "dual":
        streams = config.streams or ()
        for number, stream in enumerate(streams[:1] if config.tie_weights else streams):
            yield from _encoder(f"{prefix}.encoder_{number}", stream)
    elif kind == "transformer":
        yield from _transformer(prefix, config)
    elif kind == "gatedcnn":
        yield from _gated_cnn(prefix, config)
    elif kind in GATES:
        yield from _recurrent(prefix, config, kind)
    else:
        raise ConfigError(f"encoder: a plan for {kind!r} is not possible")


def _transformer(prefix: str, config: ModelConfig) -> Iterator[Weight]:
    hidden = size_of(config.hidden_size, "hidden_size")
    if config.factorized_embedding:
        yield from _linear(f"{prefix}.linear", size_of(config.emb_size, "emb_size"), hidden)
    layers = size_of(config.num_layers, "layers_num")
    shared = config.parameter_sharing
    for name in [f"{prefix}.transformer"] if shared else [f"{prefix}.transformer.{n}" for n in range(layers)]:
        yield from _block(name, config, ("self_attn",))
    if config.layernorm_positioning == "pre":
        yield from _norm(f"{prefix}.layer_norm", config.layernorm, hidden)
    if config.relative_position_embedding:
        yield _bias_table(f"{prefix}.relative_pos_emb", config)


def _bias_table(name: str, config: ModelConfig) -> Weight:
    shape = (config.num_relative_buckets, size_of(config.num_heads, "heads_num"))
    return Weight(name=f"{name}.relative_attention_bias.weight", shape=shape)


def head_width(config: ModelConfig) -> int:
    """Returns the width D of one head."""
    return config.head_dim or size_of(config.hidden_size, "hidden_size") // size_of(config.num_heads, "heads_num")


def _block(name: str, config: ModelConfig, attentions: Sequence[str]) -> Iterator[Weight]:
    hidden = size_of(config.hidden_size, "hidden_size")
    inner = size_of(config.feed_forward_size, "feedforward_size")
    heads = size_of(config.num_heads, "heads_num")
    width = head_width(config)
    qkv_bias = config.transformer_bias if config.qkv_bias is None else config.qkv_bias
    for attention in attentions:
        for number, count in enumerate((heads, config.num_kv_heads or heads, config.num_kv_heads or heads)):
            yield from _linear(f"{name}.{attention}.linear_layers.{number}", hidden, count * width, qkv_bias)
        yield from _linear(f"{name}.{attention}.final_linear", heads * width, hidden, config.transformer_bias)
        if config.qk_norm:
            yield from _norm(f"{name}.{attention}.q_norm", "rms", width)
            yield from _norm(f"{name}.{attention}.k_norm", "rms", width)
    if config.feed_forward == "gated":
        yield from _linear(f"{name}.feed_forward.linear_gate", hidden, inner, config.transformer_bias)
    yield from _linear(f"{name}.feed_forward.linear_1", hidden, inner, config.transformer_bias)
    yield from _linear(f"{name}.feed_forward.linear_2", inner, hidden, config.transformer_bias)
    for number in range(1, len(attentions) + 2):
        yield from _norm(f"{name}.layer_norm_{number}", config.layernorm, hidden)


def _decoder(config: ModelConfig) -> Iterator[Weight]:
    for number in range(size_of(config.num_decoder_layers, "decoder_layers_num")):
        yield from _block(f"decoder.transformer_decoder.{number}", config, ("self_attn", "context_attn"))
    if config.layernorm_positioning == "pre":
        kind = config.layernorm if config.decoder_final_norm == "configured" or config.layernorm == "t5" else "normal"
        yield from _norm("decoder.layer_norm", kind, size_of(config.hidden_size, "hidden_size"))
    if config.relative_position_embedding:
        yield _bias_table("decoder.self_pos_emb", config)


def _gated_cnn(prefix: str, config: ModelConfig) -> Iterator[Weight]:
    width, hidden = size_of(config.emb_size, "emb_size"), size_of(config.hidden_size, "hidden_size")
    kernel = size_of(config.kernel_size, "kernel_size")
    yield Weight(name=f"{prefix}.conv_b1", shape=(1, hidden, 1, 1))
    yield Weight(name=f"{prefix}.gate_b1", shape=(1, hidden, 1, 1))
    layers = [("conv_1", width), ("gate_1", width)]
    depth = size_of(config.num_layers, "layers_num") - 1
    for what in ("conv", "gate"):
        layers += [(f"{what}.{number}", 1) for number in range(depth)]
        for number in range(depth):
            yield Weight(name=f"{prefix}.{what}_b.{number}", shape=(1, hidden, 1, 1))
    for name, across in layers:
        channels = 1 if name.endswith("_1") else hidden
        yield Weight(name=f"{prefix}.{name}.weight", shape=(hidden, channels, kernel, across), matmul=True)
        yield Weight(name=f"{prefix}.{name}.bias", shape=(hidden,))


def _recurrent(prefix: str, config: ModelConfig, kind: str) -> Iterator[Weight]:
    hidden = size_of(config.hidden_size, "hidden_size")
    halves = kind in _TWO_WAY or config.bidirectional
    width = hidden // 2 if halves else hidden
    stacks = ("rnn_forward", "rnn_backward") if kind in _TWO_WAY else ("rnn",)
    both = config.bidirectional and kind not in _TWO_WAY
    rows = GATES[kind] * width
    for stack in stacks:
        for layer in range(size_of(config.num_layers, "layers_num")):
            inputs = size_of(config.emb_size, "emb_size") if layer == 0 else width * (2 if both else 1)
            for end in ("", "_reverse") if both else ("",):
                name = f"{prefix}.{stack}"
                yield Weight(name=f"{name}.weight_ih_l{layer}{end}", shape=(rows, inputs), matmul=True)
                yield Weight(name=f"{name}.weight_hh_l{layer}{end}", shape=(rows, width), matmul=True)
                yield Weight(name=f"{name}.bias_ih_l{layer}{end}", shape=(rows,))
                yield Weight(name=f"{name}.bias_hh_l{layer}{end}", shape=(rows,))


def _targets(config: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    for name in config.target:
        prefix = f"target.{name}"
        if name == "clr":
            yield Weight(name=f"{prefix}.logit_scale", shape=())
            if config.projection:
                for number, stream in enumerate(config.streams or ()):
                    shape = (size_of(stream.hidden_size, "hidden_size"), size_of(config.feature_size, "feature_size"))
                    yield Weight(name=f"{prefix}.encoder_{number}_projection", shape=shape, matmul=True)
            continue
        hidden = size_of(config.hidden_size, "hidden_size")
        if name == "mlm":
            size = size_of(config.emb_size, "emb_size") if config.factorized_embedding else hidden
            yield from _linear(f"{prefix}.linear_1", hidden, size)
            yield from _norm(f"{prefix}.layer_norm", "normal", size)
            yield from _linear(f"{prefix}.linear_2", size, vocab_size)
        elif name == "lm":
            yield from _linear(f"{prefix}.output_layer", hidden, vocab_size, config.lm_bias)
        elif name == "bilm":
            yield from _linear(f"{prefix}.output_layer", hidden // 2, vocab_size, config.lm_bias)
        elif name in ("sp", "cls"):
            classes = 2 if name == "sp" else size_of(config.num_labels, "labels_num")
            yield from _linear(f"{prefix}.linear_1", hidden, hidden)
            yield from _linear(f"{prefix}.linear_2", hidden, classes)
        else:
            raise ConfigError(f"target: a plan for {name!r} is not possible")


def _with_adapters(weights: Sequence[Weight], lora: LoraConfig) -> list[Weight]:
    """Freezes the weights and puts adapters on query and value of every attention."""
    result = []
    adapted = tuple(f"attn.linear_layers.{number}.weight" for number in _ADAPTED)
    for weight in weights:
        result.append(replace(weight, trained=False))
        if weight.name.endswith(adapted):
            base = weight.name.removesuffix("weight")
            outputs, inputs = weight.shape
            result.append(Weight(name=f"{base}lora_A", shape=(lora.lora_r, inputs), matmul=True))
            result.append(Weight(name=f"{base}lora_B", shape=(outputs, lora.lora_r), matmul=True))
    return result
