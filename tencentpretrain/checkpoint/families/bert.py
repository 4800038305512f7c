"""BERT (Devlin et al. 2019, arXiv:1810.04805) as `transformers.BertForPreTraining` stores it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tencentpretrain.checkpoint.family import Family, Settings
from tencentpretrain.checkpoint.hf_config import HuggingFaceConfig, heads_present
from tencentpretrain.checkpoint.rules import PadRows
from tencentpretrain.registry import FAMILIES


def _config(hf_config: Settings, names: Collection[str]) -> dict[str, Any]:
    theirs = HuggingFaceConfig(hf_config, "bert")
    theirs.expect("position_embedding_type", "absolute", default="absolute")
    theirs.expect("is_decoder", False, default=False)
    theirs.expect("type_vocab_size", 2, default=2)
    hidden_size = theirs.need("hidden_size")
    heads = heads_present(names, {"cls.predictions.": "mlm", "cls.seq_relationship.": "sp"})
    config = {
        "emb_size": hidden_size,
        "feedforward_size": theirs.need("intermediate_size"),
        "hidden_size": hidden_size,
        "hidden_act": theirs.activation("hidden_act", "gelu"),
        "heads_num": theirs.need("num_attention_heads"),
        "layers_num": theirs.need("num_hidden_layers"),
        "max_seq_length": theirs.get("max_position_embeddings", 512),
        "dropout": theirs.get("hidden_dropout_prob", 0.1),
        "data_processor": "bert" if "sp" in heads else "mlm",
        "embedding": ["word", "pos", "seg"],
        "encoder": "transformer",
        "mask": "fully_visible",
        "layernorm_form": "standard",
        "layernorm_eps": theirs.get("layer_norm_eps", 1e-12),
        "target": heads or ["mlm"],
        "tie_weights": theirs.get("tie_word_embeddings", True),
    }
    theirs.done()
    return config


BERT = FAMILIES.register("bert")(
    Family(
        name="bert",
        model_class="BertForPreTraining",
        config=_config,
        prefix="bert.",
        words={"a": {"0": "query", "1": "key", "2": "value"}},
        renames={
            "embedding.word.embedding.weight": "bert.embeddings.word_embeddings.weight",
            "embedding.pos.embedding.weight": "bert.embeddings.position_embeddings.weight",
            "embedding.layer_norm.{n}": "bert.embeddings.LayerNorm.{n}",
            "encoder.transformer.{i}.self_attn.linear_layers.{a}.{p}": "bert.encoder.layer.{i}.attention.self.{a}.{p}",
            "encoder.transformer.{i}.self_attn.final_linear.{p}": "bert.encoder.layer.{i}.attention.output.dense.{p}",
            "encoder.transformer.{i}.layer_norm_1.{n}": "bert.encoder.layer.{i}.attention.output.LayerNorm.{n}",
            "encoder.transformer.{i}.feed_forward.linear_1.{p}": "bert.encoder.layer.{i}.intermediate.dense.{p}",
            "encoder.transformer.{i}.feed_forward.linear_2.{p}": "bert.encoder.layer.{i}.output.dense.{p}",
            "encoder.transformer.{i}.layer_norm_2.{n}": "bert.encoder.layer.{i}.output.LayerNorm.{n}",
            "target.mlm.linear_1.{p}": "cls.predictions.transform.dense.{p}",
            "target.mlm.layer_norm.{n}": "cls.predictions.transform.LayerNorm.{n}",
            "target.mlm.linear_2.weight": "cls.predictions.decoder.weight",
            "target.mlm.linear_2.bias": "cls.predictions.bias",
            "target.sp.linear_1.{p}": "bert.pooler.dense.{p}",
            "target.sp.linear_2.{p}": "cls.seq_relationship.{p}",
        },
        # Our segment 0 is padding, theirs begins with the first sentence.
        rules=[PadRows(("embedding.seg.embedding.weight",), "bert.embeddings.token_type_embeddings.weight", first=1)],
        aliases=[(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")],
        theirs_only=["bert.embeddings.position_ids"],
        shared=[("cls.predictions.bias", "cls.predictions.decoder.bias")],
        tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
        optional=["target."],
    )
)
