"""What a forward pass keeps for the backward pass, counted as the layers of this package save it.

The layers' own autograd functions save less than textbook formulas say (Korthikanti et al. 2022, arXiv:2205.05198,
section 4.1): a toolkit norm only its input, dropout one byte per element, explicit attention no mask. Counts here
follow `layers/` tensor by tensor; `tests/unit/test_plan.py` compares them with what torch really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.plan.parameters import head_width, size_of

FLOAT = 4
LONGEST_EXPLICIT = 1024
"""Keys up to which the CPU keeps attention probabilities without dropout (`layers/dot_product.py`)."""
CROSS_ENTROPY_CHUNK = 1 << 20
"""Logits that the CPU widens at a time (`layers/cross_entropy.py`)."""
FUSED_FROM, PROJECTED = 1 << 26, 1 << 25
"""Logits from which the projection is part of the loss, and how many then exist at a time (the same file)."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How a step computes.

    Fields:
        low: bytes of an element under autocast; 4 without it.
        on_cpu: the package's own CPU kernels serve the step.
        adapters: rank and dropout of LoRA; None without it.
    """

    low: int = FLOAT
    on_cpu: bool = True
    adapters: tuple[int, float] | None = None

    @property
    def trains_weights(self) -> bool:
        """Whether linear layers keep their input, which only the gradient of their weight needs."""
        return self.adapters is None

    @property
    def half(self) -> bool:
        return self.low < FLOAT


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes of one layer.

    Fields:
        saved: kept from forward to backward, the layer's input included, its output not.
        entry: of it the layer's input.
        backward: besides the saved tensors, at the worst moment of the layer's backward pass.
        forward: besides the saved tensors, at the worst moment of its forward pass.
    """

    saved: float = 0
    entry: float = 0
    backward: float = 0
    forward: float = 0


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A micro-batch: samples, source and target length, and rows whose token is predicted."""

    batch: int
    source: int
    target: int = 0
    predicted: int = 0
    padded: bool = True


def norm_saved(kind: str, rows: float, width: int, residual: int, numerics: Numerics) -> float:
    """Returns what a norm of (rows, width) saves besides its input."""
    size = rows * width
    if kind == "normal":
        if not numerics.half:
            return 0 if numerics.on_cpu else 8 * rows
        return 8 * rows + (size * FLOAT if residual < FLOAT and not numerics.on_cpu else 0)
    # RMS: the input in float32 (a copy where it is narrower), and the normed rows in the output's type.
    kept = size * numerics.low if numerics.trains_weights else 0
    return kept + (size * FLOAT if residual < FLOAT else 0) + FLOAT * rows


def norm_keeps_input(kind: str, residual: int, numerics: Numerics) -> bool:
    """Whether the norm's input itself is what is saved, rather than a wider copy."""
    if residual == FLOAT or not numerics.half:
        return True
    return kind == "normal" and numerics.on_cpu


def attention_cost(config: ModelConfig, batch: int, queries: int, keys: int, residual: int, numerics: Numerics) -> Cost:
    """Returns the cost of one attention between its input and its output, both not counted.

    The memory of an attention between decoder and encoder is counted once, as the encoder's output.
    """
    heads, width, low = size_of(config.num_heads, "heads_num"), head_width(config), numerics.low
    rows, memory_rows = batch * queries, batch * keys
    queried, read = rows * heads * width, memory_rows * heads * width  # key heads are repeated before they are saved
    scores = batch * heads * queries * keys
    saved: float = (queried + 2 * read) * low
    backward: float = (queried + 2 * read) * low
    forward = 0.0
    drop = config.dropout
    residual_form = config.residual_attention
    if residual_form:
        # Softmax output, and for the product with the values the same after dropout; scores go to the next layer.
        saved += scores * FLOAT + (scores * (1 + low) if drop else scores * low * numerics.half)
        backward += 3 * scores * FLOAT
        forward = scores * FLOAT * 2
        saved += queried * low
    elif numerics.on_cpu and (keys <= LONGEST_EXPLICIT or drop > 0):
        saved += scores * low + queried * low
        backward += scores * low * (4 if drop else 2)
        forward = scores * (low + (2 + max(low, FLOAT) if drop else 0))
    else:
        saved += queried * low + rows * heads * FLOAT
        backward += queried * low
    if config.qk_norm:
        shared = config.num_kv_heads or heads
        own = (rows * heads + memory_rows * shared) * width
        saved += own * low * norm_keeps_input("rms", low, numerics)
        saved += norm_saved("rms", own / width, width, low, numerics)
    if config.rotary_position_embedding and numerics.half:
        backward += 2 * queried * FLOAT
    if numerics.adapters is not None:
        rank, lora_drop = numerics.adapters
        size = rows * size_of(config.hidden_size, "hidden_size")
        saved -= queried * low  # what the output projection reads
        saved += 2 * rows * rank * low + (2 * size * (1 + low) if lora_drop else 0)
    return Cost(saved=saved, backward=backward, forward=forward)


def feed_forward_cost(config: ModelConfig, rows: float, numerics: Numerics) -> Cost:
    """Returns the cost of a feed-forward layer between its input and its output, both not counted."""
    inner = rows * size_of(config.feed_forward_size, "feedforward_size") * numerics.low
    act = {"relu": 0, "linear": 0}.get(config.hidden_act or "gelu", 1)
    read = 1 if numerics.trains_weights or (config.hidden_act == "relu" and config.feed_forward == "dense") else 0
    if config.feed_forward == "gated":
        return Cost(saved=(2 + act + read) * inner, backward=3 * inner, forward=inner)
    return Cost(saved=(act + read) * inner, backward=2 * inner, forward=inner)


def block_cost(
    config: ModelConfig, batch: int, length: int, residual: int, numerics: Numerics, *, memory_length: int | None = None
) -> Cost:
    """Returns the cost of one transformer block, an encoder's or (with `memory_length`) a decoder's.

    Args:
        residual: bytes of an element of the residual stream.
        memory_length: length of the encoder's output, for decoder blocks.
    """
    rows = batch * length
    hidden = size_of(config.hidden_size, "hidden_size")
    size, low = rows * hidden, numerics.low
    spans = [length] if memory_length is None else [length, memory_length]
    attentions = [attention_cost(config, batch, length, keys, residual, numerics) for keys in spans]
    feed_forward = feed_forward_cost(config, rows, numerics)
    layers = [*attentions, feed_forward]
    saved = 0.0
    for _ in layers:
        if config.layernorm_positioning == "pre":
            # Norm's input (the stream) and its output, which the linear layers read.
            saved += size * (residual if norm_keeps_input(config.layernorm, residual, numerics) else 0) + size * low
        else:
            saved += size * residual  # the sum under the norm
            saved += size * low  # the layer's input: what the norm before gave
        saved += norm_saved(config.layernorm, rows, hidden, residual, numerics)
        saved += size if config.dropout else 0
    saved += sum(layer.saved for layer in layers) - (0 if numerics.trains_weights else size * low)
    backward = max(layer.backward for layer in layers) + 2 * size * max(residual, low)
    return Cost(
        saved=saved,
        entry=size * residual,
        backward=backward,
        forward=max(layer.forward for layer in layers),
    )


def embedding_cost(config: ModelConfig, rows: float, numerics: Numerics) -> Cost:
    """Returns the cost of an embedding sum; its output is the first layer's input."""
    width = size_of(config.emb_size, "emb_size")
    size = rows * width
    if not numerics.trains_weights:
        return Cost(forward=2 * size * FLOAT)
    saved = 0.0
    if config.embedding_layernorm:
        saved += size * FLOAT + norm_saved("normal", rows, width, FLOAT, numerics)
    saved += size if config.dropout else 0
    return Cost(saved=saved, backward=2 * size * FLOAT, forward=2 * size * FLOAT)


def is_fused(rows: float, classes: int, *, smoothed: bool) -> bool:
    """Tells whether the loss projects a few rows at a time, so that not all logits exist."""
    return not smoothed and rows * classes >= FUSED_FROM


def logits_cost(rows: float, classes: int, width: int, numerics: Numerics, *, smoothed: bool) -> Cost:
    """Returns the cost of logits and cross-entropy: what is kept, and what comes on top.

    `entry` is the part of what is kept that is the gradient of the head's weight, made in the forward pass already.
    """
    size = rows * classes
    if is_fused(rows, classes, smoothed=smoothed):
        table = classes * width
        gradient = float(table * FLOAT * numerics.trains_weights)
        work = min(size, PROJECTED) * numerics.low + 2 * table * numerics.low * numerics.half
        wide = 4 * CROSS_ENTROPY_CHUNK if numerics.on_cpu else min(size, PROJECTED)
        saved = rows * width * numerics.low + gradient
        return Cost(saved=saved, entry=gradient, forward=work + wide * FLOAT, backward=0.0)
    if smoothed:
        return Cost(saved=size * FLOAT, forward=size * (FLOAT + numerics.low), backward=3 * size * FLOAT)
    if numerics.on_cpu and size > CROSS_ENTROPY_CHUNK:
        work = 4 * CROSS_ENTROPY_CHUNK * FLOAT
        return Cost(saved=size * numerics.low, forward=size * numerics.low + work, backward=size * numerics.low)
    wide = size * (FLOAT + (numerics.low if numerics.half else 0))
    return Cost(saved=size * FLOAT, forward=wide, backward=2 * size * FLOAT + size * numerics.low * numerics.half)
