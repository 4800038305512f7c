"""`tencentpretrain demo`: the main job on text that every machine has."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints where its page is."""
    parser = argparse.ArgumentParser(prog="tencentpretrain demo", description=__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="folder of the demo (default %(default)s)"
    )
    folder = parser.parse_args(argv).output_dir

    from tencentpretrain.demo.run import Demo

    result = Demo(folder=folder).run()
    for name, accuracy in result.accuracies.items():
        print(f"{name:32} {100 * accuracy:5.1f} %")
    print(f"\n{result.generated[0]}\n\nin {result.seconds:.0f} s; open {folder / 'report.html'}")
    return 0
