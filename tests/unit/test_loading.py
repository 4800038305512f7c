"""Loading: all or nothing, with a list; older names; tied heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tencentpretrain.checkpoint.files import write_tensors
from tencentpretrain.checkpoint.loading import load_checkpoint, load_tensors
from tencentpretrain.checkpoint.mapping import migrate
from tencentpretrain.errors import CheckpointMismatch

BIAS = "relative_pos_emb.relative_attention_bias.weight"


class Named(nn.Module):
    """A model that is nothing but tensors of given names; `ties` maps a name to the one it shares."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], ties: dict[str, str] | None = None) -> None:
        super().__init__()
        self.ties = ties or {}
        for name, shape in shapes.items():
            self._place(name, nn.Parameter(torch.zeros(shape)))
        for name, other in self.ties.items():
            self._place(name, self.get_parameter(other))

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        module: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, parameter)

    def untie_head(self) -> None:
        for name in self.ties:
            if name.startswith("target."):
                self._place(name, nn.Parameter(self.get_parameter(name).detach().clone()))


WORD, HEAD, TARGET_WORD = (
    "embedding.word.embedding.weight",
    "target.lm.output_layer.weight",
    "tgt_embedding.word.embedding.weight",
)
SHAPES: dict[str, tuple[int, ...]] = {WORD: (6, 3), "encoder.layer_norm.gamma": (3,), HEAD: (6, 3)}


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_everything_loads_and_is_reported(tmp_path: Path) -> None:
    model, tensors = Named(SHAPES), values(SHAPES)
    write_tensors(tmp_path / "m.bin", tensors)
    report = load_checkpoint(model, tmp_path / "m.bin")
    assert set(report.loaded) == set(SHAPES)
    assert report.missing == report.unexpected == report.misshapen == report.untied == ()
    assert not report.migrated
    assert "3 tensors loaded" in report.text()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_strict_refusal_lists_everything_and_changes_nothing() -> None:
    model = Named(SHAPES)
    tensors = values({WORD: (6, 3), "encoder.layer_norm.gama": (3,), HEAD: (6, 4)})
    with pytest.raises(CheckpointMismatch) as caught:
        load_tensors(model, tensors, source="old.bin")
    text = str(caught.value)
    assert "missing from the file (1" in text
    assert "encoder.layer_norm.gamma; did you mean 'encoder.layer_norm.gama'?" in text
    assert "[6, 4] in the file, [6, 3] in the model" in text
    assert not any(tensor.any() for tensor in model.state_dict().values())


def test_prefixes_accept_what_the_caller_expects() -> None:
    model = Named({**SHAPES, "output_layer_1.weight": (3, 3)})
    tensors = {**values(SHAPES), "target.sp.linear_1.weight": torch.ones(3, 3)}
    report = load_tensors(model, tensors, allow_missing=("output_layer_",), ignore_unexpected=("target.",))
    assert report.missing == ("output_layer_1.weight",)
    assert report.unexpected == ("target.sp.linear_1.weight",)
    with pytest.raises(CheckpointMismatch, match=r"in the file, but not in the model \(1\)"):
        load_tensors(model, tensors, allow_missing=("output_layer_",))


def test_not_strict_loads_what_fits() -> None:
    model = Named(SHAPES)
    report = load_tensors(model, values({WORD: (6, 3), HEAD: (6, 9), "more": (1,)}), strict=False)
    assert report.loaded == (WORD,)
    assert [entry.name for entry in report.misshapen] == [HEAD]
    assert report.missing == ("encoder.layer_norm.gamma",)
    assert report.unexpected == ("more",)


@pytest.mark.parametrize("strict", [True, False])
def test_another_model_is_refused(strict: bool) -> None:
    with pytest.raises(CheckpointMismatch, match="Hugging Face names"):
        load_tensors(Named(SHAPES), {"bert.embeddings.word_embeddings.weight": torch.ones(6, 3)}, strict=strict)


def test_head_alone_is_not_a_load() -> None:
    with pytest.raises(CheckpointMismatch, match="no tensor of embedding or encoder has a name"):
        load_tensors(Named(SHAPES), values({HEAD: (6, 3)}), allow_missing=("",))


def test_integers_for_weights_are_refused_and_half_precision_is_converted() -> None:
    tensors = values(SHAPES)
    with pytest.raises(CheckpointMismatch, match="int64"):
        load_tensors(Named(SHAPES), {**tensors, HEAD: torch.ones(6, 3, dtype=torch.int64)})
    model = Named(SHAPES)
    load_tensors(model, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    assert torch.equal(model.get_parameter(WORD), tensors[WORD].to(torch.bfloat16).float())


def test_vocabulary_misfit_is_explained_and_can_be_resized() -> None:
    tensors = values({WORD: (4, 3), "encoder.layer_norm.gamma": (3,), HEAD: (8, 3)})
    with pytest.raises(CheckpointMismatch, match=r"vocabulary of 4 tokens, the model has 6.*--resize_vocab"):
        load_tensors(Named(SHAPES), tensors)
    model = Named(SHAPES)
    report = load_tensors(model, tensors, resize_vocab=True)
    assert {entry.name for entry in report.resized} == {WORD, HEAD}
    assert torch.equal(model.get_parameter(WORD)[:4], tensors[WORD])
    assert not model.get_parameter(WORD)[4:].any()
    assert torch.equal(model.get_parameter(HEAD), tensors[HEAD][:6])


def tied_model() -> Named:
    shapes = {WORD: (6, 3), "encoder.layer_norm.gamma": (3,)}
    return Named(shapes, ties={TARGET_WORD: WORD, HEAD: WORD})


@pytest.mark.parametrize("absent", [(), (HEAD,), (TARGET_WORD,), (HEAD, TARGET_WORD), (WORD, TARGET_WORD)])
def test_equal_or_absent_twins_stay_tied(absent: tuple[str, ...]) -> None:
    model, word = tied_model(), torch.randn(6, 3)
    tensors = {WORD: word, TARGET_WORD: word.clone(), HEAD: word.clone(), "encoder.layer_norm.gamma": torch.ones(3)}
    report = load_tensors(model, {name: tensor for name, tensor in tensors.items() if name not in absent})
    assert report.untied == report.missing == ()
    assert model.get_parameter(HEAD) is model.get_parameter(WORD) is model.get_parameter(TARGET_WORD)
    assert torch.equal(model.get_parameter(WORD), word)


def test_a_head_that_differs_is_untied() -> None:
    model, word, head = tied_model(), torch.randn(6, 3), torch.randn(6, 3)
    tensors = {WORD: word, TARGET_WORD: word, HEAD: head, "encoder.layer_norm.gamma": torch.ones(3)}
    report = load_tensors(model, tensors)
    assert report.untied == (HEAD,)
    assert "kept untied" in report.text()
    assert torch.equal(model.get_parameter(HEAD), head)
    assert torch.equal(model.get_parameter(WORD), word)
    assert model.get_parameter(TARGET_WORD) is model.get_parameter(WORD)


def test_embeddings_that_differ_are_refused_where_the_model_shares_them() -> None:
    tensors = {WORD: torch.ones(6, 3), TARGET_WORD: torch.zeros(6, 3), "encoder.layer_norm.gamma": torch.ones(3)}
    with pytest.raises(CheckpointMismatch, match="share_embedding"):
        load_tensors(tied_model(), tensors)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("embedding.word_embedding.weight", "embedding.word.embedding.weight"),
        ("embedding.position_embedding.weight", "embedding.pos.embedding.weight"),
        ("embedding.segment_embedding.weight", "embedding.seg.embedding.weight"),
        ("embedding.pe", None),
        ("embedding.sinusoidalpos.pe", None),
        (
            "target.decoder.transformer_decoder.0.layer_norm_1.weight",
            "decoder.transformer_decoder.0.layer_norm_1.weight",
        ),
        ("target.embedding.word_embedding.weight", "tgt_embedding.word.embedding.weight"),
        ("target.embedding.position_embedding.weight", "tgt_embedding.pos.embedding.weight"),
        ("target.embedding.layer_norm.gamma", "tgt_embedding.layer_norm.gamma"),
        ("target.embedding.pe", None),
        ("target.mlm_linear_1.weight", "target.mlm.linear_1.weight"),
        ("target.mlm_linear_2.bias", "target.mlm.linear_2.bias"),
        ("target.layer_norm.gamma", "target.mlm.layer_norm.gamma"),
        ("target.sp_linear_1.weight", "target.sp.linear_1.weight"),
        ("target.nsp_linear_2.bias", "target.sp.linear_2.bias"),
        ("target.sop_linear_2.weight", "target.sp.linear_2.weight"),
        ("target.output_layer.weight", "target.lm.output_layer.weight"),
        ("target.linear_1.weight", "target.mlm.linear_1.weight"),
        ("target.linear_2.bias", "target.mlm.linear_2.bias"),
        ("embedding.embedding_0.word.embedding.weight", "embedding.dual.embedding_0.word.embedding.weight"),
        ("embedding.embedding_1.word_embedding.weight", "embedding.dual.embedding_1.word.embedding.weight"),
        (f"encoder.transformer.0.{BIAS}", f"encoder.{BIAS}"),
        ("encoder.layer_norm.gamma", "encoder.layer_norm.gamma"),
        ("target.mlm.linear_1.weight", "target.mlm.linear_1.weight"),
        ("output_layer_1.weight", "output_layer_1.weight"),
    ],
)
def test_migration_table(old: str, new: str | None) -> None:
    found = migrate([old])
    assert dict(found.sources) == ({} if new is None else {new: old})
    assert (old in found.dropped) == (new is None)
    assert dict(found.renamed) == ({old: new} if new not in (None, old) else {})


def test_names_the_model_knows_are_never_migrated() -> None:
    known = {"target.linear_1.weight", "embedding.word.embedding.weight"}
    assert migrate(["target.linear_1.weight"], known).sources == {"target.linear_1.weight": "target.linear_1.weight"}


def test_prompt_aliases_beside_the_current_names_are_not_read_twice() -> None:
    found = migrate(["target.linear_1.weight", "target.mlm.linear_1.weight"])
    assert found.sources == {"target.mlm.linear_1.weight": "target.mlm.linear_1.weight"}
    assert "target.linear_1.weight" in found.dropped


def test_old_file_loads_and_reports_its_names() -> None:
    model = Named(SHAPES)
    old = {"embedding.word_embedding.weight": torch.randn(6, 3), "encoder.layer_norm.gamma": torch.ones(3),
           "target.output_layer.weight": torch.randn(6, 3), "embedding.pe": torch.ones(9)}  # fmt: skip
    report = load_tensors(model, old)
    assert torch.equal(model.get_parameter(WORD), old["embedding.word_embedding.weight"])
    assert report.migrated["target.output_layer.weight"] == HEAD
    assert "computed" in report.migrated["embedding.pe"]
    assert "3 older names" in report.text()


@pytest.mark.parametrize("forms", ["block", "encoder", "both", "shared"])
def test_t5_position_bias_forms(forms: str) -> None:
    model = Named({**SHAPES, f"encoder.{BIAS}": (4, 2)})
    block, encoder = torch.ones(4, 2), torch.full((4, 2), 2.0)
    tensors = values(SHAPES)
    if forms in ("block", "both"):
        tensors |= {f"encoder.transformer.{layer}.{BIAS}": block for layer in (1, 0, 10)}
    if forms == "shared":
        tensors |= {f"encoder.transformer.{BIAS}": block}
    if forms in ("encoder", "both"):
        tensors |= {f"encoder.{BIAS}": encoder}
    report = load_tensors(model, tensors)
    assert torch.equal(model.get_parameter(f"encoder.{BIAS}"), encoder if forms == "encoder" else block)
    assert report.unexpected == report.missing == ()
