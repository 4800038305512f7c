"""A model as a row of layers with their costs, from the embedding up to the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.plan.activations import (
    FLOAT,
    Cost,
    Lengths,
    Numerics,
    block_cost,
    embedding_cost,
    is_fused,
    logits_cost,
    norm_keeps_input,
    norm_saved,
)
from tencentpretrain.plan.parameters import GATES, Weight, size_of, tied_head, tied_table
from tencentpretrain.registry import ENCODERS


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer.

    Fields:
        trained: numbers that get a gradient.
        casts: bytes of the copies of its matrices in the low format.
        widest: elements of its largest trained tensor.
        recomputed: gradient checkpointing applies to it.
        table: elements of its word table.
        table_shared: another embedding reads the same table.
        shared: bytes of masks and position biases, and of their gradient, that live as long as the stack's layers.
        logits: of the head, besides `cost`.
        tied: the head's weight is a word table.
    """

    name: str
    cost: Cost
    trained: int = 0
    casts: float = 0
    widest: int = 0
    recomputed: bool = False
    table: int = 0
    table_shared: bool = False
    shared: float = 0
    logits: Cost = field(default_factory=Cost)
    tied: bool = False


def layers_of(config: ModelConfig, weights: Sequence[Weight], lengths: Lengths, numerics: Numerics) -> list[Layer]:
    """Returns the layers from the embedding to the head, which comes last."""
    if config.streams is not None:
        return _two_streams(config, weights, lengths, numerics)
    found = [
        _embedding("embedding", config, weights, lengths.batch * lengths.source, numerics),
        *_encoder("encoder", config, weights, lengths, numerics),
    ]
    if config.decoder is not None:
        rows = lengths.batch * lengths.target
        found.append(_embedding("tgt_embedding", config, weights, rows, numerics))
        found.extend(_decoder(config, weights, lengths, numerics))
    head = _head(config, weights, lengths, numerics)
    # A tied table's gradient waits from the head's backward pass on: it must not be counted again where it is used.
    owner = tied_table(config)
    tables = {weight.name: weight.size for weight in weights if weight.trained and weight.name == owner}
    for name, size in tables.items():
        part = name.partition(".")[0]
        found = [
            replace(layer, trained=layer.trained - size * head.tied) if layer.name == part else layer for layer in found
        ]
    return [*found, head]


def stream_bytes(config: ModelConfig, numerics: Numerics) -> int:
    """Returns the bytes of an element of the residual stream: a sum that starts in float32 stays there."""
    narrow = config.embedding_layernorm or config.layernorm_positioning == "post" or config.factorized_embedding
    return numerics.low if narrow else FLOAT


def _with_weights(layer: Layer, prefix: str, weights: Sequence[Weight], numerics: Numerics) -> Layer:
    own = [weight for weight in weights if weight.name.startswith(prefix)]
    trained = [weight.size for weight in own if weight.trained]
    matrices = sum(weight.size for weight in own if weight.matmul)
    return replace(
        layer,
        trained=sum(trained),
        casts=float(matrices * numerics.low * numerics.half),
        widest=max(trained, default=0),
    )


def _embedding(
    part: str,
    config: ModelConfig,
    weights: Sequence[Weight],
    rows: float,
    numerics: Numerics,
) -> Layer:
    layer = Layer(name=part, cost=embedding_cost(config, rows, numerics))
    layer = _with_weights(layer, f"{part}.", weights, numerics)
    source = next((weight for weight in weights if weight.name == f"{part}.word.embedding.weight"), None)
    shared = config.share_embedding and config.decoder is not None
    if source is None and shared:
        source = next((weight for weight in weights if weight.name == "embedding.word.embedding.weight"), None)
    table = source.size if source is not None and source.trained else 0
    return replace(layer, table=table, table_shared=shared)


def _encoder(
    part: str, config: ModelConfig, weights: Sequence[Weight], lengths: Lengths, numerics: Numerics
) -> list[Layer]:
    kind = ENCODERS.canonical(config.encoder)
    if kind != "transformer":
        whole = Layer(name=part, cost=_other_encoder(kind, config, lengths))
        return [_with_weights(whole, f"{part}.", weights, numerics)]
    residual = stream_bytes(config, numerics)
    cost = block_cost(config, lengths.batch, lengths.source, residual, numerics)
    found = []
    for number in range(size_of(config.num_layers, "layers_num")):
        prefix = f"{part}.transformer." + ("" if config.parameter_sharing else f"{number}.")
        layer = _with_weights(Layer(name=f"{part} {number}", cost=cost, recomputed=True), prefix, weights, numerics)
        if config.parameter_sharing and number:
            layer = replace(layer, trained=0, casts=0.0)
        found.append(layer)
    rows = lengths.batch * lengths.source
    if config.factorized_embedding:
        size = rows * size_of(config.emb_size, "emb_size") * numerics.low * numerics.trains_weights
        up = Layer(name=f"{part}, map of the embedding", cost=Cost(saved=size, backward=size))
        found.insert(0, _with_weights(up, f"{part}.linear.", weights, numerics))
    bias = _bias_bytes(config, lengths.batch, lengths.source, lengths.padded, causal=config.mask == "causal")
    end = _end(part, config, config.layernorm, rows, residual, weights, numerics)
    return [*found, replace(end, shared=bias)]


def _decoder(config: ModelConfig, weights: Sequence[Weight], lengths: Lengths, numerics: Numerics) -> list[Layer]:
    residual = stream_bytes(config, numerics)
    cost = block_cost(config, lengths.batch, lengths.target, residual, numerics, memory_length=lengths.source)
    memory = float(lengths.batch * lengths.source * size_of(config.hidden_size, "hidden_size") * numerics.low)
    found = [
        _with_weights(
            Layer(name=f"decoder {number}", cost=cost, recomputed=True),
            f"decoder.transformer_decoder.{number}.",
            weights,
            numerics,
        )
        for number in range(size_of(config.num_decoder_layers, "decoder_layers_num"))
    ]
    kind = config.layernorm if config.decoder_final_norm == "configured" or config.layernorm == "t5" else "normal"
    bias = _bias_bytes(config, lengths.batch, lengths.target, lengths.padded, causal=True)
    rows = lengths.batch * lengths.target
    end = _end("decoder", config, kind, rows, residual, weights, numerics)
    cost = replace(end.cost, saved=end.cost.saved + memory)
    return [*found, replace(end, shared=bias, cost=cost)]


def _bias_bytes(config: ModelConfig, batch: int, length: int, padded: bool, *, causal: bool) -> float:
    """Returns the bytes of masks and position biases that all layers of a stack share."""
    square = length * length
    heads = config.num_heads or 1
    if config.relative_position_embedding or config.alibi_position_embedding:
        samples = batch if padded and not causal else 1
        # The bias, in the mask's form, and the gradient that all layers add to where it is learned.
        copies = 1 + 2 * config.relative_position_embedding
        return float(samples * heads * square * (FLOAT * copies) + square * heads * FLOAT)
    return float(batch * square) if config.mask == "causal_with_prefix" else 0.0


def _end(
    part: str,
    config: ModelConfig,
    kind: str,
    rows: float,
    residual: int,
    weights: Sequence[Weight],
    numerics: Numerics,
) -> Layer:
    """Returns what stands behind the last block: the stack's norm."""
    width = size_of(config.hidden_size, "hidden_size")
    saved, backward = 0.0, 0.0
    if config.layernorm_positioning == "pre":
        keeps = norm_keeps_input(kind, residual, numerics)
        saved += rows * width * residual * keeps + norm_saved(kind, rows, width, residual, numerics)
        backward = 2.0 * rows * width * FLOAT
    layer = Layer(name=f"{part}, end", cost=Cost(saved=saved, backward=backward))
    return _with_weights(layer, f"{part}.layer_norm", weights, numerics)


def _other_encoder(kind: str, config: ModelConfig, lengths: Lengths) -> Cost:
    """Returns the cost of recurrent and convolutional encoders, in float32 as their kernels compute."""
    rows = lengths.batch * lengths.source
    hidden = size_of(config.hidden_size, "hidden_size")
    layers = size_of(config.num_layers, "layers_num")
    size = float(rows * hidden * FLOAT)
    inputs = float(rows * size_of(config.emb_size, "emb_size") * FLOAT)
    if kind == "gatedcnn":
        # Each layer's padded input, the convolution's sum and the other's sigmoid.
        padding = 1 + (size_of(config.kernel_size, "kernel_size") - 1) / max(lengths.source, 1)
        return Cost(saved=inputs * padding + 2 * layers * size + (layers - 1) * size * padding, backward=4 * size)
    # Elements per unit and step that torch's kernels keep, measured: LSTM's workspace also holds the layer's input.
    per_unit, per_input = {1: (2.7, 0.0), 4: (12.0, 6.1), 3: (9.0, 0.0)}[GATES[kind]]
    both = config.bidirectional and kind in ("rnn", "lstm", "gru")
    later = size if both or kind in ("rnn", "lstm", "gru") else size / 2
    saved = layers * per_unit * size + per_input * (inputs + (layers - 1) * later) * (1 if later == size else 2)
    return Cost(saved=saved + (size / FLOAT if config.dropout else 0), backward=(GATES[kind] + 2.0) * size)


def _head(config: ModelConfig, weights: Sequence[Weight], lengths: Lengths, numerics: Numerics) -> Layer:
    hidden = size_of(config.hidden_size, "hidden_size")
    rows = float(lengths.predicted)
    saved, logits, forward, backward, early, fused = 0.0, 0.0, 0.0, 0.0, 0.0, False
    word = next((w for w in weights if w.name.endswith(("mlm.linear_2.weight", "output_layer.weight"))), None)
    tied = tied_head(config)
    if word is None and tied is not None:
        word = next((w for w in weights if w.name == tied_table(config)), None)
    classes = word.shape[0] if word is not None else 0
    for name in config.target:
        if name == "mlm":
            size = size_of(config.emb_size, "emb_size") if config.factorized_embedding else hidden
            saved += rows * (hidden + (3 if config.hidden_act not in ("relu", "linear") else 2) * size) * numerics.low
        elif name in ("lm", "bilm"):
            saved += rows * hidden * numerics.low * numerics.trains_weights
        elif name in ("sp", "cls"):  # the first position is a view, which keeps the whole
            saved += lengths.batch * lengths.source * hidden * numerics.low
        if name in ("mlm", "lm", "bilm"):
            smoothed = name == "lm" and config.label_smoothing is not None
            width = word.shape[1] if word is not None else hidden
            cost = logits_cost(rows, classes, width, numerics, smoothed=smoothed)
            fused = is_fused(rows, classes, smoothed=smoothed)
            logits += cost.saved * (2 if name == "bilm" else 1)
            early += cost.entry
            forward, backward = max(forward, cost.forward), max(backward, cost.backward)
    layer = _with_weights(Layer(name="head", cost=Cost(saved=saved)), "target.", weights, numerics)
    if tied is not None and word is not None and word.trained:
        layer = replace(layer, trained=layer.trained + word.size)
    if word is not None and (fused or tied is not None):
        change = (0 if fused else word.size) - (word.size if fused and tied is None else 0)
        layer = replace(layer, casts=layer.casts + change * numerics.low * numerics.half)
    cost = Cost(saved=logits, entry=early, forward=forward, backward=backward)
    return replace(layer, logits=cost, tied=tied is not None)


def _two_streams(config: ModelConfig, weights: Sequence[Weight], lengths: Lengths, numerics: Numerics) -> list[Layer]:
    found = []
    for number, stream in enumerate(config.streams or ()):
        owner = 0 if config.tie_weights else number
        prefix = f"embedding.dual.embedding_{owner}"
        rows = lengths.batch * lengths.source
        found.append(_embedding(prefix, stream, weights, rows, numerics))
        found.extend(_encoder(f"encoder.encoder_{owner}", stream, weights, lengths, numerics))
        if config.tie_weights and number:
            half = len(found) // 2
            found[half:] = [replace(layer, trained=0, casts=0.0) for layer in found[half:]]
    head = _with_weights(Layer(name="head", cost=Cost()), "target.", weights, numerics)
    return [*found, head]
