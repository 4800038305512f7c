"""Settings that fine-tuning and inference share over all tasks, and the groups that single tasks add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Optional

from tencentpretrain.config.base import Section, setting


class FinetuneConfig(Section):
    """One fine-tuning run: files, length, report."""

    train_path: str = setting(text="training table", topic="run")
    dev_path: str = setting(text="table that chooses the best epoch", topic="run")
    test_path: Optional[str] = setting(None, "labelled table the best model is measured on at the end", topic="run")
    pretrained_model_path: Optional[str] = setting(None, "initial weights; random if absent", topic="run")
    output_model_path: str = setting(
        "models/finetuned_model.bin", "best model; <path>.run/ holds settings, metrics and log", topic="run"
    )
    model_format: Literal["bin", "safetensors"] = setting("bin", "form of the saved model", topic="run")
    epochs_num: int = setting(3, "passes over the training table", topic="run", ge=1)
    batch_size: int = setting(32, "rows per update", topic="run", ge=1)
    seq_length: int = setting(128, "tokens per row; longer rows are cut on the right", topic="run", ge=2)
    bucket_by_length: bool = setting(
        False, "put rows of like length into one batch, which then holds less padding", topic="run"
    )
    report_steps: int = setting(100, "updates between report lines", topic="run", ge=1)
    seed: int = setting(7, "seed of order, dropout and initial weights", topic="run", ge=0)
    early_stopping: Optional[int] = setting(
        None, "stop after this many epochs without a better dev result", topic="run", ge=1
    )
    strict_loading: bool = setting(True, "refuse initial weights that do not fit wholly", topic="run")
    allow_missing: tuple[str, ...] = setting((), "prefixes of tensors the initial weights may lack", topic="run")
    resize_vocab: bool = setting(
        False, "initial weights with another vocabulary size: copy the rows both have", topic="run"
    )
    log_path: Optional[str] = setting(None, "extra log file", topic="run")
    log_level: Literal["ERROR", "INFO", "DEBUG", "NOTSET"] = setting("INFO", "console level", topic="run")
    log_file_level: Literal["ERROR", "INFO", "DEBUG", "NOTSET"] = setting("INFO", "log file level", topic="run")


class InferConfig(Section):
    """One inference run: model, table in, predictions out."""

    load_model_path: str = setting(text="fine-tuned model", topic="run")
    test_path: str = setting(text="table to predict; a label column is not needed", topic="run")
    prediction_path: str = setting(text="where the predictions are written, one row per row of the table", topic="run")
    batch_size: int = setting(64, "rows at a time", topic="run", ge=1)
    seq_length: int = setting(128, "tokens per row; longer rows are cut on the right", topic="run", ge=2)


class SwitchedSection(Section):
    """Settings that only count where a switch among them is on."""

    def idle(self) -> Mapping[str, str]:
        """Returns the keys that do nothing now, each with what would turn it on."""
        return {}


class SoftTargetConfig(SwitchedSection):
    """Learning from another model's logits."""

    soft_targets: bool = setting(False, "also fit the column 'logits' of the training table", topic="soft targets")
    soft_alpha: float = setting(
        0.5, "weight of the logits' squared error; the labels have the rest", topic="soft targets", ge=0, le=1
    )

    def idle(self) -> Mapping[str, str]:
        return {} if self.soft_targets else {"soft_alpha": "--soft_targets"}


class AdversarialConfig(SwitchedSection):
    """Training against small changes of the embeddings."""

    use_adv: bool = setting(False, "adversarial training", topic="adversarial training")
    adv_type: Literal["fgm", "pgd"] = setting(
        "fgm", "fast gradient, or projected gradient", topic="adversarial training"
    )
    fgm_epsilon: float = setting(1e-6, "fgm: length of the step", topic="adversarial training", ge=0)
    pgd_k: int = setting(3, "pgd: number of steps", topic="adversarial training", ge=1)
    pgd_epsilon: float = setting(1.0, "pgd: radius of the ball", topic="adversarial training", gt=0)
    pgd_alpha: float = setting(0.3, "pgd: length of a step", topic="adversarial training", ge=0)

    def idle(self) -> Mapping[str, str]:
        fgm = {"fgm_epsilon": "--use_adv --adv_type fgm"}
        pgd = dict.fromkeys(("pgd_k", "pgd_epsilon", "pgd_alpha"), "--use_adv --adv_type pgd")
        if not self.use_adv:
            return {"adv_type": "--use_adv", **fgm, **pgd}
        return pgd if self.adv_type == "fgm" else fgm


class OutputConfig(Section):
    """What a prediction file holds besides the label."""

    output_logits: bool = setting(False, "also write the logits of all labels", topic="output")
    output_prob: bool = setting(False, "also write the probabilities of all labels", topic="output")
