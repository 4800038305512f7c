"""The configuration language: spellings, types, precedence, messages."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tencentpretrain.config import load_config
from tencentpretrain.config.cli import Parsed, parse_sections, part_of, read_sections
from tencentpretrain.config.data import DataConfig
from tencentpretrain.config.decode import _unknown
from tencentpretrain.config.export import to_published
from tencentpretrain.config.flags import _resolve
from tencentpretrain.config.loading import config_from_values
from tencentpretrain.config.model import ModelConfig
from tencentpretrain.config.options import options_by_spelling, options_of, show
from tencentpretrain.config.resume_classes import CHECKED_BY_CONTENT, HARMLESS, LAYOUT, MATHS
from tencentpretrain.config.run import PRETRAIN_PARTS, load_run
from tencentpretrain.config.train import OptimConfig, PrecisionConfig, TrainConfig
from tencentpretrain.errors import ConfigError

SMALL: dict[str, Any] = {
    "emb_size": 32, "feedforward_size": 64, "hidden_size": 32, "hidden_act": "gelu", "heads_num": 4, "layers_num": 2,
    "embedding": ["word", "pos", "seg"], "target": ["mlm", "sp"],
}  # fmt: skip
RUN = ["--output_model_path", "out", "--vocab_path", "vocab.txt"]


def write(folder: Path, values: Mapping[str, Any] | str) -> str:
    path = folder / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values, indent=1), encoding="utf-8")
    return str(path)


def problems_of(folder: Path, changes: Mapping[str, Any], *flags: str) -> str:
    """The message of a pre-training run with a small model and some changes, or an empty string."""
    values = {key: value for key, value in {**SMALL, **changes}.items() if value is not ...}
    try:
        load_run(["--config_path", write(folder, values), *RUN, *flags])
    except ConfigError as error:
        return str(error)
    return ""


def model(**changes: Any) -> ModelConfig:
    return config_from_values({**SMALL, **changes})


# Spellings


def test_both_spellings_mean_the_same() -> None:
    inside = {"num_heads": 4, "num_layers": 2, "feed_forward_size": 64, "transformer_bias": False}
    rest = {key: value for key, value in SMALL.items() if key not in ("heads_num", "layers_num", "feedforward_size")}
    assert config_from_values({**rest, **inside}) == model(remove_transformer_bias=True)


def test_a_key_under_both_spellings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_heads.*means the same as 'heads_num'"):
        model(num_heads=4)


def test_inverted_keys() -> None:
    config = model(remove_embedding_layernorm=True, remove_attention_scale=False)
    assert not config.embedding_layernorm
    assert config.attention_scale


def test_value_aliases() -> None:
    config = model(mask="prefix", target="mlm", layernorm="standard")
    assert config.mask == "causal_with_prefix"
    assert config.target == ("mlm",)
    assert (config.layernorm, config.layernorm_form) == ("normal", "standard")


def test_overrides_and_other_sections_keys() -> None:
    config = load_config("models/bert/tiny_config.json", layers_num=3, dropout=0.0)
    assert (config.num_layers, config.dropout) == (3, 0.0)
    assert config_from_values({**SMALL, "learning_rate": 1e-4, "epochs_num": 3}) == model()


def test_streams_overlay_the_outer_settings_and_leave_them_alone() -> None:
    outer = {key: value for key, value in SMALL.items() if key not in ("embedding", "target")}
    config = config_from_values(
        {**outer, "embedding": ["dual"], "encoder": "dual", "target": ["clr"], "dropout": 0.3,
         "stream_0": {"embedding": "word", "encoder": "transformer", "layers_num": 1, "vocab_size": 9},
         "stream_1": {"embedding": ["word", "pos"], "encoder": "transformer", "remove_embedding_layernorm": True}}
    )  # fmt: skip
    assert config.streams is not None
    first, second = config.streams
    assert (first.num_layers, second.num_layers, config.num_layers) == (1, 2, 2)
    assert (first.dropout, second.dropout) == (0.3, 0.3)
    assert (first.embedding_layernorm, second.embedding_layernorm, config.embedding_layernorm) == (True, False, True)


# Types and messages


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("heads_num", "4", 'is "4" (a string), but must be an integer greater than 0'),
        ("heads_num", 4.0, "is 4.0, but must be an integer greater than 0"),
        ("heads_num", True, "is true (a boolean), but must be an integer greater than 0"),
        ("heads_num", 0, "is 0, but must be an integer greater than 0"),
        ("dropout", "0.1", 'is "0.1" (a string), but must be a number at least 0 and less than 1'),
        ("dropout", 1, "is 1, but must be a number at least 0 and less than 1"),
        ("tie_weights", 1, "is 1, but must be true or false"),
        ("remove_transformer_bias", "yes", 'is "yes" (a string), but must be true or false'),
        ("mask", "casual", "must be one of fully_visible, causal, causal_with_prefix; did you mean 'causal'?"),
        ("embedding", ["word", 3], "holds 3, but must be a list, each item a string"),
        ("embedding", {"word": 1}, 'is {"word": 1} (an object), but must be a list, each item a string'),
        ("encoder", None, "is null, but must be a string"),
        ("learning_rate", "1e-4", 'is "1e-4" (a string), but must be a number at least 0'),
        ("rope_scaling", {"type": "linear"}, "factor"),
        ("rope_scaling", {"type": "linear", "factor": 2, "speed": 1}, "speed"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    message = problems_of(tmp_path, {key: value})
    assert expected in message
    assert f"{key} (line" in message or f"{key}." in message


@pytest.mark.parametrize(
    "option", [o for p in map(part_of, PRETRAIN_PARTS) for o in options_of(p)], ids=lambda o: o.key
)
def test_every_key_refuses_a_wrong_type(tmp_path: Path, option: Any) -> None:
    wrong: Any = {"nested": {"deep": 1}} if option.base is not dict else [1]
    _, problems = read_sections(PRETRAIN_PARTS, ["--config_path", write(tmp_path, {**SMALL, option.key: wrong})])
    assert any(problem.startswith(f"{option.key} (line") and show(wrong) in problem for problem in problems), problems


def test_all_problems_at_once_with_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{\n "emb_size": 32,\n "hidden_size": 30,\n "heads_num": "4",\n "atention": 1,\n "layers_num": 2,\n'
        ' "feedforward_size": 4, "hidden_act": "gelu",\n "target": ["mlm", "cls"],\n "dropout": 7\n}',
    )
    with pytest.raises(ConfigError) as caught:
        load_run(["--config_path", path, "--lerning_rate=3", "--batch_size", "x", "--bf16", "--fp16"])
    assert caught.value.source == path
    found = "\n".join(caught.value.problems)
    for expected in (
        "--lerning_rate: unknown flag; did you mean '--learning_rate'?",
        "--batch_size: is 'x', but must be an integer at least 1",
        "heads_num (line 4)",
        "atention (line 5): unknown key",
        "dropout (line 9): is 7",
        "--output_model_path: is required",
        "--fp16: bf16 and fp16 are both on",
        "target (line 8): is mlm cls, but processor 'bert' needs mlm sp (for target mlm cls: --data_processor cls_mlm)",
    ):
        assert expected in found
    assert found.count("\n") == len(caught.value.problems) - 1


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    path = write(tmp_path, '{"emb_size": 32,\n"emb_size": 64}')
    with pytest.raises(ConfigError, match="emb_size: stands twice, in lines 1 and 2"):
        load_config(path)


def test_lines_of_keys_inside_streams(tmp_path: Path) -> None:
    text = (
        '{"encoder": "dual", "embedding": ["dual"],\n"stream_0": {"emb_size": 8},\n"stream_1": {\n"emb_size": "8"\n}}'
    )
    with pytest.raises(ConfigError, match=r"stream_1\.emb_size \(line 4\)"):
        load_config(write(tmp_path, text))


def test_unknown_keys_can_be_let_through(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALL, "invention": 1})
    with pytest.raises(ConfigError, match="invention"):
        load_run(["--config_path", path, *RUN])
    run = load_run(["--config_path", path, *RUN, "--config_strict", "false"])
    assert any("invention" in notice for notice in run.notices)


# Suggestions


def mutants(word: str, rng: random.Random) -> set[str]:
    letters = string.ascii_lowercase + "_"
    found = {word.upper(), word.capitalize(), word.replace("_", "-"), word.replace("_", "")}
    for _ in range(3):
        i, letter = rng.randrange(len(word)), rng.choice(letters)
        found |= {word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + letter + word[i + 1 :]}
        found.add(word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :])
    return found - {""}


def test_suggestions_for_one_edit() -> None:
    """The full count (7,400 keys, 7,000 flags) gives 99.9 %; this is a sample of it."""
    options = options_by_spelling(map(part_of, PRETRAIN_PARTS))
    flags = {name: option for name, option in options.items() if option.flag}
    rng = random.Random(5)
    right = total = 0
    for word in rng.sample(sorted(flags), 60):
        for wrong in sorted(mutants(word, rng) - set(options)):
            _, _, problem = _resolve(wrong, flags)
            for sentence, dashes in ((_unknown("here", wrong, options), ""), (problem, "--")):
                if sentence and "could be any" not in sentence:  # an abbreviation is no error
                    total += 1
                    near = sentence.rpartition(f"did you mean '{dashes}")[2].rstrip("'?")
                    right += near in options and options[near].key == options[word].key
    assert total > 1000
    assert right / total >= 0.99


def test_words_of_other_projects() -> None:
    with pytest.raises(ConfigError, match="did you mean 'layers_num'"):
        model(num_hidden_layers=3)


# Precedence and flags


def parse(*argv: str, config: str | None = None) -> Parsed:
    return parse_sections("x", "d", (OptimConfig, DataConfig, ModelConfig, PrecisionConfig), argv, config_file=config)


def test_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALL, "learning_rate": 3e-4, "seq_length": 64})
    parsed = parse("--config_path", path, "--seq_length=32", "--heads_num", "2")
    assert parsed.get(OptimConfig).learning_rate == 3e-4
    assert parsed.get(DataConfig).seq_length == 32
    assert parsed.get(OptimConfig).warmup == 0.1
    assert parsed.get(ModelConfig).num_heads == 2
    sources = [parsed.origin[key].source for key in ("learning_rate", "seq_length", "warmup", "heads_num")]
    assert sources == ["file", "flag", "default", "flag"]
    assert parsed.given("learning_rate")
    assert not parsed.given("warmup")


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learn", "1e-3"], "learning_rate", 1e-3),
        (["--target", "mlm", "sp"], "target", ("mlm", "sp")),
        (["--target=mlm,sp"], "target", ("mlm", "sp")),
        (["--target", "lm"], "target", ("lm",)),
        (["--tie_weights"], "tie_weights", True),
        (["--no-tie_weights"], "tie_weights", False),
        (["--no_tie_weights"], "tie_weights", False),
        (["--tie_weights=false"], "tie_weights", False),
        (["--remove_transformer_bias"], "transformer_bias", False),
        (["--no-remove_transformer_bias"], "transformer_bias", True),
        (["--no-transformer_bias"], "transformer_bias", False),
        (["--num_heads", "8"], "num_heads", 8),
        (["--no-shuffle"], "shuffle", False),
        (["--max_grad_norm", "none"], "max_grad_norm", None),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--mask", "prefix"], "mask", "causal_with_prefix"),
    ],
)
def test_flag_forms(tmp_path: Path, argv: list[str], key: str, value: Any) -> None:
    parsed, _ = read_sections(
        (OptimConfig, DataConfig, ModelConfig),
        ["--config_path", write(tmp_path, {**SMALL, "tie_weights": True}), *argv],
    )
    assert next(getattr(s, key) for s in parsed.sections.values() if key in type(s).model_fields) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate"], "--learning_rate: needs a value: a number"),
        (["--learning_rate", "1", "2"], "takes one value, but has 2: 1 2"),
        (["--seed", "1.5"], "is '1.5', but must be an integer"),
        (["--seed", "-1"], "--seed: is -1, but must be an integer at least 0"),
        (["--tie_weights", "maybe"], "takes no value, or true or false, but has 'maybe'"),
        (["--tie_weights", "true", "stray"], "but has 'true stray'"),
        (["--layernorm_", "x"], "--layernorm_: could be any of"),
        (["--Learning_Rate", "1"], "did you mean '--learning_rate'?"),
        (["--learning-rate", "1"], "did you mean '--learning_rate'?"),
        (["--scheduler", "linaer"], "unknown scheduler 'linaer'; did you mean 'linear'?"),
        (["--target"], "--target: needs at least one value"),
        (["--scheduler", "tri_stage", "--warmup", "0.6"], "come to more than 1"),
        (["--device", "gpu"], "--device: is 'gpu', but must be auto, cpu, cuda or cuda:<index>"),
        (["--fp16", "--device", "cpu"], "float16 training needs a GPU"),
    ],
)
def test_wrong_flags(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--config_path", write(tmp_path, SMALL), *argv)
    assert message in str(caught.value)


def test_do_lower_case_takes_words(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALL, "do_lower_case": "false"})
    assert not load_run(["--config_path", path, *RUN]).tokenizer.do_lower_case
    assert load_run(["--config_path", path, *RUN, "--do_lower_case", "true"]).tokenizer.do_lower_case


def test_target_tokenizer_flags(tmp_path: Path) -> None:
    flags = ["--config_path", "models/transformer/base_config.json", *RUN]
    run = load_run([*flags, "--tgt_vocab_path", "t.txt", "--tgt_tokenizer", "space", "--tgt_do_lower_case", "false"])
    assert run.tgt_tokenizer is not None
    assert (run.tgt_tokenizer.tokenizer, run.tgt_tokenizer.vocab_path) == ("space", "t.txt")
    assert not run.tgt_tokenizer.do_lower_case
    assert run.tokenizer.do_lower_case
    with pytest.raises(ConfigError, match="tgt_vocab_path: tokenizer 'bert' needs a vocabulary"):
        load_run(flags)
    assert load_run(["--config_path", write(tmp_path, SMALL), *RUN]).tgt_tokenizer is None


def test_old_launcher_flags(tmp_path: Path) -> None:
    flags = ["--config_path", write(tmp_path, SMALL), *RUN]
    run = load_run([*flags, "--world_size", "1", "--gpu_ranks", "2", "--master_ip", "tcp://localhost:1"])
    assert run.precision.device == "cuda:2"
    assert load_run([*flags, "--world_size", "2", "--gpu_ranks", "0", "1"]).precision.device == "auto"
    for more, message in (
        (["--world_size", "2"], "gpu_ranks: names no process to start, but world_size is 2"),
        (["--gpu_ranks", "0", "1"], "world_size: is 1, but gpu_ranks names 2 processes"),
        (["--world_size", "2", "--gpu_ranks", "2"], "gpu_ranks: names 2, but the last rank of 2 is 1"),
        (["--world_size", "2", "--gpu_ranks", "1", "1"], "names a rank twice"),
        (["--master_ip", "somewhere"], "must be tcp://<host>:<port>"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_run([*flags, *more])


# Contradictions


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"target": ["mlm"]}, [], "is mlm, but processor 'bert' needs mlm sp (for target mlm: --data_processor mlm)"),
        ({"target": ["lm"]}, ["--data_processor", "lm"], "would see its own label; 'lm' needs causal"),
        ({"target": ["lm"], "mask": "causal"}, ["--data_processor", "t5"], "needs an encoder-decoder model"),
        ({"decoder": "transformer", "decoder_layers_num": 1}, [], "processor 'bert' has no target side"),
        ({"target": ["bilm"]}, ["--data_processor", "bilm"], "'bilm' needs two independent directions"),
        ({"target": ["cls"]}, ["--data_processor", "cls"], "labels_num: target 'cls' needs it"),
        (
            {"target": ["lm"], "mask": "prefix", "prefix_lm_loss": True},
            ["--data_processor", "prefixlm"],
            "already trains on the continuation",
        ),
        ({}, ["--tokenizer", "virtual"], "'virtual' has no text vocabulary"),
        ({}, ["--tokenizer", "image"], "tokenizer 'image' belongs to the vision line"),
        ({}, ["--data_processor", "vit"], "data processor 'vit' belongs to the vision line"),
        ({}, ["--data_processor", "brt"], "unknown data processor 'brt'; did you mean 'bert'?"),
        ({}, ["--seq_length", "600"], "--seq_length: is 600, but the position table has 512 rows"),
        ({"hidden_size": 30, "emb_size": 30}, [], "hidden_size (line 4): is 30, which heads_num 4 does not divide"),
        ({"emb_size": 16}, [], "emb_size (line 2): is 16, but hidden_size is 32"),
        ({"local_kv_heads_num": 3}, [], "is 3, which does not divide heads_num 4"),
        ({"hidden_act": ...}, [], "hidden_act: is missing, but encoder 'transformer' needs it"),
        ({"heads_num": ..., "layers_num": ...}, [], "layers_num: is missing, but encoder 'transformer' needs it"),
        ({"encoder": "gatedcnn"}, [], "kernel_size: is missing, but encoder 'gatedcnn' needs it"),
        ({"encoder": "transfomer"}, [], "unknown encoder 'transfomer'; did you mean 'transformer'?"),
        ({"embedding": ["word", "word"]}, [], "names a part twice: word, word"),
        ({"embedding": []}, [], "is an empty list; name at least one part"),
        ({"embedding": ["patch", "pos"]}, [], "belongs to the vision line, which this version does not have yet"),
        ({"embedding": ["dual"]}, [], "stream_0: is missing"),
        ({"embedding": ["pos"], "tie_weights": True}, [], "no embedding part 'word' is chosen"),
        (
            {
                "emb_size": 16,
                "target": ["lm"],
                "mask": "causal",
                "tie_weights": True,
                "factorized_embedding_parameterization": True,
            },
            ["--data_processor", "lm"],
            "the word table has width 16, but the head reads 32",
        ),
        ({"share_embedding": True}, [], "but there is no decoder"),
        ({"rotary_position_embedding": True, "relative_position_embedding": True}, [], "are both on; choose one"),
        ({"rotary_position_embedding": True, "attention_head_size": 3}, [], "head width must be even, but it is 3"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}, "rotary_position_embedding": True},
            [],
            "needs original_max_seq_length",
        ),
        ({"alibi": True}, [], "is a bias for causal attention, but mask is fully_visible"),
        ({"sliding_window": 8}, [], "works with mask causal only"),
        ({"encoder": "lstm", "bidirectional": True, "hidden_size": 31}, [], "reads both ways halves it; make it even"),
        ({"encoder": "bilstm", "target": ["lm"]}, ["--data_processor", "lm"], "reads right to left too"),
        (
            {"embedding": ["word", "sinusoidalpos"], "emb_size": 31, "hidden_size": 31, "encoder": "lstm"},
            [],
            "need an even width",
        ),
        ({"projection": True, "target": ["clr"]}, [], "'clr' compares two streams"),
        ({}, ["--dev_dataset_path", "dataset.pt"], "is the training data set itself"),
        ({}, ["--span_masking", "--whole_word_masking"], "two ways to choose what is masked"),
        ({}, ["--allow_change", "bach_size"], "names 'bach_size', which is no setting; did you mean 'batch_size'?"),
        ({}, ["--optimizer", "sgd"], "unknown optimizer 'sgd'"),
        ({"encoder": "lstm"}, ["--use_lora"], "adapters sit in attention layers"),
        ({}, ["--tokenizer", "bpe"], "tokenizer 'bpe' needs the merges"),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], flags: list[str], message: str) -> None:
    assert message in problems_of(tmp_path, changes, *flags)


def test_settings_without_effect_are_said(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALL, "kernel_size": 3, "alibi_position_embedding": True})
    notices = "\n".join(load_run(["--config_path", path, *RUN, "--full_sentences", "--labels_num", "3"]).notices)
    for key in ("kernel_size", "alibi_position_embedding", "full_sentences", "labels_num"):
        assert key in notices


# Export and resuming


def test_saved_settings_can_be_given_again(tmp_path: Path) -> None:
    flags = [
        "--heads_num",
        "2",
        "--learning_rate",
        "1e-3",
        "--no-shuffle",
        "--remove_transformer_bias",
        "--layernorm",
        "standard",
    ]
    run = load_run(["--config_path", write(tmp_path, SMALL), *RUN, *flags])
    saved = to_published(run)
    assert (saved["heads_num"], saved["learning_rate"], saved["shuffle"]) == (2, 1e-3, False)
    assert saved["remove_transformer_bias"]
    assert "output_model_path" not in saved
    assert to_published(run, run_paths=True)["output_model_path"] == "out"
    again = load_run(["--config_path", write(tmp_path, saved), "--output_model_path", "out"])
    for name in ("model", "data", "optim", "precision", "lora", "tokenizer", "launch"):
        assert getattr(again, name) == getattr(run, name), name
    assert load_config(tmp_path / "config.json") == run.model


def test_every_setting_has_one_resume_class() -> None:
    keys = {option.key for part in map(part_of, PRETRAIN_PARTS) for option in options_of(part)} | {
        "stream_0",
        "stream_1",
    }
    classes = (HARMLESS, CHECKED_BY_CONTENT, LAYOUT, MATHS)
    unclassed = keys - frozenset().union(*classes)
    assert not unclassed, f"say in resume_classes.py whether these change the numbers: {sorted(unclassed)}"
    assert sum(map(len, classes)) == len(frozenset().union(*classes)), "a key is in two classes"
    assert frozenset().union(*classes) - keys <= {"config_path", "config_strict"}


def test_required_values_only_where_promised() -> None:
    required = {option.key for part in map(part_of, PRETRAIN_PARTS) for option in options_of(part) if option.required}
    assert required == {"output_model_path"}
    assert TrainConfig.model_fields["output_model_path"].is_required()
