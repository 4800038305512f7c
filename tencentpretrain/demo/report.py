"""The demo's page: loss curves, the accuracy table, predictions and a generated paragraph, in one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d0d7de }
table { border-collapse: collapse } td, th { padding: .35rem .8rem; border-bottom: 1px solid #d0d7de; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
blockquote { margin: .6rem 0; padding: .5rem 1rem; background: #f6f8fa; border-left: 4px solid #57606a }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: 13px }
.right { color: #1a7f37 } .wrong { color: #cf222e }
"""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One held-out paragraph with the class it has and the class it was given."""

    text: str
    gold: str
    predicted: str


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything the page shows."""

    corpus: Mapping[str, str]
    curves: Mapping[str, Path]
    """Model name to the `metrics.jsonl` of its pre-training."""
    accuracies: Mapping[str, float]
    predictions: Sequence[Prediction]
    prompt: str
    generated: Sequence[str]
    commands: Sequence[str]
    seconds: float


def read_curve(path: Path) -> tuple[list[int], list[float]]:
    """Reads (step, loss) of every training record of a metrics file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [record for record in records if "loss" in record]
    return [record["step"] for record in kept], [record["loss"] for record in kept]


def write_report(result: DemoResult, path: Path) -> None:
    """Writes the page; it needs no network and no second file."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=number>{100 * accuracy:.1f} %</td></tr>"
        for name, accuracy in result.accuracies.items()
    )
    facts = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in result.corpus.items())
    predictions = "".join(_prediction_row(prediction) for prediction in result.predictions)
    generated = "".join(f"<blockquote>{html.escape(text)}</blockquote>" for text in result.generated)
    commands = html.escape("\n".join(result.commands))
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>tencentpretrain demo</title><style>{STYLE}</style>
<h1>What the demo did</h1>
<p>In {result.seconds:.0f} seconds, from Python's documentation to a classifier and a text generator.</p>
<h2>Corpus</h2><table>{facts}</table>
<h2>Pre-training</h2><img alt="loss curves" src="data:image/png;base64,{_plot(result.curves)}">
<h2>Which package does this paragraph document?</h2>
<p>Accuracy on held-out docstrings, same model and fine-tuning budget.</p><table>{rows}</table>
<h2>Predictions</h2><table><tr><th>paragraph<th>package<th>predicted</tr>{predictions}</table>
<h2>A generated paragraph</h2><p>Prompt: <i>{html.escape(result.prompt)}</i></p>{generated}
<h2>The commands</h2><pre>{commands}</pre></html>
""",
        encoding="utf-8",
    )


def _prediction_row(prediction: Prediction) -> str:
    mark = "right" if prediction.gold == prediction.predicted else "wrong"
    text = prediction.text if len(prediction.text) < 240 else prediction.text[:240] + " ..."
    return (
        f"<tr><td>{html.escape(text)}</td><td>{html.escape(prediction.gold)}</td>"
        f"<td class={mark}>{html.escape(prediction.predicted)}</td></tr>"
    )


def _plot(curves: Mapping[str, Path]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.4), squeeze=False)
    for axis, (name, path) in zip(axes[0], curves.items(), strict=True):
        axis.plot(*read_curve(path))
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(image.getvalue()).decode()
