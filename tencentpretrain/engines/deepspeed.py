"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054); loss, clipping and checkpoints are our own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tencentpretrain.config.deepspeed import DeepSpeedSettings
from tencentpretrain.config.train import PrecisionConfig
from tencentpretrain.data.batch import Batch
from tencentpretrain.engines.base import Losses, MicroStep, Snapshot, Update, Values
from tencentpretrain.engines.local import LocalEngine
from tencentpretrain.engines.ownership import owned
from tencentpretrain.engines.partitions import (
    FillParts,
    PartitionedLayout,
    Stand,
    cast_parts,
    is_partitioned,
    whole_shape,
)
from tencentpretrain.engines.processes import Group
from tencentpretrain.engines.reading import detached, read, values_of
from tencentpretrain.engines.replicas import ReplicaEngine
from tencentpretrain.errors import CheckpointMismatch, ConfigError, NonFiniteGradientError
from tencentpretrain.model import Model
from tencentpretrain.targets.base import LossSum


def build_engine(config: PrecisionConfig, settings: DeepSpeedSettings, group: Group) -> LocalEngine:
    """Returns the engine of a ZeRO stage. Stage 0 cuts nothing, so it is data parallelism without DeepSpeed."""
    if settings.stage == 0:
        return LocalEngine(config) if group.size == 1 else ReplicaEngine(config, group)
    return DeepSpeedEngine(config, settings, group)


class DeepSpeedEngine(LocalEngine):
    """ZeRO: optimizer state (1), gradients (2) and weights (3) are cut over the processes.

    With bf16 or fp16 the weights of forward and backward passes have that format and the optimizer updates float32
    masters, which are what checkpoints hold.

    Args:
        config: number formats and device.
        settings: of DeepSpeed.
        group: all processes of the run.

    Raises:
        ConfigError: the settings contradict the device, or DeepSpeed is not installed.
    """

    def __init__(self, config: PrecisionConfig, settings: DeepSpeedSettings, group: Group) -> None:
        self._dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
        super().__init__(config)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=False)  # DeepSpeed scales
        self.group = group
        self.rank = self.data_rank = group.rank
        self.world_size = self.data_size = group.size
        self.settings = settings
        self._deepspeed = _import_deepspeed(self.device)
        _meet(self.device)
        self._deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        if settings.stage == 3:
            self.layout = PartitionedLayout(lambda module: self._zero_init(module))
        self._wrapped: Any = None
        self._trained: dict[str, nn.Parameter] = {}
        self._pending = False
        """Whether there are gradients of an update that was not made."""

    def construct(self, make: Callable[[], Model]) -> Model:
        if self.settings.stage < 3:
            return make()
        with self._zero_init(), FillParts():
            return make()

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        self._place(model)
        parameters = dict(model.named_parameters())
        optimizer = make_optimizer(Stand(model))
        for group in optimizer.param_groups:
            group["params"] = [parameters[name] for name in group["names"]]
            self._trained |= {name: parameters[name] for name in group["names"]}
        with cast_parts(parameters, self._dtype) as exact:
            self._wrapped, *_ = self._deepspeed.initialize(
                model=_Share(model), optimizer=optimizer, config=self._values(), dist_init_required=False
            )
            if self._dtype != torch.float32:
                self._set_masters(exact)
        return optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the weights have the number format

    def accumulate(self, model: nn.Module, steps: Sequence[MicroStep]) -> Losses:
        if self._pending:
            self._drop_gradients()
        self._pending = True
        outputs = []
        for number, step in enumerate(steps, start=1):
            self._wrapped.set_gradient_accumulation_boundary(number == len(steps))
            torch.manual_seed(step.seed)
            share, losses = self._wrapped(step.batch.to(self.device, non_blocking=True), step.divisor)
            self._wrapped.backward(share * self._averaged_over, scale_wrt_gas=False)
            outputs.append(losses)
        return outputs

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        *,
        max_norm: float | None,
        inspect: Callable[[Values], None] = lambda values: None,
    ) -> Update:
        scale = float(self._zero.loss_scale)
        numbers, norm = read(losses, self._scaled_norm() / scale)
        values = values_of(self.group.sum_on_host(numbers), losses)
        inspect(values)
        finite = math.isfinite(norm)
        if not finite and not self._can_lower(scale):
            raise NonFiniteGradientError("the gradient is not finite")
        # DeepSpeed multiplies by clip_grad / (norm + 1e-6); this makes it max_norm / norm.
        clip = finite and max_norm is not None and norm > max_norm
        self._zero.clip_grad = max_norm * (norm + 1e-6) / norm if clip and max_norm is not None else 0.0
        self._wrapped.step()
        self._forget_gradients()
        self._pending = False
        return Update(values=values, gradient_norm=norm, applied=finite)

    def sum_numbers(self, numbers: Tensor) -> Tensor:
        return self.group.sum_on_host(numbers)

    def any_rank(self, flag: bool) -> bool:
        return self.group.any(flag)

    @torch.no_grad()
    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        tensors = self.layout.tensors(model)
        sizes = {name: math.prod(whole_shape(tensor)) * 4 for name, tensor in tensors.items()}
        mine = owned(sizes, {name: id(tensor) for name, tensor in tensors.items()}, self.group)
        masters = {id(parameter) for parameter in self._trained.values()}
        done: dict[int, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in done:
                whole = self._master(tensor) if id(tensor) in masters else self.layout.read(name, tensor)
                done[id(tensor)] = _on_host(whole) if name in mine else whole.new_empty(0)
            if name in mine:
                weights[name] = done[id(tensor)]
        return Snapshot(model=weights, optimizer=self._optimizer_share(optimizer))

    @torch.no_grad()
    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        kinds: dict[str, list[str]] = {}
        for name in tensors:
            owner, _, kind = name.rpartition("/")
            if owner not in self._trained:
                raise CheckpointMismatch(
                    f"the checkpoint holds optimizer state of {owner}, which the model does not train"
                )
            kinds.setdefault(kind, []).append(owner)
        if not kinds:
            return
        steps = max((int(tensors[f"{name}/step"]) for name in kinds.pop("step", ())), default=0)
        for flat in self._flat_masters():
            optimizer.state[flat] = {"step": steps, **{kind: torch.zeros_like(flat) for kind in kinds}}
        self._link_states()
        for kind, names in kinds.items():
            for name in names:
                parameter = self._trained[name]
                value = tensors[f"{name}/{kind}"]
                if value.shape != whole_shape(parameter):
                    raise CheckpointMismatch(
                        f"{name}/{kind}: {list(value.shape)} in the checkpoint, {list(whole_shape(parameter))} here"
                    )
                self._set_whole(parameter, value, kind)

    def state(self) -> dict[str, Any]:
        if self._dtype != torch.float16:
            return {}
        scaler = self._zero.loss_scaler
        window = int(getattr(scaler, "scale_window", 2000))
        since = int(getattr(scaler, "cur_iter", 0)) - int(getattr(scaler, "last_overflow_iter", -1)) - 1
        return {  # as torch's GradScaler writes it, so that other engines can continue
            "scale": float(scaler.cur_scale),
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": window,
            "_growth_tracker": since % window,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._dtype != torch.float16 or not state:
            return
        scaler = self._zero.loss_scaler
        scaler.cur_scale = float(state["scale"])
        if hasattr(scaler, "cur_iter"):
            scaler.cur_iter = int(state.get("_growth_tracker", 0))
            scaler.last_overflow_iter = -1

    @property
    def _zero(self) -> Any:
        return self._wrapped.optimizer

    @property
    def _averaged_over(self) -> int:
        """Stage 3 can only average gradients, so there the loss is multiplied by what they are divided by."""
        return self.data_size if self.settings.stage == 3 else 1

    def _zero_init(self, module: nn.Module | None = None) -> Any:
        """Returns the context in which, or cuts the module whose, parameters are cut, in float32."""
        return self._deepspeed.zero.Init(
            module=module,
            config_dict_or_path=self._values(reduced=False),
            tensor_overrides=[],  # buffers keep their format and device
        )

    def _values(self, *, reduced: bool = True) -> dict[str, Any]:
        """Returns the settings as DeepSpeed reads them."""
        return {
            **self.settings.values,
            "zero_optimization": self._zero_values(),
            "train_batch_size": self.data_size,  # the loss is divided by us, so DeepSpeed need not know
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_allreduce_op": "mean" if self.settings.stage == 3 else "sum",
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {**self.settings.values.get("bf16", {}), "enabled": reduced and self.config.bf16},
            "fp16": {**self.settings.values.get("fp16", {}), "enabled": reduced and self.config.fp16},
        }

    def _zero_values(self) -> dict[str, Any]:
        values = {**self.settings.values.get("zero_optimization", {}), "stage": self.settings.stage}
        for name in ("offload_optimizer", "offload_param"):
            if name in values and self.device.type == "cpu":  # DeepSpeed would compile an operator to pin memory
                values[name] = {**values[name], "pin_memory": False}
        return values

    def _place(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        if self.settings.stage < 3:
            model.to(self.device)

    def _scaled_norm(self) -> Tensor:
        """Returns the norm of the gradients of all processes times the loss scale, infinite if it is no number."""
        if self.settings.stage < 3:
            norm = self._zero.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        return torch.as_tensor(norm, device=self.device).detach()

    def _can_lower(self, scale: float) -> bool:
        scaler = self._zero.loss_scaler
        return bool(scaler.dynamic) and scale > scaler.min_scale

    def _drop_gradients(self) -> None:
        """Does what DeepSpeed does after an overflow, but leaves the loss scale."""
        zero = self._zero
        if self.settings.stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(zero.loss_scale)
        else:
            zero.micro_step_id = -1  # none yet
            zero.zero_grad(set_to_none=True)
            zero._release_preflattened_grad_buffers()
            if zero.cpu_offload:
                zero.reset_cpu_buffers()
            for gradients in (zero.averaged_gradients, zero.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Zeroes DeepSpeed's gradient buffers, or a parameter that the next update does not use would keep its own."""
        buffer = getattr(self._zero, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()
        for flat in self._flat_masters():
            if flat.grad is not None:
                flat.grad.zero_()

    def _flat_masters(self) -> list[Tensor]:
        """Returns the flat float32 parts that the optimizer updates on this process."""
        name = "fp32_partitioned_groups_flat" if self.settings.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self._zero, name))

    def _master(self, parameter: Tensor) -> Tensor:
        whole: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return whole

    @torch.no_grad()
    def _set_masters(self, exact: Mapping[str, Tensor]) -> None:
        """Gives the optimizer the weights as they were before they were rounded to the number format."""
        for name, parameter in self._trained.items():
            if whole_shape(parameter) == tuple(exact[name].shape):
                self._set_whole(parameter, exact[name])
            else:
                self._deepspeed.utils.safe_set_local_fp32_param(parameter, exact[name])

    def _set_whole(self, parameter: nn.Parameter, values: Tensor, kind: str | None = None) -> None:
        if not is_partitioned(parameter):
            parameter.set_full_hp_param(values, kind)  # type: ignore[attr-defined]
            return
        part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        begin = parameter.ds_zero_partition_rank * part.ds_numel  # type: ignore[attr-defined]
        mine = values.reshape(-1)[begin : begin + part.numel()]
        padded = torch.zeros(part.numel(), dtype=torch.float32)
        padded[: mine.numel()] = mine
        if kind is None:
            self._deepspeed.utils.safe_set_local_fp32_param(parameter, padded)
        else:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, padded, kind)

    def _link_states(self) -> None:
        """Lets parameters find their optimizer state: DeepSpeed links it before the last group has any."""
        if self.settings.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _optimizer_share(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        states = [optimizer.state.get(flat, {}) for flat in self._flat_masters()]
        kinds = sorted({kind for state in states for kind, value in state.items() if isinstance(value, Tensor)})
        steps = max((int(state["step"]) for state in states if "step" in state), default=None)
        if kinds:
            self._link_states()
        sizes = {name: math.prod(whole_shape(parameter)) for name, parameter in self._trained.items()}
        mine = owned(sizes, {}, self.group)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            if name in mine and steps is not None:
                tensors[f"{name}/step"] = torch.tensor(steps)
            for kind in kinds:
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                if name in mine:
                    tensors[f"{name}/{kind}"] = _on_host(whole)
        return tensors


class _Share(nn.Module):
    """A model as DeepSpeed wants it: its output is a tensor, the share of the loss that this batch adds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, divisor: Mapping[str, float]) -> tuple[Tensor, dict[str, LossSum]]:
        losses = self.model(batch).losses
        shares = [loss.total / max(divisor[name], 1) for name, loss in losses.items()]
        return torch.stack(shares).sum(), detached(losses)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("deepspeed: the package is not installed; install the extra 'deepspeed'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_needed)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # names it still uses
    # Only tensor-parallel inference calls this operator, but it would be compiled at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _needed(record: logging.LogRecord) -> bool:
    """Whether a message of DeepSpeed says something that is not known to be harmless here."""
    text = record.getMessage()
    return "untested optimizer" not in text and "has unknown inputs or outputs type" not in text


def _meet(device: torch.device) -> None:
    """Makes a group of this process alone where no launcher made one: DeepSpeed does not work without."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
