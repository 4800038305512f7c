"""The worked example of CONTRIBUTING is a component that works as soon as its file exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE = """
import sys
import torch
from tencentpretrain import build_model, load_config
from tencentpretrain.data.batch import Batch
from tencentpretrain.registry import ENCODERS

assert "average" in ENCODERS.names() and "torch" in sys.modules
model = build_model(load_config(sys.argv[1]), vocab_size=20)
ids = torch.randint(5, 20, (2, 6))
output = model(Batch(token_ids=ids, segment_ids=torch.ones_like(ids), labels={"lm": ids}, has_padding=False))
output.loss.backward()
assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
print(model.encoder.__class__.__name__, int(output.losses["lm"].count))
"""


def test_the_example_encoder_works(tmp_path: Path) -> None:
    """Runs the example in a copy of the package, so that the tree under test stays as it is."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(# tencentpretrain/encoders/average\.py\n.*?)```", text, re.DOTALL)
    if example is None:
        pytest.fail("CONTRIBUTING.md has no example that starts with '# tencentpretrain/encoders/average.py'")
    package = tmp_path / "tencentpretrain"
    for source in (ROOT / "tencentpretrain").rglob("*.py"):
        copy = package / source.relative_to(ROOT / "tencentpretrain")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    (package / "encoders" / "average.py").write_text(example.group(1), encoding="utf-8")
    config = tmp_path / "average.json"
    config.write_text(
        json.dumps({"encoder": "average", "emb_size": 8, "hidden_size": 16, "target": ["lm"], "dropout": 0.0}),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-c", USE, str(config)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == ["AverageEncoder", "12"], done.stderr
