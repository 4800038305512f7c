"""Measures the peak memory of preprocessing a large text: all processes together, and over time.

The text is made while the benchmark starts, in a temporary folder: sentences of words from a generated vocabulary.
    python benchmarks/preprocess_memory.py --megabytes 1000 --processes_num 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text (default %(default)s)")
    parser.add_argument("--processes_num", type=int, default=2, help="workers (default %(default)s)")
    parser.add_argument("--data_processor", default="bert", help="(default %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder, options.megabytes)
        figures = measure(folder, options)
    print(json.dumps(figures, indent=1))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


def write_text(folder: Path, megabytes: int) -> None:
    """Writes a vocabulary and a text of documents, half of it CJK."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]
    characters = [chr(point) for point in range(0x4E00, 0x4E00 + 3000)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    tokens = dict.fromkeys([*special, *pieces, *characters, *words[:15_000]])
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    blocks = []
    for _ in range(40):
        lines = []
        for _ in range(400):
            latin = rng.random() < 0.5
            lines.append(" ".join(rng.choices(words, k=18)) if latin else "".join(rng.choices(characters, k=40)))
            if rng.random() < 0.1:
                lines.append("")
        blocks.append(("\n".join(lines) + "\n").encode())
    size = 0
    with (folder / "corpus.txt").open("wb") as file:
        while size < megabytes * 1_000_000:
            size += file.write(rng.choice(blocks))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Runs preprocess.py and samples the memory of its process tree."""
    command = [sys.executable, str(ROOT / "preprocess.py"), "--corpus_path", str(folder / "corpus.txt")]
    command += ["--vocab_path", str(folder / "vocab.txt"), "--dataset_path", str(folder / "store")]
    command += ["--processes_num", str(options.processes_num), "--data_processor", options.data_processor]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, float, float]] = []
    while process.poll() is None:
        together, largest = memory(process.pid)
        samples.append((time.perf_counter() - began, together, largest))
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"preprocess.py ended with exit code {process.returncode}: {output}")
    header = json.loads((folder / "store" / "header.json").read_text())
    tokens = sum(header["num_tokens"])
    quarter = len(samples) // 4
    return {
        "megabytes": options.megabytes,
        "processes_num": options.processes_num,
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(options.megabytes / seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "peak_megabytes_all_processes": round(max(sample[1] for sample in samples), 1),
        "peak_megabytes_largest_process": round(max(sample[2] for sample in samples), 1),
        "peak_megabytes_in_each_quarter": [
            round(max(sample[1] for sample in samples[part * quarter : (part + 1) * quarter]), 1) for part in range(4)
        ],
    }


def memory(root: int) -> tuple[float, float]:
    """Returns the megabytes of a process and all its descendants together, and of the largest one (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, total, largest = [root], 0.0, 0.0
    for process in found:
        found += children.get(process, [])
        try:
            status = Path("/proc", str(process), "status").read_text()
        except OSError:
            continue
        resident = next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)
        total += resident
        largest = max(largest, resident)
    return total, largest


if __name__ == "__main__":
    main()
