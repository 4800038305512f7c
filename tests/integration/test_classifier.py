"""The classifier end to end, through its scripts' entry: train, save, load, predict."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tencentpretrain.checkpoint.files import read_tensors, write_tensors
from tencentpretrain.config.loading import load_config
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.entry import finetune, infer
from tencentpretrain.model import build_model
from tencentpretrain.reliability.layouts import fork

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{index}" for index in range(40)]
MODEL = {
    "emb_size": 32,
    "hidden_size": 32,
    "feedforward_size": 64,
    "hidden_act": "gelu",
    "heads_num": 2,
    "layers_num": 2,
    "max_seq_length": 48,
    "dropout": 0.1,
    "data_processor": "bert",
    "embedding": ["word", "pos", "seg"],
    "encoder": "transformer",
    "mask": "fully_visible",
    "target": ["mlm", "sp"],
    "tie_weights": True,
    "pooling": "max",
}


class Case:
    """A folder with vocabulary, model JSON and learnable tables of four labels, and the commands run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
        self.config(MODEL)
        for name, rows, seed in (("train", 240, 1), ("dev", 60, 2), ("test", 40, 3)):
            self.table(name, rows, seed)

    def config(self, content: dict[str, object]) -> None:
        (self.folder / "config.json").write_text(json.dumps(content))

    def table(self, name: str, rows: int, seed: int, *, pair: bool = False, logits: bool = False) -> None:
        draw = random.Random(seed)
        lines = ["\t".join(["label", "text_a", *["text_b"] * pair, *["logits"] * logits])]
        for _ in range(rows):
            label = draw.randrange(4)
            words = draw.choices(WORDS[4:], k=draw.randrange(2, 12))
            words.insert(draw.randrange(len(words)), WORDS[label])
            cut = draw.randrange(1, len(words))
            texts = [" ".join(words[:cut]), " ".join(words[cut:])] if pair else [" ".join(words)]
            given = [" ".join(str(4.0 * (index == label)) for index in range(4))] if logits else []
            lines.append("\t".join([str(label), *texts, *given]))
        (self.folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")

    def train(self, *flags: str) -> int:
        where = self.folder
        return finetune.main(
            "classifier",
            ["--config_path", f"{where}/config.json", "--tokenizer", "space", "--vocab_path", f"{where}/vocab.txt",
             "--train_path", f"{where}/train.tsv", f"--dev_path={where}/dev.tsv", "--seq_length=48",
             "--batch_size", "16", "--output_model_path", f"{where}/model.bin", "--learning_rate", "3e-3",
             "--report_steps", "10", "--threads", "1", *flags],
        )  # fmt: skip

    def infer(self, *flags: str, table: str = "dev", labels: int = 4) -> int:
        where = self.folder
        return infer.main(
            "classifier",
            ["--config_path", f"{where}/config.json", "--tokenizer", "space", "--vocab_path", f"{where}/vocab.txt",
             "--load_model_path", f"{where}/model.bin", "--test_path", f"{where}/{table}.tsv", "--seq_length", "48",
             "--prediction_path", f"{where}/prediction.tsv", "--labels_num", str(labels), *flags],
        )  # fmt: skip

    def metrics(self) -> list[dict[str, float]]:
        text = (self.folder / "model.bin.run" / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def predictions(self) -> list[list[str]]:
        return [line.split("\t") for line in (self.folder / "prediction.tsv").read_text().splitlines()]

    def accuracy(self, table: str = "dev") -> float:
        gold = [line.split("\t")[0] for line in (self.folder / f"{table}.tsv").read_text().splitlines()[1:]]
        found = [row[0] for row in self.predictions()[1:]]
        assert len(found) == len(gold)
        return float(np.mean([label == wanted for label, wanted in zip(found, gold, strict=True)]))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_train_and_predict(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert case.train("--test_path", f"{case.folder}/test.tsv", "--epochs_num", "5") == 0
    printed = capfd.readouterr()
    assert "Epoch id: 1, Training steps: 10, Avg loss: " in printed.err
    assert "Acc. (Correct/Total): " in printed.out
    metrics = case.metrics()
    best = max(record["dev_accuracy"] for record in metrics if "dev_accuracy" in record)
    assert best > 0.9, "the label stands in the text, so it must be learned"
    assert case.infer("--output_logits", "--output_prob") == 0
    assert case.accuracy() == pytest.approx(best)
    header, *rows = case.predictions()
    assert header == ["label", "logits", "prob"]
    for label, logits, prob in rows:
        values, shares = np.array(logits.split(), float), np.array(prob.split(), float)
        assert len(values) == len(shares) == 4
        assert int(label) == values.argmax()
        assert shares == pytest.approx(np.exp(values) / np.exp(values).sum(), abs=1e-6)
    assert case.infer(table="test") == 0
    assert case.predictions()[0] == ["label"]
    assert case.accuracy("test") == pytest.approx(metrics[-1]["test_accuracy"])


def test_saved_names_are_the_published_ones_and_the_run_folder_is_complete(case: Case) -> None:
    assert case.train("--epochs_num", "1") == 0
    saved = read_tensors(case.folder / "model.bin")
    assert {name.split(".")[0] for name in saved} == {"embedding", "encoder", "output_layer_1", "output_layer_2"}
    assert saved.shape("output_layer_1.weight") == (32, 32)
    assert saved.shape("output_layer_2.weight") == (4, 32)
    run = case.folder / "model.bin.run"
    settings = json.loads((run / "config.json").read_text())
    assert settings["heads_num"] == 2
    assert settings["learning_rate"] == 3e-3
    assert json.loads((run / "task.json").read_text())["labels_num"] == 4
    assert json.loads((run / "tokenizer.json").read_text())["vocab_size"] == 45
    assert "Training steps" in (run / "log.txt").read_text()


def test_pairs_soft_targets_and_adversarial_training(case: Case) -> None:
    case.table("train", 240, 1, pair=True, logits=True)
    case.table("dev", 60, 2, pair=True)
    # the published radius of PGD is meant for pre-trained embeddings: random ones are shorter than it
    pgd = ["--use_adv", "--adv_type", "pgd", "--pgd_alpha", "1e-3", "--pgd_epsilon", "2e-3"]
    for flags in (["--soft_targets", "--soft_alpha", "0.3"], ["--use_adv"], pgd):
        assert case.train("--epochs_num", "5", "--learning_rate", "1e-3", *flags) == 0
        assert max(record.get("dev_accuracy", 0) for record in case.metrics()) > 0.7
    assert case.infer() == 0


def test_batches_of_like_length(case: Case) -> None:
    assert case.train("--epochs_num", "5", "--bucket_by_length") == 0
    assert max(record.get("dev_accuracy", 0) for record in case.metrics()) > 0.7


def test_same_seed_same_weights(case: Case) -> None:
    runs = []
    for seed in ("1", "1", "2"):
        assert case.train("--epochs_num", "1", "--seed", seed) == 0
        saved = read_tensors(case.folder / "model.bin")
        runs.append(torch.cat([saved[name].flatten() for name in sorted(saved)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_bf16_clipping_early_stopping_and_safetensors(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--bf16", "--max_grad_norm", "1", "--early_stopping", "1", "--model_format", "safetensors"]
    assert case.train("--epochs_num", "12", *flags) == 0
    epochs = [record for record in case.metrics() if "dev_accuracy" in record]
    assert len(epochs) < 12
    assert "training stops" in capfd.readouterr().err
    assert case.infer() == 0
    assert case.accuracy() == pytest.approx(max(record["dev_accuracy"] for record in epochs))


def test_pretrained_weights_are_loaded_below_the_head(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config(case.folder / "config.json")
    pretrained = build_model(config, 45, seed=5)
    write_tensors(case.folder / "bert.bin", pretrained.state_dict())
    flags = ["--pretrained_model_path", f"{case.folder}/bert.bin", "--learning_rate", "0", "--epochs_num", "1"]
    assert case.train(*flags) == 0
    assert "4 not in the file, kept as initialised: output_layer_1" in capfd.readouterr().err
    saved = read_tensors(case.folder / "model.bin")
    for name, tensor in pretrained.state_dict().items():
        if not name.startswith("target."):
            assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize("encoder", ["transformer", "lstm", "gatedcnn"])
def test_dynamic_padding_gives_the_numbers_of_full_padding(case: Case, encoder: str) -> None:
    from tencentpretrain.config.train import PrecisionConfig
    from tencentpretrain.engines.local import LocalEngine
    from tencentpretrain.tasks.classification import TextClassification
    from tencentpretrain.tasks.predict import batch_width, build_task_model, predict_logits
    from tencentpretrain.tasks.tsv import read_table
    from tencentpretrain.tokenizers import TokenizerConfig, build_tokenizer

    case.table("dev", 60, 2, pair=True)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer="space", vocab_path=f"{case.folder}/vocab.txt"))
    task = TextClassification(num_labels=4)
    examples = task.examples(read_table(case.folder / "dev.tsv", required=()), tokenizer, 48, labelled=True)
    for pooling in ("first", "last", "mean", "max"):
        config = ModelConfig(embedding=("word", "pos", "seg"), emb_size=32, hidden_size=32, feed_forward_size=64,
                             num_heads=2, num_layers=2, hidden_act="gelu", max_seq_length=48, encoder=encoder,
                             kernel_size=3, block_size=2, pooling=pooling, target=("mlm",))  # fmt: skip
        model = build_task_model(task, config, tokenizer, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that the logits are not all but zero
        found = [
            predict_logits(
                model, examples, batch_size=size, pad_id=0, width=width, engine=LocalEngine(PrecisionConfig())
            )
            for size, width in ((7, batch_width(config, 48)), (60, 48))
        ]
        assert np.abs(found[0] - found[1]).max() < 2e-5
        if pooling != "first" or encoder == "transformer":  # a left-to-right encoder's first state knows CLS alone
            assert np.abs(found[0] - found[0].mean(axis=0)).max() > 0.01


def refused(case: Case, capfd: pytest.CaptureFixture[str], code: int, said: str, *flags: str) -> None:
    capfd.readouterr()
    assert case.train(*flags) == code
    message = capfd.readouterr().err
    assert said in message, message
    assert not (case.folder / "model.bin").exists()


def test_bad_training_input_is_answered_with_a_sentence(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    train = case.folder / "train.tsv"
    good = train.read_text()
    train.write_text("label\ttext_a\nnews\tw1\nsport\tw2\n")
    refused(case, capfd, 3, "train.tsv:2: label 'news' is not a number")
    train.write_text("label\ttext_a\n0\tw1\n2\tw2\n")
    refused(case, capfd, 3, "but 1 never occurs")
    train.write_text("label\ttext_a\n1\tw1\n1\tw2\n")
    refused(case, capfd, 3, "needs two or more")
    train.write_text(good.replace("text_a", "txt_a"))
    refused(case, capfd, 3, "did you mean 'txt_a'")
    train.write_text(good)
    refused(case, capfd, 3, "column logits is missing", "--soft_targets")
    (case.folder / "dev.tsv").write_text("label\ttext_a\n0\tw1\n7\tw2\n")
    refused(case, capfd, 3, "dev.tsv:3: label 7 is out of range")
    case.table("dev", 20, 1, pair=True)
    refused(case, capfd, 3, "dev.tsv:1: column text_b is there, but the training table has no text_b")
    case.table("dev", 20, 1)
    refused(case, capfd, 2, "48 rows", "--seq_length", "64")
    refused(case, capfd, 2, "did you mean", "--learnin_rate", "1")
    (case.folder / "bert.bin").write_text("<!DOCTYPE html><html></html>")
    refused(case, capfd, 4, "HTML page", "--pretrained_model_path", f"{case.folder}/bert.bin")
    write_tensors(case.folder / "bert.bin", {"embedding.word.embedding.weight": torch.zeros(99, 32)})
    refused(case, capfd, 4, "vocabulary of 99 tokens", "--pretrained_model_path", f"{case.folder}/bert.bin")
    refused(case, capfd, 6, "the update was not made", "--learning_rate", "1e30", "--epochs_num", "2", "--warmup", "0")


def test_bad_inference_input_is_answered_with_a_sentence(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert case.train("--epochs_num", "1") == 0
    capfd.readouterr()
    case.table("pairs", 20, 1, pair=True)
    assert case.infer(table="pairs") == 3
    assert "the training table has no text_b" in capfd.readouterr().err
    assert case.infer("--pooling", "mean") == 4
    assert 'pooling: now "mean", fine-tuned with "max"' in capfd.readouterr().err
    assert case.infer("--dropout", "0.3") == 0
    (case.folder / "prediction.tsv").unlink()
    assert case.infer(labels=3) == 4
    assert "output_layer_2.weight: [4, 32] in the file, [3, 32] in the model" in capfd.readouterr().err
    (case.folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[::-1]]) + "\n"
    )
    assert case.infer() == 4
    assert "another tokenizer" in capfd.readouterr().err
    assert not (case.folder / "prediction.tsv").exists()


def test_a_label_that_no_training_row_has_can_be_announced(case: Case) -> None:
    (case.folder / "train.tsv").write_text("label\ttext_a\n0\tw1\n2\tw2\n")
    assert case.train("--labels_num", "5", "--epochs_num", "1") == 0
    assert read_tensors(case.folder / "model.bin").shape("output_layer_2.bias") == (5,)
    (case.folder / "train.tsv").write_text("label\ttext_a\n0\tw1\n2\tw2\n1\tw3\n3\tw4\n")
    assert case.train("--labels_num", "2", "--epochs_num", "1") == 0
    assert read_tensors(case.folder / "model.bin").shape("output_layer_2.bias") == (4,)


def test_unlabelled_table_keeps_every_row(case: Case) -> None:
    assert case.train("--epochs_num", "1") == 0
    (case.folder / "new.tsv").write_text("\ufefftext_a\nw1 w2\n\nw0\n" + "w7 " * 100)
    assert case.infer(table="new") == 0
    assert len(case.predictions()) == 5


@pytest.mark.parametrize("script", ["finetune/run_classifier.py", "inference/run_classifier_infer.py"])
def test_help_needs_no_torch(script: str, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--vocab_path" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["book_review", "chnsenticorp"])
def test_real_reviews(shared: Path, tmp_path: Path, name: str) -> None:
    data = shared / "data" / "tasks" / "tiny" / name
    common = ["--config_path", str(ROOT / "models/bert/tiny_config.json"), "--seq_length", "64", "--threads", "1",
              "--vocab_path", str(shared / "data/vocab/google_zh_vocab.txt")]  # fmt: skip
    model = tmp_path / "model.bin"
    flags = [
        "--train_path",
        str(data / "train.tsv"),
        "--dev_path",
        str(data / "dev.tsv"),
        "--output_model_path",
        str(model),
    ]
    assert finetune.main("classifier", [*common, *flags, "--epochs_num", "2", "--learning_rate", "5e-4"]) == 0
    records = [json.loads(line) for line in (tmp_path / "model.bin.run/metrics.jsonl").read_text().splitlines()]
    best = max(record["dev_accuracy"] for record in records if "dev_accuracy" in record)
    output = tmp_path / "prediction.tsv"
    flags = ["--load_model_path", str(model), "--prediction_path", str(output), "--labels_num", "2"]
    assert infer.main("classifier", [*common, *flags, "--test_path", str(data / "dev.tsv")]) == 0
    gold = [line.split("\t")[0] for line in (data / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    found = output.read_text().splitlines()[1:]
    assert np.mean([label == wanted for label, wanted in zip(found, gold, strict=True)]) == pytest.approx(best)
    assert infer.main("classifier", [*common, *flags, "--test_path", str(data / "test_nolabel.tsv")]) == 0
    assert len(output.read_text().splitlines()) == 51


def test_two_processes_train_the_model_of_one(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.config({**MODEL, "dropout": 0.0})
    case.table("train", 245, 1)  # the last batch has five rows, an odd number
    assert case.train("--epochs_num", "2", "--device", "cpu") == 0
    alone = {name: tensor.clone() for name, tensor in read_tensors(tmp_path / "model.bin").items()}
    metrics = (tmp_path / "model.bin.run/metrics.jsonl").read_text().splitlines()

    def both(rank: int) -> int:
        return case.train("--epochs_num", "2", "--device", "cpu", "--output_model_path", f"{tmp_path}/two.bin")

    assert fork(2, both) == 0
    together = read_tensors(tmp_path / "two.bin")
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=2e-5), name
    shared = (tmp_path / "two.bin.run/metrics.jsonl").read_text().splitlines()
    for line, other in zip(metrics, shared, strict=True):
        ours, theirs = json.loads(line), json.loads(other)
        assert ours.keys() == theirs.keys()
        assert ours.get("dev_accuracy") == theirs.get("dev_accuracy")
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), abs=1e-4)
