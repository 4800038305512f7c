"""The model of five parts: embedding, encoder, target embedding, decoder, target."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch, Stream
from tencentpretrain.embeddings.base import Embedding
from tencentpretrain.encoders.transformer import TransformerEncoder
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.documents import document_positions
from tencentpretrain.layers.initialization import SkipDefaults
from tencentpretrain.layers.initialization import initialize as initialize_weights
from tencentpretrain.registry import DECODERS, ENCODERS
from tencentpretrain.targets.base import ModelOutput
from tencentpretrain.targets.container import Targets


class Model(nn.Module):
    """Maps a batch to its losses. Parameter names are the published ones; a tied tensor has all of its names.

    Args:
        config: which parts and how large.
        vocab_size: rows of the source word table.
        tgt_vocab_size: rows of the target word table and of the heads, where a model has two vocabularies.
        pad_id: padding token.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, tgt_vocab_size: int | None = None, pad_id: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.tgt_vocab_size = tgt_vocab_size or vocab_size
        problems = list(config.problems())
        if problems:
            raise ConfigError(problems)
        self.embedding = Embedding(config, config.embedding, vocab_size, pad_id=pad_id)
        self.encoder: nn.Module = ENCODERS.get(config.encoder)(config)
        self.tgt_embedding: Embedding | None = None
        self.decoder: nn.Module | None = None
        if config.decoder is not None:
            self.tgt_embedding = Embedding(config, config.tgt_embedding, self.tgt_vocab_size, pad_id=pad_id)
            self.decoder = DECODERS.get(config.decoder)(config)
        self.target = Targets(config, self.tgt_vocab_size, pad_id=pad_id)
        self.head_is_tied = False
        self.tie()

    def forward(self, batch: Batch) -> ModelOutput:
        """Returns the losses of a batch."""
        hidden, segment_ids = self.features(batch)
        return ModelOutput(losses=self.target(hidden, batch, segment_ids))

    def features(self, batch: Batch) -> tuple[Stream, Stream]:
        """Returns the output (B, S, H) of the decoder if there is one, else of the encoder, and its segment ids."""
        hidden = self._encoded(batch)
        if self.decoder is None or self.tgt_embedding is None:
            return hidden, batch.segment_ids
        if batch.decoder_token_ids is None or batch.decoder_segment_ids is None:
            raise ConfigError(
                "the model has a decoder, but the batch has no decoder input; "
                "choose a data_processor for encoder-decoder models (mt, t5, gsg, bart)"
            )
        tgt_emb = self.tgt_embedding(batch.decoder_token_ids, batch.decoder_segment_ids)
        decoded: Tensor = self.decoder(hidden, tgt_emb, batch.segment_ids, batch.has_padding)
        return decoded, batch.decoder_segment_ids

    def _encoded(self, batch: Batch) -> Stream:
        """Returns the encoder's output, with the documents of packed rows kept apart."""
        if batch.document_ids is None:
            emb = self.embedding(batch.token_ids, batch.segment_ids)
            hidden: Stream = self.encoder(emb, batch.segment_ids, batch.has_padding)
            return hidden
        if self.decoder is not None or not isinstance(self.encoder, TransformerEncoder):
            raise ConfigError(
                "several documents share a row, and only a transformer without decoder keeps them apart; "
                "leave --pack_documents out"
            )
        position_ids = document_positions(batch.document_ids)
        emb = self.embedding(batch.token_ids, batch.segment_ids, position_ids=position_ids)
        packed: Tensor = self.encoder(emb, batch.segment_ids, batch.has_padding, batch.document_ids)
        return packed

    def tie(self) -> None:
        """Makes the tensors one that `share_embedding` and `tie_weights` name, the head last.

        Raises:
            ConfigError: the tensors have different shapes.
        """
        if self.config.share_embedding and self.tgt_embedding is not None:
            source, shared = word_table(self.embedding), word_table(self.tgt_embedding)
            if source is None or shared is None:
                raise ConfigError("share_embedding needs 'word' among embedding and tgt_embedding")
            if source.weight.shape != shared.weight.shape:
                raise ConfigError(
                    f"share_embedding needs one vocabulary for source and target, but the tables have "
                    f"{source.num_embeddings} and {shared.num_embeddings} rows"
                )
            shared.weight = source.weight
        head, table = self.head(), self.head_table()
        if self.config.tie_weights and head is not None and table is not None:
            if head.weight.shape != table.weight.shape:
                raise ConfigError(
                    f"tie_weights needs a head of the word table's shape {tuple(table.weight.shape)}, but it is "
                    f"{tuple(head.weight.shape)}; emb_size must equal the head's input width"
                )
            head.weight = table.weight
            self.head_is_tied = True

    def untie_head(self) -> None:
        """Gives the head a weight of its own, equal to the word table now; for files in which the two differ."""
        head = self.head()
        if head is not None and self.head_is_tied:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            self.head_is_tied = False

    def head(self) -> nn.Linear | None:
        """Returns the projection onto the vocabulary that `tie_weights` is about: the mlm head, else the lm head."""
        for name, layer in (("mlm", "linear_2"), ("lm", "output_layer")):
            if name in self.target.names:
                head = getattr(self.target.get_submodule(name), layer)
                assert isinstance(head, nn.Linear)
                return head
        return None

    def head_table(self) -> nn.Embedding | None:
        """Returns the word table that the head may share."""
        if "mlm" not in self.target.names and self.tgt_embedding is not None:
            table = word_table(self.tgt_embedding)
            if table is not None:
                return table
        return word_table(self.embedding)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Makes every transformer layer recompute its activations in the backward pass, or stops it."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", enabled)  # noqa: B010 (a flag, not a parameter or module)


def word_table(embedding: Embedding) -> nn.Embedding | None:
    """Returns the word table of an embedding that has one."""
    if "word" not in embedding.names:
        return None
    table = embedding.get_submodule("word.embedding")
    assert isinstance(table, nn.Embedding)
    return table


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    tgt_vocab_size: int | None = None,
    pad_id: int = 0,
    data_processor: str | None = None,
    initialize: bool = True,
    std: float = 0.02,
    deep_init: bool = False,
    seed: int | None = None,
) -> Model:
    """Builds a model with random weights.

    Args:
        config: which parts and how large.
        vocab_size: rows of the source word table.
        tgt_vocab_size: rows of the target word table and the heads, for models with two vocabularies.
        pad_id: padding token.
        data_processor: where the batches come from. Only a processor with a vocabulary for each side (`mt`) makes
            `tgt_vocab_size` count; None lets it count always.
        initialize: draw weights by layer type; False leaves the framework's defaults, for weights that are loaded next.
        std, deep_init: see `layers.initialization.initialize`.
        seed: of a random generator used for this model alone; None draws from torch's global one.

    Raises:
        ConfigError: the parts do not fit together or a size is missing.
    """
    if data_processor not in (None, "mt"):
        tgt_vocab_size = None
    with SkipDefaults() if initialize else nullcontext():
        model = Model(config, vocab_size, tgt_vocab_size=tgt_vocab_size, pad_id=pad_id)
    if initialize:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        depth = max(config.num_layers or 1, config.num_decoder_layers or 1) if deep_init else 1
        initialize_weights(model, std=std, deep=deep_init, num_layers=depth, generator=generator)
    return model
