"""Preprocessing by two workers of a Ray cluster against two local processes: equal bytes, and the ratio of their times.

The cluster is a head without work and two nodes of one CPU each, all on this machine, so the ratio is what Ray costs:
joining the cluster, starting and checking the workers, and reading every range once more for its checksum.
    python benchmarks/preprocess_cluster.py --megabytes 64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
from preprocess_memory import write_text

WORKERS = 2


def main() -> None:
    """Alternates the two and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the text (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(WORKERS):
            cluster.add_node(num_cpus=1)
        with tempfile.TemporaryDirectory() as name:
            write_text(Path(name), options.megabytes)
            figures = compare(Path(name), cluster.address, options.rounds)
    finally:
        cluster.shutdown()
    print(json.dumps(figures, indent=1))
    facts = measure.environment(WORKERS, "ray", "tokenizers", "numpy")
    measure.write_results("preprocess_cluster", {"environment": facts, "megabytes": options.megabytes, **figures})


def compare(folder: Path, address: str, rounds: int) -> dict[str, Any]:
    """Times the command as a user runs it, start and import included, and compares all files of the stores."""
    outputs: dict[str, list[str]] = {"local": [], "ray": []}
    working: dict[str, list[float]] = {"local": [], "ray": []}

    def run(executor: str, *flags: str) -> None:
        store = folder / executor
        shutil.rmtree(store, ignore_errors=True)
        command = [sys.executable, str(measure.ROOT / "preprocess.py"), "--corpus_path", str(folder / "corpus.txt")]
        command += ["--vocab_path", str(folder / "vocab.txt"), "--dataset_path", str(store), "--shard_bytes", "4000000"]
        command += ["--processes_num", str(WORKERS), "--data_processor", "bert", "--executor", executor, *flags]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        working[executor].append(float(re.findall(r"in ([\d.]+) s", said)[-1]))
        outputs[executor].append(digest(store))

    local, ray = measure.alternate(rounds, lambda: run("local"), lambda: run("ray", "--ray_address", address))
    return {
        "shards": len(list((folder / "ray").glob("shard-*.tokens"))),
        "equal_bytes": len({*outputs["local"], *outputs["ray"]}) == 1,
        "runs_compared": len(outputs["local"]) + len(outputs["ray"]),
        "local_seconds": measure.spread(local, 2),
        "ray_seconds": measure.spread(ray, 2),
        "speed_ratio": measure.spread([a / b for a, b in zip(local, ray, strict=True)]),
        "building_ratio": measure.spread([a / b for a, b in zip(working["local"], working["ray"], strict=True)]),
    }


def digest(folder: Path) -> str:
    """Returns a hash over the names and contents of a store's files."""
    content = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()


if __name__ == "__main__":
    main()
