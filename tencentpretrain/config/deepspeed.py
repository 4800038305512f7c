"""Reads a DeepSpeed JSON: every key is checked, "auto" is filled from our settings, contradictions are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tencentpretrain.config.deepspeed_keys import IGNORED, KEYS, REFUSED, REPLACED, Kind
from tencentpretrain.config.json_file import JsonFile, KeyPath, explain_content, read_json
from tencentpretrain.config.options import show
from tencentpretrain.errors import ConfigError
from tencentpretrain.registry import nearest

AUTO = "auto"
_FLAG = "--deepspeed_config takes a DeepSpeed JSON, such as models/deepspeed_config.json"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What a run tells DeepSpeed.

    Fields:
        stage: of ZeRO, 0 to 3.
        values: the other keys of the JSON, without "auto".
    """

    stage: int
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offloads(self) -> frozenset[str]:
        """Where optimizer or weights are kept besides the device."""
        zero = self.values.get("zero_optimization", {})
        places = (zero.get(name) or {} for name in ("offload_optimizer", "offload_param"))
        return frozenset(place.get("device", "none") for place in places) - {"none"}


@dataclass(frozen=True, kw_only=True)
class Ours:
    """The settings of a run that DeepSpeed has too.

    Fields:
        batch_size, accumulation_steps, max_grad_norm, bf16, fp16, zero3: as set, or by default.
        given: which of them a user set, by published key.
        processes: that share the data.
        hidden_size: of the model.
        optimizer, device: by name.
        compile: whether the model is compiled.
        model_parallel: tensor and pipeline parallel processes that share a replica.
    """

    batch_size: int = 32
    accumulation_steps: int = 1
    max_grad_norm: float | None = None
    bf16: bool = False
    fp16: bool = False
    zero3: bool = False
    given: frozenset[str] = frozenset()
    processes: int = 1
    hidden_size: int | None = None
    optimizer: str = "adamw"
    device: str = "auto"
    compile: bool = False
    model_parallel: int = 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A DeepSpeed JSON as a run uses it.

    Fields:
        settings: for the engine; only meaningful without problems.
        adopted: settings of ours that only the file gives, by field.
        problems: all of them, each beginning with the file and line.
        notices: what a user should know though it stops nothing.
    """

    settings: DeepSpeedSettings
    adopted: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def read_deepspeed(path: str, ours: Ours) -> Reading:
    """Reads the file and compares it with our settings. Problems are returned, not raised."""
    try:
        file = read_json(path, explain=_explain, ask=_FLAG)
    except ConfigError as error:
        return Reading(settings=DeepSpeedSettings(stage=0), problems=error.problems)
    return _Reader(file, ours).reading()


_PAIRS: tuple[tuple[KeyPath, str, str], ...] = (
    (("train_micro_batch_size_per_gpu",), "batch_size", "--batch_size"),
    (("gradient_accumulation_steps",), "accumulation_steps", "--accumulation_steps"),
    (("gradient_clipping",), "max_grad_norm", "--max_grad_norm"),
    (("bf16", "enabled"), "bf16", "--bf16"),
    (("fp16", "enabled"), "fp16", "--fp16"),
)
"""Key in the file, field and flag of the same setting."""


class _Reader:
    def __init__(self, file: JsonFile, ours: Ours) -> None:
        self.file = file
        self.ours = ours
        self.values: dict[str, Any] = {}
        self.problems = [f"{file.path}, {problem}" for problem in file.problems]
        self.notices: list[str] = []
        self.adopted: dict[str, Any] = {}

    def reading(self) -> Reading:
        self.values = self._checked(dict(self.file.values), KEYS, ())
        for path, field_name, flag in _PAIRS:
            self._pair(path, field_name, flag)
        stage = self._stage()
        for problem in self._contradictions(stage):
            self.problems.append(problem)
        stage = self._fill(stage)
        return Reading(
            settings=DeepSpeedSettings(stage=stage, values=self._told()),
            adopted=self.adopted,
            problems=tuple(self.problems),
            notices=tuple(self.notices),
        )

    def _checked(self, values: dict[str, Any], kinds: Mapping[str, Kind], around: KeyPath) -> dict[str, Any]:
        """Returns the values that are sound; the others are noted."""
        sound: dict[str, Any] = {}
        for key, value in values.items():
            path = (*around, key)
            if path in REPLACED:
                self._problem(path, REPLACED[path])
            elif key not in kinds:
                self._problem(path, f"unknown key{nearest(key, kinds)}")
            elif path in REFUSED and _is_on(value):
                self._problem(path, REFUSED[path])
            elif value is None:
                continue
            elif isinstance(kinds[key], Mapping):
                if isinstance(value, dict):
                    sound[key] = self._checked(value, kinds[key], path)
                else:
                    self._problem(path, f"is {show(value)}, but must be an object")
            else:
                self._check_value(path, value, kinds[key], sound)
        return sound

    def _check_value(self, path: KeyPath, value: Any, kind: Kind, sound: dict[str, Any]) -> None:
        if value == AUTO and kind not in ("any", "text", "object"):
            if path in _AUTOMATIC:
                sound[path[-1]] = AUTO
            else:
                self._problem(path, f'is "auto", but no setting of ours fills it; give {_expected(kind)}')
            return
        accepted, converted = _convert(value, kind)
        if accepted:
            sound[path[-1]] = converted
        else:
            self._problem(path, f"is {show(value)}, but must be {_expected(kind)}")

    def _pair(self, path: KeyPath, field_name: str, flag: str) -> None:
        value = self._value(path)
        mine = getattr(self.ours, field_name)
        if value is None or value == AUTO:
            return
        if field_name == "max_grad_norm":
            value = float(value) or None
        if field_name in self.ours.given and mine != value:
            self._problem(
                path,
                f'is {show(value)}, but {flag} is {show(mine)}; write "auto" here, or leave the flag out',
            )
        elif mine != value:
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                self._problem(path, f"is {value}, but must be at least 1")
                return
            self.adopted[field_name] = value
            self.notices.append(f"{flag.removeprefix('--')}: {show(value)}, from {self.file.path}")

    def _mine(self, field_name: str) -> Any:
        """Returns a setting as the run will have it."""
        return self.adopted.get(field_name, getattr(self.ours, field_name))

    def _stage(self) -> int:
        path = ("zero_optimization", "stage")
        stage = self._value(path)
        if stage is None or stage == AUTO:
            return 3 if self.ours.zero3 else 0 if stage is None else 2
        if self.ours.zero3 and stage != 3:
            self._problem(
                path,
                f"is {stage}, but --enable_zero3 asks for 3; "
                "give --deepspeed_config models/deepspeed_zero3_config.json",
            )
        return int(stage)

    def _contradictions(self, stage: int) -> Iterator[str]:
        ours, zero = self.ours, self.values.get("zero_optimization", {})
        bf16, fp16 = self._mine("bf16"), self._mine("fp16")
        if bf16 and fp16:
            yield self._at(("fp16", "enabled"), "bf16 and fp16 are both on; choose one (bf16 needs no loss scaling)")
        if fp16 and "fp16" in self.adopted and ours.device == "cpu":
            yield self._at(("fp16", "enabled"), 'is true, but float16 needs a GPU; write "auto" and use --bf16')
        total = self._value(("train_batch_size",))
        product = self._mine("batch_size") * self._mine("accumulation_steps") * ours.processes
        if total not in (None, AUTO, product):
            yield self._at(
                ("train_batch_size",),
                f"is {total}, but batch_size {self._mine('batch_size')} x accumulation_steps "
                f'{self._mine("accumulation_steps")} x {ours.processes} processes make {product}; write "auto" here',
            )
        if stage > 0 and ours.optimizer == "adafactor":
            yield (
                f"optimizer: adafactor needs whole matrices, but ZeRO stage {stage} cuts them into flat parts; "
                "use adamw, or stage 0"
            )
        if stage > 0 and ours.compile:
            yield f"compile: is not supported with ZeRO stage {stage}; leave it out, or use stage 0"
        if ours.model_parallel > 1 and stage > 1:
            yield self._at(
                ("zero_optimization", "stage"),
                f"is {stage}, but with tensor or pipeline parallelism only 0 and 1 work; "
                "give --deepspeed_config models/deepspeed_mp_config.json",
            )
        for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
            place = zero.get(name, {})
            path = ("zero_optimization", name)
            if place.get("device") == "nvme":
                yield self._at((*path, "device"), 'is "nvme", which this version does not have yet; use "cpu"')
            elif place.get("device", "none") != "none" and stage < lowest:
                self.notices.append(self._at(path, f"has no effect at stage {stage}"))
        named = self._value(("data_types", "param_dtype"))
        if named is not None and str(named) not in _NAMES_OF["bf16" if bf16 else "fp16" if fp16 else "fp32"]:
            path = ("data_types", "param_dtype")
            yield self._at(path, f"is {show(named)}, but --bf16 and --fp16 decide; leave it out")
        for key in ("loss_scale_window", "min_loss_scale"):
            if fp16 and self._value(("fp16", key)) == 0:
                yield self._at(("fp16", key), "is 0, but must be at least 1")

    def _fill(self, stage: int) -> int:
        """Puts numbers in the place of "auto" and returns the stage to run."""
        zero = self.values.setdefault("zero_optimization", {})
        hidden = self.ours.hidden_size
        for key, value in list(zero.items()):
            if value == AUTO:
                if key in _BY_WIDTH and hidden is not None:
                    zero[key] = _BY_WIDTH[key](hidden)
                else:
                    del zero[key]
        zero.pop("stage", None)
        if stage < 3:
            zero.pop("offload_param", None)
        bf16, fp16 = self._mine("bf16"), self._mine("fp16")
        if bf16 or fp16:
            self.values.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        if stage == 1 and bf16 and not offloaded:
            self.notices.append(
                "zero_optimization.stage: 1 with bf16 runs as stage 2, whose gradients DeepSpeed checks"
            )
            return 2
        return stage

    def _told(self) -> dict[str, Any]:
        """Returns what goes on to DeepSpeed: all but what we set or do ourselves."""
        told = {key: dict(value) if isinstance(value, dict) else value for key, value in self.values.items()}
        for path, instead in IGNORED.items():
            value = self._value(path)
            if value is None:
                continue
            if instead and _is_on(value):
                self.notices.append(self._at(path, f"has no effect: {instead}"))
            (told if len(path) == 1 else told[path[0]]).pop(path[-1], None)
        for path in (("train_batch_size",), *(path for path, *_ in _PAIRS)):
            (told if len(path) == 1 else told.get(path[0], {})).pop(path[-1], None)
        return told

    def _value(self, path: KeyPath) -> Any:
        found: Any = self.values
        for key in path:
            if not isinstance(found, Mapping) or key not in found:
                return None
            found = found[key]
        return found

    def _problem(self, path: KeyPath, sentence: str) -> None:
        self.problems.append(self._at(path, sentence))

    def _at(self, path: KeyPath, sentence: str) -> str:
        line = self.file.lines.get(path)
        return f"{self.file.path}{f', line {line}' if line else ''}: {'.'.join(path)}: {sentence}"


_BY_WIDTH: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: max(hidden * hidden, 1),
    "prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "param_persistence_threshold": lambda hidden: 10 * hidden,
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""What "auto" means for sizes, from the model's width, as other toolkits fill it."""

_AUTOMATIC = frozenset(
    {
        ("train_batch_size",),
        ("zero_optimization", "stage"),
        *(path for path, *_ in _PAIRS),
        *(("zero_optimization", key) for key in _BY_WIDTH),
    }
)
"""Where "auto" may stand."""

_NAMES_OF = {
    "fp32": ("fp32", "float32", "float"),
    "fp16": ("fp16", "float16", "half"),
    "bf16": ("bf16", "bfloat16"),
}


def _is_on(value: Any) -> bool:
    if isinstance(value, Mapping):
        enabled = value.get("enabled", any(_is_on(item) for item in value.values()))
        return bool(enabled)
    return bool(value)


def _convert(value: Any, kind: Kind) -> tuple[bool, Any]:
    """Returns whether a value is of a kind, and the value in its plain form."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(kind, tuple):
        return (value in kind and not isinstance(value, bool)), value
    if kind == "bool":
        return isinstance(value, bool), value
    if kind == "int":  # 5e8 is how such files write sizes
        whole = number and value >= 0 and float(value).is_integer()
        return whole, int(value) if whole else value
    if kind == "number":
        return number and value >= 0, value
    if kind == "text":
        return isinstance(value, str), value
    if kind == "texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value), value
    return kind == "any" or isinstance(value, dict), value


def _expected(kind: Kind) -> str:
    if isinstance(kind, tuple):
        return "one of " + ", ".join(map(show, kind))
    return {
        "bool": "true or false",
        "int": "a whole number of at least 0",
        "number": "a number of at least 0",
        "text": "a string",
        "texts": "a list of strings",
        "object": "an object",
    }[kind]


def _explain(values: Mapping[str, Any]) -> str | None:
    """Says what a JSON object is if it is not a DeepSpeed config, and where it belongs."""
    if not values or any(key in KEYS for key in values):
        return None
    if {"emb_size", "hidden_size", "embedding", "encoder"} & set(values) and "model_type" not in values:
        return f"this is a model config; it belongs to --config_path; {_FLAG}"
    found = explain_content(values)
    return None if found is None else f"{found.split(';')[0]}, not a DeepSpeed config; {_FLAG}"
