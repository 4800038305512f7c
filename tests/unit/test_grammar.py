"""Tensor names and shapes of every published text family, from its shipped configs with small sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tencentpretrain.config import load_config
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.model import build_model

MODELS = Path(__file__).resolve().parents[2] / "models"

V, V_TGT, H, E_FACTORIZED, F, N, N_KV, D, P, BUCKETS = 30, 21, 8, 6, 12, 4, 2, 6, 10, 32
LAYERS, DECODER_LAYERS = 2, 3
KERNEL, BLOCK = 3, 2

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, size: int = H) -> Shapes:
    return {f"{name}.gamma": (size,), f"{name}.beta": (size,)}


def scale(name: str) -> Shapes:
    return {f"{name}.weight": (H,)}


def attention(name: str, *, bias: bool, head: int, kv_heads: int = N) -> Shapes:
    return {
        **linear(f"{name}.linear_layers.0", N * head, H, bias=bias),
        **linear(f"{name}.linear_layers.1", kv_heads * head, H, bias=bias),
        **linear(f"{name}.linear_layers.2", kv_heads * head, H, bias=bias),
        **linear(f"{name}.final_linear", H, N * head, bias=bias),
    }


def block(
    name: str,
    *,
    bias: bool = True,
    norms: Callable[[str], Shapes] = norm,
    gated: bool = False,
    head: int = H // N,
    kv_heads: int = N,
    cross: bool = False,
) -> Shapes:
    """BLOCK of the published grammar; with `cross`, DBLOCK."""
    shapes = attention(f"{name}.self_attn", bias=bias, head=head, kv_heads=kv_heads)
    if cross:
        shapes |= attention(f"{name}.context_attn", bias=bias, head=head) | norms(f"{name}.layer_norm_3")
    shapes |= linear(f"{name}.feed_forward.linear_1", F, H, bias=bias)
    shapes |= linear(f"{name}.feed_forward.linear_2", H, F, bias=bias)
    if gated:
        shapes |= linear(f"{name}.feed_forward.linear_gate", F, H, bias=bias)
    return shapes | norms(f"{name}.layer_norm_1") | norms(f"{name}.layer_norm_2")


def encoder(prefix: str = "encoder", **kind: Any) -> Shapes:
    return {k: v for i in range(LAYERS) for k, v in block(f"{prefix}.transformer.{i}", **kind).items()}


def decoder(**kind: Any) -> Shapes:
    names = (f"decoder.transformer_decoder.{i}" for i in range(DECODER_LAYERS))
    return {k: v for name in names for k, v in block(name, cross=True, **kind).items()}


def table(name: str, rows: int, width: int = H) -> Shapes:
    return {f"{name}.embedding.weight": (rows, width)}


def embedding(prefix: str = "embedding", width: int = H) -> Shapes:
    """Word, position and segment tables with the norm."""
    return {
        **table(f"{prefix}.word", V, width),
        **table(f"{prefix}.pos", P, width),
        **table(f"{prefix}.seg", 3, width),
        **norm(f"{prefix}.layer_norm", width),
    }


def mlm_head(width: int = H) -> Shapes:
    names = "target.mlm.linear_1", "target.mlm.layer_norm", "target.mlm.linear_2"
    return linear(names[0], width, H) | norm(names[1], width) | linear(names[2], V, width)


SP_HEAD = linear("target.sp.linear_1", H, H) | linear("target.sp.linear_2", 2, H)
WORD, TGT_WORD = table("embedding.word", V), table("tgt_embedding.word", V)


def lm_head(rows: int = V, *, bias: bool = False, width: int = H) -> Shapes:
    return linear("target.lm.output_layer", rows, width, bias=bias)


def recurrent(name: str, gates: int, width: int, inputs: int = H) -> Shapes:
    shapes: Shapes = {}
    for layer in range(LAYERS):
        shapes |= {
            f"{name}.weight_ih_l{layer}": (gates * width, width if layer else inputs),
            f"{name}.weight_hh_l{layer}": (gates * width, width),
            f"{name}.bias_ih_l{layer}": (gates * width,),
            f"{name}.bias_hh_l{layer}": (gates * width,),
        }
    return shapes


def gated_cnn() -> Shapes:
    shapes: Shapes = {}
    for part in ("conv", "gate"):
        shapes |= {f"encoder.{part}_1.weight": (H, 1, KERNEL, H), f"encoder.{part}_1.bias": (H,)}
        shapes |= {f"encoder.{part}_b1": (1, H, 1, 1)}
        for i in range(LAYERS - 1):
            shapes |= {f"encoder.{part}.{i}.weight": (H, H, KERNEL, 1), f"encoder.{part}.{i}.bias": (H,)}
            shapes |= {f"encoder.{part}_b.{i}": (1, H, 1, 1)}
    return shapes


def t5(**kind: Any) -> Shapes:
    kind = {"bias": False, "norms": scale, **kind}
    return {
        **WORD,
        **TGT_WORD,
        **encoder(**kind),
        **decoder(**kind),
        **scale("encoder.layer_norm"),
        **scale("decoder.layer_norm"),
        "encoder.relative_pos_emb.relative_attention_bias.weight": (BUCKETS, N),
        "decoder.self_pos_emb.relative_attention_bias.weight": (BUCKETS, N),
        **lm_head(),
    }


def llama(**kind: Any) -> Shapes:
    blocks = encoder(bias=False, norms=scale, gated=True, **kind)
    return WORD | blocks | scale("encoder.layer_norm") | lm_head()


def qwen2(config: ModelConfig) -> Shapes:
    shapes = llama(kv_heads=N_KV, head=head(config))
    rows = {part: shapes[f"encoder.transformer.0.self_attn.linear_layers.{part}.weight"][:1] for part in range(3)}
    names = "encoder.transformer.{}.self_attn.linear_layers.{}.bias"
    return shapes | {names.format(i, part): rows[part] for i in range(LAYERS) for part in range(3)}


def qwen3(config: ModelConfig) -> Shapes:
    names = (f"encoder.transformer.{i}.self_attn.{part}_norm.weight" for i in range(LAYERS) for part in "qk")
    return llama(kv_heads=N_KV, head=D) | dict.fromkeys(names, (D,))


def both(shapes: Callable[[str], Shapes]) -> Shapes:
    return shapes("0") | shapes("1")


BERT_BODY = embedding() | encoder()
GPT2 = WORD | table("embedding.pos", P) | encoder() | norm("encoder.layer_norm") | lm_head()
BART = (
    WORD
    | table("embedding.pos", P)
    | norm("embedding.layer_norm")
    | TGT_WORD
    | table("tgt_embedding.pos", P)
    | norm("tgt_embedding.layer_norm")
    | encoder()
    | decoder()
    | lm_head(bias=True)
)
PEGASUS = (
    WORD
    | TGT_WORD
    | encoder()
    | decoder()
    | norm("encoder.layer_norm")
    | norm("decoder.layer_norm")
    | lm_head(bias=True)
)
TRANSFORMER = (
    WORD
    | norm("embedding.layer_norm")
    | table("tgt_embedding.word", V_TGT)
    | norm("tgt_embedding.layer_norm")
    | encoder()
    | decoder()
    | lm_head(V_TGT)
)
ALBERT = (
    embedding(width=E_FACTORIZED)
    | linear("encoder.linear", H, E_FACTORIZED)
    | block("encoder.transformer")
    | mlm_head(E_FACTORIZED)
    | SP_HEAD
)
STREAM_NORMS = both(lambda k: norm(f"embedding.dual.stream_{k}_layer_norm"))
SBERT = both(lambda k: embedding(f"embedding.dual.embedding_{k}") | encoder(f"encoder.encoder_{k}")) | STREAM_NORMS
SIAMESE_LSTM = STREAM_NORMS | both(
    lambda k: (
        table(f"embedding.dual.embedding_{k}.word", V)
        | norm(f"embedding.dual.embedding_{k}.layer_norm")
        | recurrent(f"encoder.encoder_{k}.rnn", 4, H)
    )
)
ELMO = (
    WORD
    | recurrent("encoder.rnn_forward", 4, H // 2)
    | recurrent("encoder.rnn_backward", 4, H // 2)
    | {"target.bilm.output_layer.weight": (V, H // 2)}
)


def bloom(config: ModelConfig) -> Shapes:
    shapes = WORD | encoder() | norm("encoder.layer_norm") | lm_head()
    # The published files lack the norm that the published models have; corrected ones hold it.
    return shapes | norm("embedding.layer_norm") if config.embedding_layernorm else shapes


def head(config: ModelConfig) -> int:
    return config.head_dim or H // N


# Pattern of config files -> what a model of them holds, and how many such files were published.
FAMILIES: dict[str, tuple[Callable[[ModelConfig], Shapes], int]] = {
    "bert/*": (lambda config: BERT_BODY | mlm_head() | SP_HEAD, 7),
    "xlm-roberta/*": (lambda config: BERT_BODY | mlm_head(), 2),
    "albert/*": (lambda config: ALBERT, 4),
    "megatron/*bert*": (lambda config: BERT_BODY | mlm_head() | SP_HEAD, 1),
    "megatron/*gpt2*": (lambda config: GPT2, 1),
    "gpt2/*": (lambda config: GPT2, 5),
    "bloom/*": (bloom, 3),
    "llama/*": (lambda config: llama(), 4),
    "llama2/*": (lambda config: llama(kv_heads=config.num_kv_heads or N), 3),
    "llama3/*": (lambda config: llama(kv_heads=N_KV, head=head(config)), 1),
    "mistral/*": (lambda config: llama(kv_heads=N_KV, head=head(config)), 1),
    "qwen2/*": (qwen2, 1),
    "qwen3/*": (qwen3, 1),
    "t5/*": (lambda config: t5(head=head(config)), 5),
    "t5-v1_1/*": (lambda config: t5(gated=True, head=D), 5),
    "bart/*": (lambda config: BART, 2),
    "pegasus/*": (lambda config: PEGASUS, 2),
    "transformer/*": (lambda config: TRANSFORMER, 2),
    "rnn/bilstm*": (lambda config: ELMO, 1),
    "rnn/lstm*": (lambda config: WORD | recurrent("encoder.rnn", 4, H) | lm_head(), 1),
    "rnn/gru*": (lambda config: WORD | recurrent("encoder.rnn", 3, H) | lm_head(), 1),
    "rnn/siamese*": (lambda config: SIAMESE_LSTM, 1),
    "cnn/*": (lambda config: WORD | gated_cnn() | lm_head(), 2),
    "sbert/*": (lambda config: SBERT, 2),
}


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same model with few layers and small sizes; what is not set stays unset."""
    sizes = {
        "emb_size": E_FACTORIZED if config.factorized_embedding else H,
        "hidden_size": H,
        "feed_forward_size": F,
        "num_heads": N,
        "head_dim": D,
        "num_kv_heads": N_KV,
        "num_layers": LAYERS,
        "num_decoder_layers": DECODER_LAYERS,
        "max_seq_length": P,
        "kernel_size": KERNEL,
        "block_size": BLOCK,
    }
    changes: dict[str, Any] = {key: size for key, size in sizes.items() if getattr(config, key) is not None}
    if config.streams is not None:
        changes["streams"] = tuple(shrunk(stream) for stream in config.streams)
        changes["target"] = ("clr",)
    return config.model_copy(update=changes)


@pytest.mark.parametrize("pattern", FAMILIES)
def test_names_and_shapes_are_the_published_ones(pattern: str) -> None:
    expected, count = FAMILIES[pattern]
    paths = sorted(MODELS.glob(f"{pattern}config.json"))
    assert len(paths) >= count
    for path in paths:
        config = shrunk(load_config(path))
        processor = "mt" if config.decoder is not None and not config.share_embedding else None
        model = build_model(config, V, tgt_vocab_size=V_TGT, data_processor=processor or "bert", initialize=False)
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.streams is not None:  # their head belongs to the task that is fine-tuned
            found = {name: shape for name, shape in found.items() if not name.startswith("target.")}
        assert found == expected(config), path.name


def test_masked_language_models_lack_the_sentence_head() -> None:
    config = shrunk(load_config(MODELS / "bert" / "mini_config.json")).model_copy(update={"target": ("mlm",)})
    found = {name: tuple(tensor.shape) for name, tensor in build_model(config, V).state_dict().items()}
    assert found == BERT_BODY | mlm_head()
