"""`tencentpretrain consolidate`: one file of weights from a checkpoint in many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tencentpretrain.entry.run import run_main
from tencentpretrain.errors import ConfigError

if TYPE_CHECKING:
    from tencentpretrain.checkpoint.files import TensorFile

_USAGE = """usage: tencentpretrain consolidate <source> <output.bin|output.safetensors>

Joins the weights of a checkpoint into one file that every command reads.

source:
  a checkpoint of a run       <output_model_path>.run/checkpoints/step-00001000, or the folder checkpoints: its newest
  a tensor-parallel directory mp_rank_00_model_states.pt, mp_rank_01_model_states.pt, ...
  a pipeline directory        layer_00-model_00-model_states.pt, ...
  a directory of shards       tencentpretrain_model-0.bin, ... or any with an index

examples:
  tencentpretrain consolidate runs/gpt2.bin.run/checkpoints gpt2.safetensors
  tencentpretrain consolidate llama_tp4/ llama.bin
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(
        lambda: _consolidate([word for word in arguments if word != "--debug"]), debug="--debug" in arguments
    )


def _consolidate(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE, end="")
        return 0
    if len(arguments) != 2 or any(word.startswith("--") for word in arguments):
        raise ConfigError("consolidate takes a source and an output: tencentpretrain consolidate <source> <output>")
    source, output = Path(arguments[0]), Path(arguments[1])
    if output.suffix not in (".bin", ".safetensors"):
        raise ConfigError(f"{output}: must end in .bin or .safetensors")
    if output.exists():
        raise ConfigError(f"{output}: exists already; name a new file")
    found = _open(source)

    from tencentpretrain.checkpoint.files import write_tensors

    read = {id(entry): entry.load() for entry in found.entries.values()}  # one tensor under two names stays one
    tensors = {name: read[id(entry)] for name, entry in found.entries.items()}
    write_tensors(output, tensors, "bin" if output.suffix == ".bin" else "safetensors")
    elements = sum(tensor.numel() for tensor in read.values())
    print(f"{output}: {len(tensors)} tensors, {elements:,} parameters, from {found.path}")
    return 0


def _open(source: Path) -> TensorFile:
    from tencentpretrain.checkpoint.files import TensorFile, read_tensors
    from tencentpretrain.checkpoint.manifest import verify
    from tencentpretrain.checkpoint.training import CheckpointFolder, load

    if (source / "MANIFEST.json").is_file():
        verify(source)
        model = load(source).model
        assert isinstance(model, TensorFile)
        return model
    folder = CheckpointFolder(source)
    if folder.steps():
        return _open(folder.path(folder.steps()[-1]))
    return read_tensors(source)
