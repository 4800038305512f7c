"""Vocabularies made by scripts/build_vocab.py: order, determinism, and that the tokenizers read them."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from tencentpretrain.entry.build_vocab import main
from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer
from tencentpretrain.tokenizers.training import reserved_tokens

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_vocab.py"
LINES = ["bb a bb", "", "  [UNK] Cc 中国 bb a", "the lower lowest low newer newest new wider widest"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A few lines, often enough that something can be learnt."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES * 30) + "\n", encoding="utf-8")
    return path


def build(corpus: Path, output: Path, *flags: str) -> list[str]:
    """Runs the script's main function and returns the lines of the vocabulary."""
    assert main(["--corpus_path", str(corpus), f"--output_path={output}", *flags]) == 0
    return output.read_bytes().decode("utf-8", "replace").split("\n")[:-1]


def test_words_are_counted(corpus: Path, tmp_path: Path) -> None:
    lines = build(corpus, tmp_path / "v.txt", "--delimiter", "space")
    assert lines[:104] == reserved_tokens()
    assert lines[104:] == ["bb", "a", "Cc", "中国", *LINES[3].split()]  # 90, 60, then ties by first appearance
    assert build(corpus, tmp_path / "v.txt", "--delimiter", "space", "--min_count", "60")[104:] == ["bb", "a"]
    assert build(corpus, tmp_path / "v.txt", "--type", "space", "--vocab_size", "105")[104:] == ["bb"]
    lowered = build(corpus, tmp_path / "v.txt", "--type", "space", "--lower_case")
    assert "cc" in lowered
    assert "Cc" not in lowered


def test_characters_are_counted(corpus: Path, tmp_path: Path) -> None:
    counted = build(corpus, tmp_path / "v.txt")[104:]
    text = "".join("".join(LINES).split())
    assert set(counted) == set(text)
    assert [text.count(char) for char in counted] == sorted((text.count(char) for char in counted), reverse=True)


@pytest.mark.parametrize("kind", ["char", "space", "wordpiece", "bpe", "sentencepiece"])
def test_same_bytes_for_any_number_of_workers_and_any_compression(kind: str, corpus: Path, tmp_path: Path) -> None:
    size = {
        "wordpiece": ["--vocab_size", "170"],
        "bpe": ["--vocab_size", "400"],
        "sentencepiece": ["--vocab_size", "60"],
    }
    packed = tmp_path / "corpus.txt.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    outputs = []
    for run, source in enumerate((corpus, packed)):
        output = tmp_path / f"{kind}{run}"
        command = [
            sys.executable,
            str(SCRIPT),
            "--corpus_path",
            str(source),
            "--output_path",
            str(output),
            "--type",
            kind,
        ]
        workers = ["--workers_num", str(run + 1)] if kind in ("char", "space") else []
        # A process of its own, because hash seeds differ between processes.
        subprocess.run([*command, *size.get(kind, []), *workers], check=True, cwd=tmp_path, capture_output=True)
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0]


def test_wordpiece_is_read_by_bert(corpus: Path, tmp_path: Path) -> None:
    lines = build(corpus, tmp_path / "v.txt", "--type", "wordpiece", "--vocab_size", "170", "--lower_case")
    assert lines[:104] == reserved_tokens()
    assert len(lines) == len(set(lines)) <= 170
    tokenizer = build_tokenizer(TokenizerConfig(vocab_path=str(tmp_path / "v.txt")))
    for line in LINES:
        assert tokenizer.unk_id not in tokenizer.encode(line)
    assert len(tokenizer.encode("newest")) < 3


def test_bpe_is_read_by_bpe(corpus: Path, tmp_path: Path) -> None:
    lines = build(corpus, tmp_path / "v.txt", "--type", "bpe", "--vocab_size", "400", "--sentinels_num", "3")
    assert lines[:104] == reserved_tokens()
    assert lines[-3:] == ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    assert (tmp_path / "v_merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    tokenizer = build_tokenizer(
        TokenizerConfig(tokenizer="bpe", vocab_path=str(tmp_path / "v.txt"), merges_path=str(tmp_path / "v_merges.txt"))
    )
    assert tokenizer.num_sentinels == 3
    for text in [*LINES, "unseen ünïcode 😀"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" newest")) < 3


def test_sentencepiece_is_read_by_bert(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "m.model", "--type", "sentencepiece", "--vocab_size", "60", "--sentinels_num", "2")
    tokenizer = build_tokenizer(TokenizerConfig(spm_model_path=str(tmp_path / "m.model")))
    assert list(tokenizer.tokens[:7]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>", "<extra_id_1>"]
    assert tokenizer.num_sentinels == 2
    assert tokenizer.decode(tokenizer.encode("lower newest")) == "lower newest"


@pytest.mark.parametrize(
    ("flags", "content", "code", "message"),
    [
        ([], None, 3, "cannot be read"),
        ([], b"", 3, "empty"),
        ([], b"\n \n\t\n", 3, "blank lines only"),
        ([], b"version https://git-lfs.github.com/spec/v1\n", 3, "git-lfs"),
        (["--type", "wordpiece", "--vocab_size", "110"], b"some letters\n", 2, "raise --vocab_size"),
        (["--type", "bpe", "--vocab_size", "300"], b"some letters\n", 2, "raise --vocab_size"),
        (["--type", "sentencepiece", "--vocab_size", "3"], b"some letters\n", 2, "vocab_size"),
        (["--type", "char", "--merges_path", "m"], b"a\n", 2, "merges_path: has no effect"),
        (["--min_count", "0"], b"a\n", 2, "min_count: must be at least 1"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_no_file(
    flags: list[str], content: bytes | None, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    assert main(["--corpus_path", str(corpus), "--output_path", str(tmp_path / "out" / "v.txt"), *flags]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unusable_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"good words\n" * 20 + b"bad \xff\n" + b"more words\n" * 20)
    lines = build(corpus, tmp_path / "v.txt", "--delimiter", "space")
    assert lines[104:] == ["words", "good", "more"]
    assert "1 lines were left out; the first, at byte 220" in capsys.readouterr().out


def test_help_needs_no_heavy_import(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['build_vocab.py', '--help']\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'sentencepiece'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    for flag in ("--corpus_path", "--delimiter", "--output_path", "--workers_num", "--min_count", "--type"):
        assert flag in shown.stdout
