"""Continues prompts with a decoder-only model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tencentpretrain.config.base import Section, setting
from tencentpretrain.config.cli import Parsed, parse_sections
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.entry.run import run_main
from tencentpretrain.tokenizers.config import TokenizerConfig


class GenerateConfig(Section):
    """What is generated, and how tokens are chosen."""

    load_model_path: str = setting(text="weights", topic="generation")
    test_path: str = setting(text="text file: each line is a prompt", topic="generation")
    prediction_path: str = setting(text="output: per prompt its line, then the generated text", topic="generation")
    seq_length: int = setting(128, "tokens at the end, prompt included", topic="generation", ge=2)
    top_k: int = setting(70, "sample among this many likeliest tokens; 0: all", topic="generation", ge=0)
    top_p: float = setting(0.0, "sample from the smallest set of this mass; 0: all", topic="generation", ge=0, le=1)
    temperature: float = setting(1.0, "divides the logits; 0: the likeliest token", topic="generation", ge=0)
    seed: int = setting(7, "seed of the samples", topic="generation", ge=0)


EXAMPLES = (
    "python scripts/generate_lm.py --load_model_path models/gpt2.bin --config_path models/gpt2/config.json "
    "--vocab_path vocab.txt --test_path prompts.txt --prediction_path generated.txt",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads flags, writes the generated texts; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _generate(arguments), debug="--debug" in arguments)


def _generate(argv: Sequence[str]) -> int:
    parsed = parse_sections(
        "generate_lm.py",
        "Continues each line of a file with a decoder-only model.",
        (GenerateConfig, TokenizerConfig, ModelConfig),
        argv,
        examples=EXAMPLES,
        config_file=None,
        config_required=True,
    )
    _write(parsed)
    return 0


def _write(parsed: Parsed) -> None:
    import torch

    from tencentpretrain.checkpoint.loading import load_checkpoint
    from tencentpretrain.data.durable import storage_errors, write_durably
    from tencentpretrain.generate.sampling import sample
    from tencentpretrain.model import build_model
    from tencentpretrain.tasks.tsv import read_lines
    from tencentpretrain.tokenizers import build_tokenizer

    options = parsed.get(GenerateConfig)
    tokenizer = build_tokenizer(parsed.get(TokenizerConfig))
    model = build_model(parsed.get(ModelConfig), tokenizer.vocab_size, pad_id=tokenizer.pad_id, initialize=False)
    load_checkpoint(model, options.load_model_path)
    generator = torch.Generator().manual_seed(options.seed)
    written = []
    for prompt in read_lines(options.test_path):
        token_ids = sample(
            model,
            [tokenizer.cls_id, *tokenizer.encode(prompt)],
            max_length=options.seq_length,
            stop_id=tokenizer.sep_id,
            top_k=options.top_k,
            top_p=options.top_p,
            temperature=options.temperature,
            generator=generator,
        )
        continued = [token for token in token_ids if token not in (tokenizer.cls_id, tokenizer.sep_id)]
        written += [prompt, tokenizer.decode(continued)]
    output, content = Path(options.prediction_path), ("\n".join(written) + "\n").encode()
    with storage_errors(output, len(content)):
        write_durably(output, content)
