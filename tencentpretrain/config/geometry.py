"""What the parts of one model miss or contradict, told from the settings alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tencentpretrain.config import dialect
from tencentpretrain.config.names import name_problem

if TYPE_CHECKING:
    from tencentpretrain.config.model import ModelConfig

_RECURRENT = frozenset({"rnn", "lstm", "gru", "birnn", "bilstm", "bigru"})
_TWO_WAY = frozenset({"birnn", "bilstm", "bigru"})
_IMAGE = frozenset({"patch", "masked_patch", "word_patch"})


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Yields one sentence per problem, each starting with its published key and a colon."""
    yield from _names(model)
    if model.streams is not None:
        yield from _streams(model)
        return
    if "dual" in model.embedding or model.encoder == "dual":
        yield "stream_0: is missing; a two-stream model needs the objects stream_0 and stream_1"
        return
    yield from _required(model)
    yield from _widths(model)
    yield from _attention(model)
    yield from _heads(model)


def _names(model: ModelConfig) -> Iterator[str]:
    chosen = [
        *(("embedding", "embedding", name) for name in model.embedding),
        ("encoder", "encoder", model.encoder),
        *(("target", "target", name) for name in model.target),
    ]
    if model.decoder is not None:
        chosen.append(("decoder", "decoder", model.decoder))
        chosen.extend(("tgt_embedding", "embedding", name) for name in model.tgt_embedding)
    for key, kind, name in chosen:
        problem = name_problem(kind, name)
        if problem:
            yield f"{key}: {problem}"
    for key in ("embedding", "tgt_embedding", "target"):
        names = getattr(model, key)
        if not names and key != "target":  # a body below a task's head has none
            yield f"{key}: is an empty list; name at least one part"
        if len(set(names)) < len(names):
            yield f"{key}: names a part twice: {', '.join(names)}"
    if "dual" in model.embedding and len(model.embedding) > 1:
        yield f"embedding: 'dual' stands alone; its parts are set in stream_0 and stream_1, not {list(model.embedding)}"
    if "dual" in model.tgt_embedding:
        yield "tgt_embedding: the target side has one stream; 'dual' is for the source side"


def _streams(model: ModelConfig) -> Iterator[str]:
    if ("dual" in model.embedding) != (model.encoder == "dual"):
        key = "encoder" if "dual" in model.embedding else "embedding"
        yield f"{key}: embedding 'dual' and encoder 'dual' belong together, but only one of them is chosen"
    elif model.encoder != "dual":
        yield "stream_0: is only read by embedding 'dual' and encoder 'dual'"
    if model.decoder is not None:
        yield "decoder: a two-stream model has no decoder"
    streams = model.streams or ()
    for number, stream in enumerate(streams):
        if "dual" in stream.embedding or stream.encoder == "dual":
            yield f"stream_{number}.encoder: a stream cannot be dual itself; set its embedding and encoder"
            continue
        for check in (_names, _required, _widths, _attention):
            yield from (f"stream_{number}.{sentence}" for sentence in check(stream))
    if "clr" in model.target and not model.projection and len({stream.hidden_size for stream in streams}) > 1:
        yield "projection: the streams differ in hidden_size, so 'clr' can only compare them after a projection"
    if model.projection and model.feature_size is None:
        yield "feature_size: a projection needs it: the width both streams are projected to"
    if model.tie_weights and len({_shape(stream) for stream in streams}) > 1:
        yield "tie_weights: makes the two streams one, but their settings differ"


def _shape(model: ModelConfig) -> tuple[object, ...]:
    return (model.encoder, model.embedding, model.emb_size, model.hidden_size, model.num_layers, model.num_heads)


def _required(model: ModelConfig) -> Iterator[str]:
    needed = dict.fromkeys(("emb_size", "hidden_size"), f"encoder {model.encoder!r}")
    if model.encoder in {"transformer", "gatedcnn", *_RECURRENT, *_TWO_WAY}:
        needed["num_layers"] = f"encoder {model.encoder!r}"
    if model.encoder == "transformer" or model.decoder is not None:
        reader = "encoder 'transformer'" if model.encoder == "transformer" else "decoder 'transformer'"
        needed |= dict.fromkeys(("feed_forward_size", "hidden_act", "num_heads"), reader)
    if model.encoder == "gatedcnn":
        needed |= dict.fromkeys(("kernel_size", "block_size"), "encoder 'gatedcnn'")
    if model.decoder is not None:
        needed["num_decoder_layers"] = f"decoder {model.decoder!r}"
    for field, reader in needed.items():
        if getattr(model, field) is None:
            yield f"{dialect.published(field)}: is missing, but {reader} needs it"


def _widths(model: ModelConfig) -> Iterator[str]:
    emb, hidden = model.emb_size, model.hidden_size
    if emb is None or hidden is None:
        return
    if emb != hidden and model.encoder == "transformer" and not model.factorized_embedding:
        yield (
            f"emb_size: is {emb}, but hidden_size is {hidden}; make them equal "
            "or set factorized_embedding_parameterization"
        )
    if emb != hidden and model.decoder is not None:
        yield f"emb_size: is {emb}, but a decoder reads embeddings of hidden_size {hidden}"
    if "sinusoidalpos" in (*model.embedding, *(model.tgt_embedding if model.decoder else ())) and (emb % 2 or emb < 4):
        yield f"emb_size: is {emb}, but sinusoidal positions need an even width of at least 4"
    if hidden % 2 and (model.encoder in _TWO_WAY or (model.bidirectional and model.encoder in _RECURRENT)):
        yield f"hidden_size: is {hidden}, but an encoder that reads both ways halves it; make it even"
    if model.bidirectional and model.encoder in _TWO_WAY:
        yield f"bidirectional: encoder {model.encoder!r} reads both ways already; leave it out"
    if _IMAGE & {*model.embedding}:
        for key in ("image_height", "image_width"):
            if getattr(model, key) % model.patch_size:
                yield f"{key}: is {getattr(model, key)}, which patch_size {model.patch_size} does not divide"


def _attention(model: ModelConfig) -> Iterator[str]:
    heads, hidden = model.num_heads, model.hidden_size
    if heads is None or hidden is None or not (model.encoder == "transformer" or model.decoder):
        return
    if model.head_dim is None and hidden % heads:
        yield f"hidden_size: is {hidden}, which heads_num {heads} does not divide (or set attention_head_size)"
    if model.num_kv_heads is not None and heads % model.num_kv_heads:
        yield f"local_kv_heads_num: is {model.num_kv_heads}, which does not divide heads_num {heads}"
    width = model.head_dim or hidden // heads
    if model.rotary_position_embedding and width % 2:
        yield f"rotary_position_embedding: turns pairs, so the head width must be even, but it is {width}"
    positions = ("relative_position_embedding", "rotary_position_embedding", "alibi_position_embedding")
    chosen = [dialect.published(name) for name in positions if getattr(model, name)]
    if len(chosen) > 1:
        yield f"{chosen[1]}: {' and '.join(chosen)} are both on; choose one kind of position"
    if model.alibi_position_embedding and model.mask != "causal":
        yield f"alibi: is a bias for causal attention, but mask is {model.mask}"
    scaling = model.rope_scaling
    if scaling is not None and scaling.type in ("llama3", "yarn") and scaling.original_max_seq_length is None:
        yield f"rope_scaling: type {scaling.type!r} needs original_max_seq_length"
    if model.sliding_window is not None and model.mask != "causal":
        yield f"sliding_window: works with mask causal only, but mask is {model.mask}"


def _heads(model: ModelConfig) -> Iterator[str]:
    if "mlm" in model.target and model.hidden_act is None:
        yield "hidden_act: is missing, but target 'mlm' needs it"
    if "clr" in model.target:
        yield "target: 'clr' compares two streams; it needs embedding and encoder 'dual'"
    if {"bilm", "lm"} <= {*model.target}:
        yield "target: 'bilm' and 'lm' cannot be trained together; their labels differ in direction"
    if model.tie_weights:
        yield from _tying(model)
    if model.share_embedding:
        if model.decoder is None:
            yield "share_embedding: shares the source table with the target side, but there is no decoder"
        elif "word" not in model.embedding or "word" not in model.tgt_embedding:
            yield "share_embedding: needs 'word' in embedding and in tgt_embedding"


def _tying(model: ModelConfig) -> Iterator[str]:
    table = model.tgt_embedding if model.decoder is not None and "mlm" not in model.target else model.embedding
    if not {"mlm", "lm"} & {*model.target}:
        return
    if "word_patch" in table or "word" not in (*table, *model.embedding):
        yield "tie_weights: shares the word table with the head, but no embedding part 'word' is chosen"
    factorized_head = model.factorized_embedding and "mlm" in model.target
    if model.emb_size != model.hidden_size and not factorized_head:
        yield f"tie_weights: the word table has width {model.emb_size}, but the head reads {model.hidden_size}"
