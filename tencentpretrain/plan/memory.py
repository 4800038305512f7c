"""Memory of one process, moment by moment through an update, and by part at the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tencentpretrain.config.model import ModelConfig
from tencentpretrain.plan.activations import FLOAT, Lengths, Numerics
from tencentpretrain.plan.layers import layers_of
from tencentpretrain.plan.parameters import Weight
from tencentpretrain.plan.sharding import Sharding

MIB = 1 << 20
REDUCE_BUCKET = 25 * MIB
"""Gradients that travel together between replicas (`engines/reducer.py`)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a step does, besides the model.

    Fields:
        optimizer: "adamw" or "adafactor".
        accumulation: micro-steps per update.
        checkpointing: blocks are recomputed in the backward pass.
        saves_meanwhile: checkpoints are written while training goes on, so their copies stand beside its memory.
    """

    lengths: Lengths
    numerics: Numerics = field(default_factory=Numerics)
    optimizer: str = "adamw"
    accumulation: int = 1
    checkpointing: bool = False
    sharding: Sharding = field(default_factory=Sharding)
    saves_meanwhile: bool = False


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes by part at one point of an update."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of one process.

    Fields:
        device: the worst moment on the device that computes (host memory if that is the CPU).
        host: bytes by part in the host's memory, if the device is another.
        moments: all moments.
    """

    device: Moment
    host: Mapping[str, float] = field(default_factory=dict)
    moments: tuple[Moment, ...] = ()


def optimizer_bytes(weights: Sequence[Weight], optimizer: str) -> float:
    """Returns the bytes of an optimizer's state: two moments (adamw), or a row and a column mean (adafactor)."""
    trained = [weight for weight in weights if weight.trained]
    if optimizer != "adafactor":
        return float(2 * FLOAT * sum(weight.size for weight in trained))
    total = 0
    for weight in trained:
        if len(weight.shape) < 2:
            total += weight.size
        else:
            total += weight.size // weight.shape[-1] + weight.size // weight.shape[-2]
    return float(FLOAT * total)


def moments_of(
    config: ModelConfig, weights: Sequence[Weight], training: Training, *, save: bool = True
) -> list[Moment]:
    """Returns the moments of an update (and of saving) at which memory can be at its largest.

    Weights, gradients and optimizer are cut over processes as `Sharding` says (Rajbhandari et al. 2020,
    arXiv:1910.02054, section 3). Between forward and backward pass of the top layers nearly all activations are held;
    further down, gradients take the place of activations.
    """
    shard, numerics = training.sharding, training.numerics
    count = sum(weight.size for weight in weights)
    trained = [weight for weight in weights if weight.trained]
    trained_count = sum(weight.size for weight in trained)
    largest = max((weight.size for weight in trained), default=0)
    copies = 0.0
    if save and not shard.other_device:
        copies = shard.snapshot_bytes(FLOAT * count + optimizer_bytes(weights, training.optimizer))
    held = {
        "weights": shard.weight_bytes(count),
        "optimizer": shard.optimizer_bytes(optimizer_bytes(weights, training.optimizer), trained_count),
    }
    whole_gradients = shard.gradient_bytes(trained_count)
    accumulating = training.accumulation > 1
    standing = whole_gradients if accumulating else 0.0
    layers = layers_of(config, weights, training.lengths, numerics)
    *body, head = layers
    recompute = [training.checkpointing and layer.recomputed for layer in body]
    kept = [
        layer.shared + (layer.cost.entry if again else layer.cost.saved + layer.casts)
        for layer, again in zip(body, recompute, strict=True)
    ]
    batch = 8.0 * training.lengths.batch * (2 * training.lengths.source + 2 * training.lengths.target) * 1.5
    below = sum(kept) + batch
    found: list[Moment] = []

    def moment(name: str, gradients: float, activations: float, logits: float, work: float, buckets: float) -> None:
        parts = {"weights": held["weights"], "gradients": gradients, "optimizer": held["optimizer"]}
        parts |= {"activations": activations, "logits": logits, "communication": buckets, "working space": work}
        if training.saves_meanwhile:
            parts["checkpoint copies"] = copies
        found.append(Moment(name=name, parts=parts))

    cached = sum(layer.casts for layer, again in zip(body, recompute, strict=True) if again)
    logits = head.logits
    static = shard.gathered_bytes(weights)
    top = below + head.cost.saved + head.casts
    moment("forward, logits", standing, top + cached, logits.saved, logits.forward, static)
    moment("backward, logits", standing, top, logits.saved, logits.backward, static)
    fresh = shard.gradient_bytes(head.trained)
    half_copy = head.trained * numerics.low * numerics.half
    new = standing + fresh if not accumulating or head.tied else standing
    extra = half_copy + (fresh if accumulating and not head.tied else 0)
    moment("backward, head", new, below + head.cost.saved, logits.saved - logits.entry, extra, static)
    made = fresh
    for layer, again, own in reversed(list(zip(body, recompute, kept, strict=True))):
        made += shard.gradient_bytes(layer.trained)
        work = layer.cost.backward + ((layer.cost.saved - layer.cost.entry + layer.casts) if again else 0)
        work += layer.widest * (FLOAT * accumulating + numerics.low * numerics.half)
        if layer.table:  # the gradient of a table is dense; one that is there already waits beside it
            work += FLOAT * layer.table * ((head.tied or layer.table_shared) + accumulating)
        gradients = max(standing, made)
        moment(f"backward, {layer.name}", gradients, below, 0.0, work, static + shard.reduced_bytes(made))
        below -= own
    scratch = 3 * FLOAT * largest if training.optimizer == "adafactor" else 0.0
    moment("update", whole_gradients, 0.0, 0.0, scratch, shard.reduced_bytes(whole_gradients))
    if copies and not training.saves_meanwhile:
        found.append(Moment(name="save", parts={**held, "checkpoint copies": copies}))
    return found
