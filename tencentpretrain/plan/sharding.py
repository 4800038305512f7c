"""How weights, gradients and optimizer are spread over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tencentpretrain.plan.parameters import Weight

if TYPE_CHECKING:
    from tencentpretrain.config.run import RunConfig

FLOAT = 4
DEEPSPEED_BUCKET = 500_000_000
"""Elements of a bucket where a DeepSpeed config names none (DeepSpeed's documented default)."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The processes that share a replica's state.

    Fields:
        data_size: data-parallel processes.
        model_size: processes that share one replica (tensor times pipeline parallel).
        stage: ZeRO stage 0 to 3 (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).
        deepspeed: DeepSpeed runs the step, with flat buckets and its own number formats.
        half_weights: weights and gradients are stored in 16 bits, with a float32 copy beside the optimizer.
        offload_optimizer, offload_weights: kept in the host's memory.
        other_device: the step runs on a GPU.
        reduce_bucket, gather_bucket: elements.
    """

    data_size: int = 1
    model_size: int = 1
    stage: int = 0
    deepspeed: bool = False
    half_weights: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    other_device: bool = False
    reduce_bucket: int = DEEPSPEED_BUCKET
    gather_bucket: int = DEEPSPEED_BUCKET

    @property
    def element(self) -> int:
        """Bytes of a stored weight."""
        return 2 if self.half_weights else FLOAT

    def _part(self, stage: int) -> float:
        return self.model_size * (self.data_size if self.stage >= stage else 1)

    def weight_bytes(self, count: int) -> float:
        """Returns the bytes of the weights that the device holds all the time."""
        if self.offload_weights and self.other_device:
            return 0.0
        return count * self.element / self._part(3)

    def gradient_bytes(self, count: float) -> float:
        """Returns the bytes of the gradients of `count` numbers."""
        if self.offload_optimizer and self.other_device and self.stage >= 2:
            return 0.0
        return count * self.element / self._part(2)

    def optimizer_bytes(self, state: float, trained: int) -> float:
        """Returns the bytes of the optimizer's state (`state` if one process held it all) and float32 copies."""
        if self.offload_optimizer and self.other_device:
            return 0.0
        return self._whole_optimizer(state, trained)

    def _whole_optimizer(self, state: float, trained: int) -> float:
        # ZeRO's flat partitions keep a float32 copy of their share even where the weights are float32.
        copies = trained * FLOAT if self.half_weights or (self.deepspeed and self.stage >= 1) else 0
        return (state + copies) / self._part(1)

    def host_bytes(self, state: float, count: int, trained: int) -> Mapping[str, float]:
        """Returns what is kept in the host's memory while a GPU computes."""
        if not self.other_device:
            return {}
        parts = {}
        if self.offload_optimizer:
            parts["optimizer"] = self._whole_optimizer(state, trained) + trained * FLOAT / self._part(2)
        if self.offload_weights:
            parts["weights"] = count * self.element / self._part(3)
        return parts

    def reduced_bytes(self, made: float) -> float:
        """Returns the bytes of gradients on their way between processes, when there are `made` bytes of gradients."""
        if self.deepspeed:
            bucket = float(self.reduce_bucket) * self.element
            return min(bucket, made * self._part(2)) * (2 if self.stage >= 2 else 1)
        # The joined copy of each bucket stays until all sums have arrived and then is the gradient.
        return made if self.data_size > 1 and self.stage == 0 else 0.0

    def gathered_bytes(self, weights: Sequence[Weight]) -> float:
        """Returns the bytes of weights that are whole only while a layer needs them (ZeRO-3)."""
        if self.stage < 3:
            return 0.0
        count = sum(weight.size for weight in weights)
        largest = max((weight.size for weight in weights), default=0)
        return min(float(count), max(2.0 * largest, float(self.gather_bucket))) * self.element

    def snapshot_bytes(self, whole: float) -> float:
        """Returns the bytes of the copies that this process saves of `whole` bytes."""
        return whole / (self.data_size * self.model_size)


def sharding_of(run: RunConfig, *, world_size: int, other_device: bool) -> Sharding:
    """Returns how a run spreads its state.

    Args:
        world_size: processes in all.
        other_device: they compute on GPUs.
    """
    model_size = run.launch.tensor_model_parallel_size * run.launch.pipeline_model_parallel_size
    data_size = max(world_size // model_size, 1)
    if run.deepspeed is None:
        stage = 3 if run.launch.fsdp and world_size > 1 else 0
        return Sharding(
            data_size=data_size, model_size=model_size, stage=stage, other_device=other_device, gather_bucket=0
        )
    zero = run.deepspeed.values.get("zero_optimization", {})
    stage = run.deepspeed.stage

    def offloads(what: str) -> bool:
        return bool((zero.get(f"offload_{what}") or {}).get("device", "none") != "none")

    def elements(name: str) -> int:
        value = zero.get(name, DEEPSPEED_BUCKET)
        return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else DEEPSPEED_BUCKET

    return Sharding(
        data_size=data_size,
        model_size=model_size,
        stage=stage,
        deepspeed=True,
        half_weights=run.precision.bf16 or run.precision.fp16,
        offload_optimizer=offloads("optimizer"),
        offload_weights=offloads("param"),
        other_device=other_device,
        reduce_bucket=elements("reduce_bucket_size"),
        gather_bucket=elements("stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"),
    )
