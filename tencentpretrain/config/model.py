"""The model language: every key a model JSON may hold, under the names used inside the package.

The JSON is one flat name space that its five parts share (`hidden_size` is read by encoder, decoder and targets), so it
is declared once, here, without torch. Published spellings (`heads_num`, `remove_transformer_bias`) are translated by
`config.dialect`. A part reads the fields it needs; `problems` says what a chosen part misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Optional

from tencentpretrain.config.base import Section, setting

Activation = Literal["gelu", "gelu_fast", "relu", "silu", "linear"]
Pooling = Literal["mean", "max", "first", "last"]


class RopeScaling(Section):
    """How rotary angles are stretched beyond the trained length."""

    type: Literal["linear", "dynamic", "llama3", "yarn"] = setting(text="rule")
    factor: float = setting(text="stretch of the usable length", gt=0)
    original_max_seq_length: Optional[int] = setting(None, "length before stretching (dynamic, llama3, yarn)")
    low_freq_factor: float = setting(1.0, "llama3: wavelengths above original/low are divided by factor")
    high_freq_factor: float = setting(4.0, "llama3: wavelengths below original/high stay")
    beta_fast: float = setting(32.0, "yarn: rotations above which a dimension is extrapolated")
    beta_slow: float = setting(1.0, "yarn: rotations below which a dimension is interpolated")
    attention_factor: Optional[float] = setting(None, "yarn: scale of cos and sin; default 0.1 ln(factor) + 1")


class ModelConfig(Section):
    """A model of five parts: embedding, encoder, target embedding, decoder, target."""

    # Parts
    embedding: tuple[str, ...] = setting(("word",), "parts of the source embedding, summed", topic="parts")
    tgt_embedding: tuple[str, ...] = setting(("word",), "parts of the target embedding", topic="parts")
    encoder: str = setting("transformer", "encoder", topic="parts")
    decoder: Optional[str] = setting(None, "decoder; none for encoder-only and decoder-only models", topic="parts")
    target: tuple[str, ...] = setting(("mlm",), "training targets", topic="parts")
    mask: Literal["fully_visible", "causal", "causal_with_prefix"] = setting(
        "fully_visible", "which positions the encoder's self-attention sees", topic="parts"
    )
    pooling: Pooling = setting("first", "how a sequence becomes one vector", topic="parts")
    pooling_weighting: Literal["mask", "segment"] = setting(
        "mask",
        "pool over real tokens alike, or weigh them by segment number as old fine-tuned models do",
        topic="parts",
    )

    # Sizes
    emb_size: Optional[int] = setting(None, "width of the embedding", topic="sizes", gt=0)
    hidden_size: Optional[int] = setting(None, "width of encoder and decoder", topic="sizes", gt=0)
    feed_forward_size: Optional[int] = setting(None, "inner width of the feed-forward layer", topic="sizes", gt=0)
    hidden_act: Optional[Activation] = setting(None, "activation of feed-forward layer and mlm head", topic="sizes")
    num_heads: Optional[int] = setting(None, "attention heads", topic="sizes", gt=0)
    head_dim: Optional[int] = setting(None, "width per head; default hidden_size / heads_num", topic="sizes", gt=0)
    num_kv_heads: Optional[int] = setting(None, "key/value heads; default heads_num", topic="sizes", gt=0)
    num_layers: Optional[int] = setting(None, "encoder layers", topic="sizes", gt=0)
    num_decoder_layers: Optional[int] = setting(None, "decoder layers", topic="sizes", gt=0)
    max_seq_length: int = setting(512, "rows of the position table", topic="sizes", gt=0)
    dropout: float = setting(0.1, "rate of every dropout", topic="sizes", ge=0, lt=1)
    num_labels: Optional[int] = setting(None, "classes of the cls target", topic="sizes", gt=0)
    kernel_size: Optional[int] = setting(None, "gatedcnn: width of the convolution", topic="sizes", gt=0)
    block_size: Optional[int] = setting(None, "gatedcnn: layers between residuals", topic="sizes", gt=0)

    # Transformer switches
    layernorm_positioning: Literal["pre", "post"] = setting("post", "norm before or after a sub-layer", topic="layers")
    layernorm: Literal["normal", "t5", "rms"] = setting("normal", "norm inside transformer blocks", topic="layers")
    layernorm_form: Literal["toolkit", "standard"] = setting(
        "toolkit",
        "'normal' norms divide by the unbiased deviation plus eps (toolkit) or are torch's LayerNorm (standard, "
        "as Hugging Face models were trained; layernorm_eps then holds for every norm)",
        topic="layers",
    )
    layernorm_eps: float = setting(1e-6, "epsilon of transformer norms", topic="layers", gt=0)
    feed_forward: Literal["dense", "gated"] = setting("dense", "feed-forward layer", topic="layers")
    transformer_bias: bool = setting(True, "biases in attention and feed-forward layers", topic="layers")
    qkv_bias: Optional[bool] = setting(None, "bias of query, key and value; default as the rest", topic="layers")
    attention_scale: bool = setting(True, "divide scores by the root of the head width", topic="layers")
    embedding_layernorm: bool = setting(True, "norm after the embedding sum", topic="layers")
    relative_position_embedding: bool = setting(False, "T5 relative position bias", topic="layers")
    num_relative_buckets: int = setting(32, "buckets of the T5 bias", topic="layers", gt=0)
    rotary_position_embedding: bool = setting(False, "rotary positions", topic="layers")
    rope_theta: float = setting(10000.0, "base of rotary frequencies", topic="layers", gt=0)
    rope_scaling: Optional[RopeScaling] = setting(None, "rotary length scaling", topic="layers", cli=False)
    rope_width: Literal["head", "hidden"] = setting(
        "head", "width rotary tables are built for: head_dim, or hidden_size / heads_num as old files", topic="layers"
    )
    qk_norm: bool = setting(False, "RMS norm over each query and key head (Qwen3)", topic="layers")
    sliding_window: Optional[int] = setting(None, "causal attention sees this many last keys", topic="layers", gt=0)
    alibi_position_embedding: bool = setting(False, "ALiBi position bias", topic="layers")
    layer_number_scale: bool = setting(False, "BLOOM's low-precision score scaling (same mathematics)", topic="layers")
    residual_attention: bool = setting(False, "scores are added to the next layer's (RealFormer)", topic="layers")
    factorized_embedding: bool = setting(False, "ALBERT: linear map from emb_size to hidden_size", topic="layers")
    parameter_sharing: bool = setting(False, "ALBERT: one block used in every layer", topic="layers")
    bidirectional: bool = setting(False, "rnn, lstm, gru: both directions", topic="layers")
    sinusoid_layout: Literal["toolkit", "standard"] = setting(
        "toolkit", "sinusoidalpos: toolkit table, or half-and-half from position 0 (PEGASUS)", topic="layers"
    )
    decoder_final_norm: Literal["toolkit", "configured"] = setting(
        "toolkit",
        "decoder's last norm: normal norm with eps 1e-6 unless t5 (as old files), or layernorm",
        topic="layers",
    )
    dual_layernorm: bool = setting(True, "second norm per stream of a dual embedding", topic="layers")

    # Heads and sharing
    lm_bias: bool = setting(False, "bias of the lm head", topic="heads")
    lm_scale: bool = setting(
        False, "multiply hidden states by hidden_size^-0.5 before the lm head (T5 1.0)", topic="heads"
    )
    tie_weights: bool = setting(False, "head shares the word table (dual: both streams share)", topic="heads")
    share_embedding: bool = setting(False, "target embedding shares the source word table", topic="heads")
    prefix_lm_loss: bool = setting(False, "lm loss on segment 2 only", topic="heads")
    label_smoothing: Optional[float] = setting(None, "lm label smoothing", topic="heads", cli=False, ge=0, lt=1)
    ignore_index: bool = setting(
        False, "with label smoothing: zero the loss of padding labels", topic="heads", cli=False
    )
    projection: bool = setting(False, "clr: project pooled features", topic="heads", cli=False)
    feature_size: Optional[int] = setting(None, "clr: projection width", topic="heads", cli=False, gt=0)

    # Streams of dual models, already overlaid on the outer settings by `config.dialect`
    streams: Optional[tuple[ModelConfig, ModelConfig]] = setting(None, "two-stream settings", topic="parts", cli=False)

    # Vision and audio
    image_height: int = setting(256, "pixels", topic="vision and audio", gt=0)
    image_width: int = setting(256, "pixels", topic="vision and audio", gt=0)
    patch_size: int = setting(16, "pixels of a square patch", topic="vision and audio", gt=0)
    num_channels: int = setting(3, "image channels", topic="vision and audio", gt=0)
    image_preprocess: tuple[str, ...] = setting(("crop", "normalize"), "image steps", topic="vision and audio")
    image_tokenizer: Optional[dict[str, Any]] = setting(None, "VQGAN settings", topic="vision and audio", cli=False)
    sampling_rate: int = setting(16000, "hertz", topic="vision and audio", gt=0)
    audio_preprocess: tuple[str, ...] = setting(
        ("normalize_means", "normalize_vars", "ceptral_normalize"), "audio steps", topic="vision and audio"
    )
    max_audio_frames: int = setting(6000, "frames", topic="vision and audio", gt=0)
    conv_layers_num: int = setting(2, "speech convolutions", topic="vision and audio", gt=0)
    audio_feature_size: int = setting(80, "mel bins", topic="vision and audio", gt=0)
    conv_channels: tuple[int, ...] = setting((1024,), "channels before the GLU", topic="vision and audio")
    conv_kernel_sizes: tuple[int, ...] = setting((5, 5), "widths", topic="vision and audio")
    specaugment: Optional[dict[str, Any]] = setting(None, "SpecAugment settings", topic="vision and audio", cli=False)

    def problems(self) -> Iterator[str]:
        """Yields what the chosen parts miss or contradict; `config.compatibility` adds what concerns other sections."""
        from tencentpretrain.config.geometry import model_problems

        yield from model_problems(self)
