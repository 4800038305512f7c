"""Pipeline parallelism: each process holds some consecutive layers, micro-batches follow each other through them.

Huang et al. 2018 (arXiv:1811.06965, section 2); one forward, one backward: Narayanan et al. 2021 (arXiv:2104.04473,
section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.decoders.transformer import TransformerDecoder
from tencentpretrain.encoders.transformer import TransformerEncoder
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.blocks import EncoderBlock
from tencentpretrain.parallel.group import Group
from tencentpretrain.parallel.tensor import block


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage of the pipeline computes.

    Fields:
        number, count: which stage, of how many.
        encoder, decoder: the blocks it holds.
        encoder_end: number of encoder blocks of the model.
        decoder_end: number of decoder blocks of the model; 0 without a decoder.
    """

    number: int
    count: int
    encoder: range
    decoder: range
    encoder_end: int
    decoder_end: int

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    @property
    def starts_decoder(self) -> bool:
        return bool(self.decoder) and self.decoder.start == 0

    @property
    def receives_memory(self) -> bool:
        """Whether the encoder's output comes beside the decoder's hidden states."""
        return bool(self.decoder) and self.decoder.start > 0


def cut_stages(config: ModelConfig, count: int) -> list[Stage]:
    """Cuts the blocks of encoder and decoder, in their order, into stages of about the same number.

    Raises:
        ConfigError: there are fewer blocks than stages.
    """
    encoder_end = config.num_layers or 0
    decoder_end = (config.num_decoder_layers or 0) if config.decoder else 0
    if encoder_end + decoder_end < count:
        raise ConfigError(
            f"pipeline_model_parallel_size: is {count}, but the model has only {encoder_end + decoder_end} layers"
        )
    stages = []
    for number in range(count):
        start, stop = block(encoder_end + decoder_end, number, count)
        encoder = range(min(start, encoder_end), min(stop, encoder_end))
        decoder = range(max(start - encoder_end, 0), max(stop - encoder_end, 0))
        stages.append(
            Stage(
                number=number,
                count=count,
                encoder=encoder,
                decoder=decoder,
                encoder_end=encoder_end,
                decoder_end=decoder_end,
            )
        )
    return stages


_BLOCK = re.compile(r"(encoder\.transformer|decoder\.transformer_decoder)\.(\d+)\.")


def holders(name: str, stages: Sequence[Stage]) -> frozenset[int]:
    """Returns the stages that hold a tensor of this name."""
    encoding = [stage.number for stage in stages if stage.encoder]
    decoding = [stage.number for stage in stages if stage.decoder]
    match = _BLOCK.match(name)
    if match:
        index = int(match[2])
        side = "encoder" if match[1].startswith("encoder") else "decoder"
        return frozenset(stage.number for stage in stages if index in getattr(stage, side))
    for prefix, held in (
        ("embedding.", [0]),
        ("encoder.linear.", [0]),
        ("encoder.layer_norm.", encoding[-1:]),
        ("encoder.transformer.", encoding),  # one block for all layers
        ("encoder.relative_pos_emb.", encoding),
        ("tgt_embedding.", decoding[:1]),
        ("decoder.layer_norm.", decoding[-1:]),
        ("decoder.self_pos_emb.", decoding),
        ("target.", [len(stages) - 1]),
    ):
        if name.startswith(prefix):
            return frozenset(held)
    raise ConfigError(f"pipeline_model_parallel_size: {name} belongs to no stage; this model cannot be cut into stages")


class _AbsentBlock(EncoderBlock):
    """Stands for a block of another stage and passes its input on."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, hidden: Tensor, *unused: Any, **settings: Any) -> Tensor:
        return hidden


def keep_stage(model: nn.Module, stage: Stage) -> None:
    """Takes the parts of the other stages out of a model. Names stay."""
    if not stage.is_first:
        model.embedding = nn.Module()
    if not stage.is_last:
        model.target = nn.Module()
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, TransformerEncoder)
    if not stage.encoder:
        model.encoder = nn.Module()
    else:
        if stage.encoder.start:
            encoder.linear = None
        if stage.encoder.stop < stage.encoder_end:
            encoder.layer_norm = None
        if isinstance(encoder.transformer, nn.ModuleList):
            for index in set(range(stage.encoder_end)) - set(stage.encoder):
                encoder.transformer[index] = _AbsentBlock()
        else:
            encoder.layer = encoder.layer[: len(stage.encoder)]
    if decoder is None:
        return
    assert isinstance(decoder, TransformerDecoder)
    if not stage.starts_decoder:
        model.tgt_embedding = nn.Module()
    if not stage.decoder:
        model.decoder = nn.Module()
        return
    if stage.decoder.stop < stage.decoder_end:
        decoder.layer_norm = None
    for index in set(range(stage.decoder_end)) - set(stage.decoder):
        decoder.transformer_decoder[index] = _AbsentBlock()


Parcel = list[Tensor]
"""What goes from stage to stage: hidden states (B, T, H), and inside the decoder the encoder's output (B, S, H)."""


class Line:
    """How a stage reaches its neighbours.

    Args:
        group: the pipeline.
        stage: this process's.
        width: H of what travels.
        device: where tensors live.
    """

    def __init__(self, group: Group, stage: Stage, width: int, device: torch.device) -> None:
        self._group = group
        self._stage = stage
        self._width = width
        self._device = device
        self._dtype: torch.dtype | None = None
        self._told = False

    def begin(self) -> None:
        """Starts an update: the number format of what travels is told anew."""
        self._dtype, self._told = None, False

    def receive_forward(self, batch: Batch, sent: Parcel = ()) -> Parcel:  # type: ignore[assignment]
        """Receives the hidden states of a micro-batch, while gradients go the other way."""
        if self._stage.is_first:
            return []
        received = self._empty_like_input(batch) if self._dtype is not None else None
        if received is None:
            assert not sent
            codes = torch.empty(1, dtype=torch.int64)
            dist.recv(codes, group=self._group.host, group_src=self._stage.number - 1)
            self._dtype = _DTYPES[int(codes)]
            received = self._empty_like_input(batch)
        self._exchange(sent, received, self._stage.number - 1)
        return [tensor.requires_grad_(torch.is_grad_enabled()) for tensor in received]

    def send_forward(self, outputs: Parcel, earlier: Parcel = ()) -> Parcel:  # type: ignore[assignment]
        """Sends hidden states on and meanwhile receives the gradients of what was sent earlier."""
        if self._stage.is_last:
            return []
        if not self._told:
            code = torch.tensor([_DTYPES.index(outputs[0].dtype)])
            dist.send(code, group=self._group.host, group_dst=self._stage.number + 1)
            self._told = True
        received = [torch.empty_like(tensor) for tensor in earlier]
        self._exchange([tensor.detach() for tensor in outputs], received, self._stage.number + 1)
        return received

    def receive_backward(self, outputs: Parcel) -> Parcel:
        """Receives the gradients of what was sent forward."""
        if self._stage.is_last:
            return []
        received = [torch.empty_like(tensor) for tensor in outputs]
        self._exchange([], received, self._stage.number + 1)
        return received

    def send_backward(self, gradients: Parcel) -> None:
        """Sends the gradients of what was received."""
        if not self._stage.is_first:
            self._exchange(gradients, [], self._stage.number - 1)

    def _empty_like_input(self, batch: Batch) -> Parcel:
        assert isinstance(batch.segment_ids, Tensor)
        shapes = [tuple(batch.segment_ids.shape)]
        if self._stage.receives_memory:
            assert batch.decoder_segment_ids is not None
            shapes.insert(0, tuple(batch.decoder_segment_ids.shape))
        return [torch.empty((*shape, self._width), dtype=self._dtype, device=self._device) for shape in shapes]

    def _exchange(self, sent: Parcel, received: Parcel, peer: int) -> None:
        group = self._group.device
        operations = [
            *(dist.P2POp(dist.isend, tensor.contiguous(), group=group, group_peer=peer) for tensor in sent),
            *(dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for tensor in received),
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def one_forward_one_backward(
    line: Line,
    stage: Stage,
    batches: Sequence[Batch],
    forward: Callable[[int, Parcel], Parcel],
    backward: Callable[[int, Parcel, Parcel], Parcel],
) -> None:
    """Runs the micro-batches of an update through a stage; at most count - number of them are in flight.

    Args:
        batches: they tell the shapes of what travels.
        forward: maps a micro-batch's number and what was received to what is sent on.
        backward: maps a micro-batch's number, what was sent on and its gradients to the gradients of what was received.
    """
    line.begin()
    ahead = min(stage.count - stage.number - 1, len(batches))
    flying: list[Parcel] = []
    done = 0
    for number in range(ahead):
        flying.append(forward(number, line.receive_forward(batches[number])))
        line.send_forward(flying[-1])
    received = line.receive_forward(batches[ahead]) if ahead < len(batches) else []
    for number in range(ahead, len(batches)):
        flying.append(forward(number, received))
        gradients = line.send_forward(flying[-1], flying[0])
        given = backward(done, flying.pop(0), gradients)
        done += 1
        if number + 1 < len(batches):
            received = line.receive_forward(batches[number + 1], given)
        else:
            line.send_backward(given)
    while flying:
        outputs = flying.pop(0)
        line.send_backward(backward(done, outputs, line.receive_backward(outputs)))
        done += 1


def names_by_stage(names: Sequence[str], stages: Sequence[Stage]) -> Mapping[str, frozenset[int]]:
    """Maps each name to the stages that hold it."""
    return {name: holders(name, stages) for name in names}
