"""The part of a model that this process holds, with the calls of a whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tencentpretrain.data.batch import Batch
from tencentpretrain.encoders.transformer import TransformerEncoder
from tencentpretrain.errors import ConfigError
from tencentpretrain.layers.documents import document_positions
from tencentpretrain.layers.position_bias import AlibiBias
from tencentpretrain.model import Model
from tencentpretrain.parallel.construct import Blueprint, names_of
from tencentpretrain.parallel.layout import MeshLayout
from tencentpretrain.parallel.mesh import Mesh
from tencentpretrain.parallel.pipeline import Line, Parcel, Stage, cut_stages, keep_stage, names_by_stage
from tencentpretrain.parallel.tensor import make_plan, split_layers
from tencentpretrain.targets.base import LossSum, ModelOutput


class PartModel(Model):
    """One stage of one slice of a model; made from a whole one by `build_part`.

    Attributes:
        stage: what it computes.
        layout: what of each tensor it holds.
        line: how it reaches the other stages.
    """

    stage: Stage
    layout: MeshLayout
    line: Line

    def compute(self, batch: Batch, received: Parcel) -> tuple[Parcel, ModelOutput | None]:
        """Returns what goes to the next stage, or from the last one the losses."""
        stage = self.stage
        hidden: Any = self._embedded(batch) if stage.is_first else received[0]
        memory = received[1] if stage.receives_memory else None
        if stage.encoder:
            documents = () if batch.document_ids is None else (batch.document_ids,)
            hidden = self.encoder(hidden, batch.segment_ids, batch.has_padding, *documents)
        if stage.decoder:
            assert self.decoder is not None
            if memory is None:
                assert self.tgt_embedding is not None
                memory, hidden = hidden, self.tgt_embedding(batch.decoder_token_ids, batch.decoder_segment_ids)
            hidden = self.decoder(memory, hidden, batch.segment_ids, batch.has_padding)
        if not stage.is_last:
            return [hidden] if memory is None else [hidden, memory], None
        segments = batch.segment_ids if batch.decoder_segment_ids is None else batch.decoder_segment_ids
        return [], ModelOutput(losses=self.target(hidden, batch, segments))

    def _embedded(self, batch: Batch) -> Any:
        if batch.document_ids is None:
            return self.embedding(batch.token_ids, batch.segment_ids)
        positions = document_positions(batch.document_ids)
        return self.embedding(batch.token_ids, batch.segment_ids, position_ids=positions)

    def forward(self, batch: Batch) -> ModelOutput:
        """Returns the losses of a batch, on all stages. Collective over the pipeline; without gradients."""
        if self.stage.count == 1:
            return super().forward(batch)
        if torch.is_grad_enabled():
            raise RuntimeError("a stage of a pipeline is trained by its engine")
        self.line.begin()
        sent, output = self.compute(batch, self.line.receive_forward(batch))
        self.line.send_forward(sent)
        told: list[Any] = [None]
        if output is not None:
            told = [{name: _numbers(loss) for name, loss in output.losses.items()}]
        group = self.layout.mesh.pipeline
        dist.broadcast_object_list(told, group=group.host, group_src=group.size - 1)
        return ModelOutput(losses={name: _loss(numbers) for name, numbers in told[0].items()})

    def untie_head(self) -> None:
        if not self.head_is_tied:
            return
        name = "target.mlm.linear_2.weight" if "mlm" in self.config.target else "target.lm.output_layer.weight"
        if self.stage.is_last:
            super().untie_head()
        self.head_is_tied = False
        self.layout.untie(name)


def _numbers(loss: LossSum) -> tuple[float, int, int | None]:
    return float(loss.total), int(loss.count), None if loss.correct is None else int(loss.correct)


def _loss(numbers: tuple[float, int, int | None]) -> LossSum:
    total, count, correct = numbers
    return LossSum(
        total=torch.tensor(total, dtype=torch.float64),
        count=torch.tensor(count),
        correct=None if correct is None else torch.tensor(correct),
    )


def build_part(make: Callable[[], Model], mesh: Mesh, device: torch.device) -> PartModel:
    """Returns this process's part of the model that `make` builds.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    blueprint = Blueprint(make)
    model = blueprint.model
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise ConfigError(f"tensor_model_parallel_size: {buffers[0]} is no parameter; this model cannot be cut")
    stages = cut_stages(model.config, mesh.pipeline.size)
    stage = stages[mesh.pipeline.rank]
    plans = [make_plan(model, rank, mesh.tensor.size) for rank in range(mesh.tensor.size)]
    by_stage = names_by_stage(list(blueprint.whole), stages)
    if stage.count > 1:
        keep_stage(model, stage)
    expected = {name for name, held in by_stage.items() if stage.number in held}
    assert set(names_of(model)) == expected, set(names_of(model)) ^ expected
    blueprint.materialize(plans[mesh.tensor.rank])
    encoder = model.encoder
    if isinstance(encoder, TransformerEncoder) and encoder.alibi is not None:
        assert model.config.num_heads is not None
        encoder.alibi = AlibiBias(model.config.num_heads)  # computed, so its first copy has no memory
    split_layers(model, plans[mesh.tensor.rank], mesh.tensor)
    model.__class__ = PartModel
    assert isinstance(model, PartModel)
    model.stage = stage
    model.layout = MeshLayout(mesh, blueprint.whole, plans, by_stage)
    model.line = Line(mesh.pipeline, stage, model.config.hidden_size or 0, device)
    return model


def partial_parameters(model: PartModel) -> list[nn.Parameter]:
    """Returns the parameters whose gradient is to be summed over the tensor group before it is used."""
    plan = model.layout.plans[model.layout.mesh.tensor.rank]
    names = model.layout.tied_to
    partial = {names[name] for name in plan.partial}
    return [tensor for name, tensor in model.named_parameters() if names[name] in partial]


def share_of_norm(layout: MeshLayout, name: str) -> float:
    """Returns what a tensor's squared norm counts here, so that over all processes each element counts once."""
    part = layout.slice(name)
    copies = layout.mesh.tensor.size if part is None else part.copies
    return 1.0 / (copies * len(layout.holders(name)))


def whole_gradient(layout: MeshLayout, name: str, gradient: Tensor) -> Tensor:
    """Returns a gradient summed over all processes of the tensor group that hold a copy of this part. Collective."""
    part = layout.slice(name)
    if part is None:
        return layout.mesh.tensor.sum(gradient)
    whole = gradient.new_zeros(layout.whole[name].shape)
    part.of(whole).copy_(gradient)
    return part.of(layout.mesh.tensor.sum(whole)).contiguous()
