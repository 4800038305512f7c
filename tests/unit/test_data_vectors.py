"""Batches that the interface specification gives as examples."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import make_processor, make_store, tokenizer_of

from tencentpretrain.config.data import DataConfig
from tencentpretrain.data.arrays import (
    IGNORE,
    causal_arrays,
    labelled_arrays,
    prefix_arrays,
    prompt_arrays,
    translation_arrays,
)
from tencentpretrain.data.batch import IGNORE_LABEL
from tencentpretrain.data.chunks import LONGEST_DOCUMENT, cut_long_documents
from tencentpretrain.data.examples import LabelledExample, PairExample, PrefixExample, WindowExample
from tencentpretrain.data.processors.t5 import T5Processor


def ids(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def test_both_names_of_the_ignored_label_agree() -> None:
    assert IGNORE == IGNORE_LABEL


@pytest.mark.parametrize(("old", "last"), [(True, 0), (False, IGNORE)])
def test_lm(old: bool, last: int) -> None:
    arrays = causal_arrays([WindowExample(token_ids=ids(2, 5, 6, 3))], seq_length=6, pad_id=0, loss_on_final_pad=old)
    assert arrays.token_ids.tolist() == [[2, 5, 6, 3, 0, 0]]
    assert arrays.labels["lm"].tolist() == [[5, 6, 3, last, 0, 0]]
    assert arrays.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_a_full_window_counts_everywhere() -> None:
    arrays = causal_arrays([WindowExample(token_ids=ids(2, 5, 6, 3))], seq_length=3, pad_id=0, loss_on_final_pad=False)
    assert arrays.labels["lm"].tolist() == [[5, 6, 3]]


@pytest.mark.parametrize(("old", "last"), [(True, 0), (False, IGNORE)])
def test_mt(old: bool, last: int) -> None:
    example = PairExample(source_ids=ids(2, 9, 3), target_ids=ids(2, 7, 8, 3))
    arrays = translation_arrays([example], seq_length=5, tgt_length=6, pad_id=0, tgt_pad_id=0, loss_on_final_pad=old)
    assert arrays.labels["lm"].tolist() == [[7, 8, 3, last, 0, 0]]
    assert arrays.decoder_token_ids is not None
    assert arrays.decoder_token_ids.tolist() == [[2, 7, 8, 3, 0, 0]]
    assert arrays.decoder_segment_ids is not None
    assert arrays.decoder_segment_ids.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_t5(tmp_path: Path) -> None:
    folder = tmp_path
    processor = T5Processor(
        DataConfig(data_processor="t5", seq_length=10, loss_on_final_pad=True), tokenizer_of(folder)()
    )
    processor.first_sentinel = 20
    instance = (([2, 5, 4, 4, 8, 4, 9, 3], 2), [(2, 6), (3, 7), (5, 10)], [8])
    example = processor.decode_instance(instance, np.random.default_rng(0))
    arrays = processor.arrays([example])
    assert arrays.token_ids.tolist() == [[2, 5, 20, 8, 21, 9, 3, 0, 0, 0]]
    assert arrays.labels["lm"].tolist() == [[20, 6, 7, 21, 10, 22, 3, 0]]
    assert arrays.decoder_token_ids is not None
    assert arrays.decoder_token_ids.tolist() == [[2, 20, 6, 7, 21, 10, 22, 3]]
    assert arrays.decoder_segment_ids is not None
    assert arrays.decoder_segment_ids.tolist() == [[1] * 8]
    # The specification's example keeps the length before merging, eight; the stated correction is the merged one.
    assert arrays.segment_ids.tolist() == [[1] * 7 + [0] * 3]


def test_t5_stops_corrupting_when_sentinels_run_out(tmp_path: Path) -> None:
    processor = make_processor(tmp_path, "t5", seq_length=60)
    assert isinstance(processor, T5Processor)
    tokens = np.arange(5, 55)
    positions = np.arange(0, 50, 2)
    example = processor.replace_runs(tokens, positions, tokens[positions])
    used = example.target_ids[example.target_ids >= processor.first_sentinel]
    assert used.tolist() == list(range(processor.first_sentinel, processor.first_sentinel + processor.num_sentinels))
    assert processor.encode_instance(example)[0][0] == tokens.tolist()


def test_llm_sft() -> None:
    example = PrefixExample(token_ids=ids(2, 5, 6, 7, 8, 3), prefix_length=3)
    arrays = prompt_arrays([example], seq_length=8, pad_id=0)
    assert arrays.token_ids.tolist() == [[2, 5, 6, 7, 8, 3, 0]]
    assert arrays.labels["lm"].tolist() == [[5, 6, 7, 8, 3, 0, 0]]
    assert arrays.segment_ids.tolist() == [[1, 1, 2, 2, 2, 0, 0]]


def test_prefixlm() -> None:
    example = PrefixExample(token_ids=ids(2, 5, 6, 3, 7, 8, 3), prefix_length=4)
    arrays = prefix_arrays([example], seq_length=10, pad_id=0)
    labels = arrays.labels["lm"]
    assert np.maximum(labels, 0).tolist() == [[0, 0, 0, 7, 8, 3, 0, 0, 0, 0]]
    assert (labels != IGNORE).sum() == 3
    assert arrays.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]]


def test_cls_pair() -> None:
    example = LabelledExample(token_ids=ids(2, 5, 3, 6, 3), lengths=(3, 2), label=1)
    assert labelled_arrays([example], seq_length=5, pad_id=0).segment_ids.tolist() == [[1, 1, 1, 2, 2]]


@pytest.mark.parametrize(("strategy", "taken"), [("lead", [0, 1]), ("principal", [1, 3])], ids=["lead", "principal"])
def test_gap_sentences(tmp_path: Path, strategy: str, taken: list[int]) -> None:
    # Round(0.3 * 5) = 2 sentences are taken out; "principal" takes those that share most with the others.
    store = make_store(tmp_path, "gsg", "w0 w1\nw0 w1 w5\nw8 w0 w5 w8\nw9 w5 w0 w1\nw10\n")
    processor = make_processor(tmp_path, "gsg", seq_length=40, tgt_seq_length=40, sentence_selection_strategy=strategy)
    plan = processor.plan(store, 0)
    assert len(plan) == 1
    assert np.flatnonzero(plan.selected).tolist() == taken
    example = processor.sample(store, plan, 0, np.random.default_rng(0))
    assert (example.source_ids == 4).sum() == 2
    assert example.target_ids.tolist() == [2, *(t for index in taken for t in store.segment(index).tolist()), 3]


def test_bart_keeps_the_tokens_and_infills(tmp_path: Path) -> None:
    store = make_store(tmp_path, "bart")
    for infilling in (False, True):
        processor = make_processor(tmp_path, "bart", text_infilling=infilling)
        plan = processor.plan(store, 0)
        for index in range(len(plan)):
            example = processor.sample(store, plan, index, np.random.default_rng(index))
            assert len(example.target_ids) <= 24
            assert example.source_ids[0] == 2
            assert example.source_ids[-1] == 3
            assert len(example.source_ids) <= 24


def test_a_processor_can_be_sent_to_a_process(tmp_path: Path) -> None:
    processor = make_processor(tmp_path, "bert", whole_word_masking=True)
    assert pickle.loads(pickle.dumps(processor)).data == processor.data


def test_a_corpus_without_blank_lines_is_planned_in_parts(tmp_path: Path) -> None:
    store = make_store(tmp_path, "bert", "w1 w2 w3\n" * 10_000)
    assert len(store) == 1
    for name in ("bert", "albert", "bart", "gsg"):
        processor = make_processor(tmp_path, name, short_seq_prob=0.0)
        plan = processor.plan(store, 0)
        assert len(plan) > 500
    assert cut_long_documents(np.array([0, 2, 2 + 2 * LONGEST_DOCUMENT, 2 + 3 * LONGEST_DOCUMENT + 1])).tolist() == [
        *(0, 2, 2 + LONGEST_DOCUMENT, 2 + 2 * LONGEST_DOCUMENT, 2 + 3 * LONGEST_DOCUMENT),
        2 + 3 * LONGEST_DOCUMENT + 1,
    ]


def test_chunks_of_a_document_cover_it_once(tmp_path: Path) -> None:
    store = make_store(tmp_path, "albert")
    plan = make_processor(tmp_path, "albert").plan(store, 0)
    for document in range(len(store)):
        rows = np.flatnonzero(plan.document == document)
        covered = [sentence for row in rows for sentence in range(plan.a_begin[row], plan.b_end[row])]
        assert covered == list(range(*store.record_offsets[document : document + 2]))


def test_next_sentences_follow_or_come_from_elsewhere(tmp_path: Path) -> None:
    store = make_store(tmp_path, "bert")
    processor = make_processor(tmp_path, "bert", docs_buffer_size=4)
    plan = processor.plan(store, 0)
    owner = np.repeat(np.arange(len(store)), np.diff(store.record_offsets))
    assert np.array_equal(plan.b_begin[~plan.label], plan.a_end[~plan.label])
    assert (owner[plan.b_begin[plan.label]] != plan.document[plan.label]).all()
    assert np.array_equal(owner[plan.b_begin] // 4, plan.document // 4)
    assert (plan.b_end > plan.b_begin).all()
    assert 0.3 < plan.label.mean() < 0.9
    assert not np.array_equal(plan.a_end, processor.plan(store, 1).a_end)
    assert np.array_equal(plan.a_end, processor.plan(store, 2).a_end)
