"""What must be the same on every machine of a build: corpus, tokenizer, programs, and the folder of parts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tencentpretrain.data.corpus import Corpus
from tencentpretrain.data.durable import write_durably
from tencentpretrain.data.shards import UNFINISHED, ShardBuilder, ShardJob
from tencentpretrain.data.store import TokenizerFacts
from tencentpretrain.errors import ConfigError, DataFormatError, ResourceError, TencentPretrainError

PATIENCE_SECONDS = 5.0
"""How long a file of another machine may take to appear: network file systems remember names for some seconds."""

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_LIBRARIES = ("tokenizers", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class Premises:
    """What the machine that gives the work out sees.

    Attributes:
        corpus: path, size and digest of samples; None where workers need not see it (a compressed corpus).
        tokenizers: fingerprints.
        programs: version by name of what decides over token ids.
        mark: name of a file in the folder of parts.
    """

    corpus: tuple[Path, int, str] | None
    tokenizers: tuple[str, ...]
    programs: dict[str, str]
    mark: str

    @classmethod
    def here(cls, job: ShardJob, corpus: Corpus) -> Premises:
        """Looks at this machine and leaves a mark in the folder of parts."""
        mark = f"mark-{uuid.uuid4().hex}{UNFINISHED}"
        write_durably(job.folder / mark, mark.encode())
        path = corpus.path.resolve()
        return cls(
            corpus=None if corpus.compression else (path, corpus.size, sample_digest(path, corpus.size)),
            tokenizers=_fingerprints(ShardBuilder(job)),
            programs=_programs(),
            mark=mark,
        )

    def check(self, job: ShardJob) -> tuple[ShardBuilder, str]:
        """Compares a worker's machine, and leaves an answer to the mark.

        Returns:
            What makes the shards, and the name of the answer, by which `check_answer` sees that the folder is shared.

        Raises:
            TencentPretrainError: what differs, and on which machine.
        """
        host = socket.gethostname()
        if (differing := _differing(self.programs, _programs())) is not None:
            raise ConfigError(f"{host} has {differing}; install the same versions on all machines")
        if not _appears(job.folder / self.mark):
            raise ResourceError(
                f"{job.folder}: {host} does not see this folder as the machine of preprocess.py does; --dataset_path "
                "must lie on storage that all machines share, under the same path"
            )
        if self.corpus is not None:
            _check_corpus(*self.corpus, host)
        try:
            builder = ShardBuilder(job)
        except TencentPretrainError as error:
            raise DataFormatError(f"the tokenizer cannot be made on {host}: {error}") from None
        if (found := _fingerprints(builder)) != self.tokenizers:
            raise DataFormatError(
                f"the tokenizer on {host} is another one (fingerprint {', '.join(part[:12] for part in found)}) than "
                f"where preprocess.py runs ({', '.join(part[:12] for part in self.tokenizers)}); all machines must "
                "see the same vocabulary files"
            )
        answer = f"answer-{uuid.uuid4().hex}{UNFINISHED}"
        write_durably(job.folder / answer, host.encode())
        return builder, answer


def check_answer(job: ShardJob, answer: str, host: str) -> None:
    """Takes a worker's answer out of the folder of parts.

    Raises:
        ResourceError: it is not there, so the worker writes elsewhere.
    """
    path = job.folder / answer
    if not _appears(path):
        raise ResourceError(
            f"{job.folder}: what {host} writes there does not arrive on the machine of preprocess.py; --dataset_path "
            "must lie on storage that all machines share, under the same path"
        )
    path.unlink(missing_ok=True)


def sample_digest(path: Path, size: int) -> str:
    """Returns a digest of the size of a file and of up to 64 blocks spread over it, first and last among them."""
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _SAMPLE_BYTES, 0)
    with path.open("rb") as file:
        for position in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            file.seek(position)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _check_corpus(path: Path, size: int, digest: str, host: str) -> None:
    try:
        found = path.stat().st_size
        same = found == size and sample_digest(path, size) == digest
    except OSError as error:
        raise DataFormatError(
            f"{path}: {host} cannot read the corpus ({error.strerror}); it must lie under this path on all machines"
        ) from None
    if not same:
        what = f"{found:,} bytes instead of {size:,}" if found != size else "other content"
        raise DataFormatError(f"{path}: the corpus on {host} has {what}; all machines must see the same file")


def _fingerprints(builder: ShardBuilder) -> tuple[str, ...]:
    made = (builder.tokenizer, builder.tgt_tokenizer)
    return tuple(TokenizerFacts.of(tokenizer).fingerprint for tokenizer in made if tokenizer)


def _programs() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for folder in ("data", "tokenizers"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    found["source of tencentpretrain"] = digest.hexdigest()[:12]
    return found


def _differing(wanted: dict[str, str], found: dict[str, str]) -> str | None:
    parts = [f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    return ", ".join(parts) or None


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        if path.parent.is_dir():
            os.scandir(path.parent).close()  # makes a network file system look again
        time.sleep(0.1)
    return True
