"""Planned samples: nothing lost or doubled, padding that nobody sees, no cut where best fit promises none."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lightsparse.data.corpus import DocumentStream
from lightsparse.data.encoding import ENTRY
from lightsparse.data.files import FilesData
from lightsparse.data.packing_plan import PlannedSamples, best_fit_plan, sequential_plan
from lightsparse.data.source import IGNORED

BOS = 254
LENGTHS = {
    "many": [1, 2, 30, 3, 7, 1, 1, 64, 5, 100, 16, 15, 17],
    "fitting": [16, 16, 8, 8],
    "long": [113],
    "ones": [1] * 40,
}
PLANS = {"sequential": sequential_plan, "best_fit": best_fit_plan}


def stream_of(lengths):
    rng = np.random.default_rng(0)
    documents = [np.r_[BOS, rng.integers(0, 200, length - 1)].astype(np.uint8) for length in lengths]
    entries = np.zeros(len(lengths), dtype=ENTRY)
    entries["tokens"] = lengths
    entries["start"] = np.cumsum([0, *lengths[:-1]])
    return DocumentStream(np.concatenate(documents), entries), documents


def reference(documents, start_of, context):
    """A sample token by token, from the place of each of its segments: (tokens, labels, documents, positions)."""
    tokens, labels = [BOS] * context, [IGNORED] * context
    owner = [None] * context
    for place, (document, offset, length) in start_of.items():
        for i in range(length):
            text = documents[document]
            tokens[place + i] = int(text[offset + i])
            labels[place + i] = int(text[offset + i + 1]) if offset + i + 1 < len(text) else BOS
            owner[place + i] = (document, place)
    ids, positions = [], []
    for i in range(context):
        new = i == 0 or owner[i] != owner[i - 1]
        ids.append(0 if i == 0 else ids[-1] + new)
        positions.append(0 if new else positions[-1] + 1)
    return {"tokens": tokens, "labels": labels, "documents": ids, "positions": positions}


@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("context", [8, 16, 64])
@pytest.mark.parametrize("order", PLANS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_is_in_one_sample_where_the_plan_says(lengths, order, context, align):
    stream, documents = stream_of(LENGTHS[lengths])
    plan = PLANS[order](stream.lengths, context, align)
    samples = PlannedSamples(stream, plan, context, BOS)
    seen = [np.zeros(len(document), dtype=int) for document in documents]
    for i in range(len(samples)):
        segments = {}
        for s in range(plan.first[i], plan.first[i + 1]):
            segments[int(plan.place[s])] = (int(plan.document[s]), int(plan.offset[s]), int(plan.length[s]))
            seen[plan.document[s]][plan.offset[s] : plan.offset[s] + plan.length[s]] += 1
            assert plan.place[s] % align == 0
        spans = sorted((place, place + length) for place, (_, _, length) in segments.items())
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
        assert spans[-1][1] <= context
        expected = reference(documents, segments, context)
        assert {key: samples[i][key].tolist() for key in expected} == expected
        assert samples[i]["documents"].dtype == torch.int32
    assert all((times == 1).all() for times in seen)


@pytest.mark.parametrize("context", [16, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_best_fit_cuts_no_document_that_fits(lengths, context):
    plan = best_fit_plan(np.array(LENGTHS[lengths]), context, 1)
    parts = np.bincount(plan.document)
    assert parts.tolist() == [-(-length // context) for length in LENGTHS[lengths]]


def test_best_fit_fills_what_sequential_order_would_cut():
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    plan = best_fit_plan(lengths, 128, 1)
    assert plan.tokens == lengths.sum() and plan.tokens / (len(plan) * 128) > 0.98


def test_best_fit_takes_the_fullest_sample_that_still_has_room():
    plan = best_fit_plan(np.array([10, 7, 6, 4, 3]), 16, 1)  # 10 + 6 and 7 + 4 + 3
    assert [plan.document[plan.first[i] : plan.first[i + 1]].tolist() for i in range(len(plan))] == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("limit", [1, 16, 17, 100, 10_000])
def test_evaluation_counts_the_first_labels_once_and_nothing_past_them(limit):
    stream, _ = stream_of(LENGTHS["many"])
    plan = sequential_plan(stream.lengths, 16, 4)
    everything, limited = (PlannedSamples(stream, plan, 16, BOS, limit=each) for each in (10**9, limit))

    def counted(samples):
        labels = torch.cat([samples[i]["labels"] for i in range(len(samples))])
        return labels[labels != IGNORED].tolist()

    assert counted(limited) == counted(everything)[:limit]
    assert (limited[len(limited)]["labels"] == IGNORED).all() and (limited[len(limited) + 7]["labels"] == IGNORED).all()


@pytest.mark.parametrize("fields", [{"order": "best_fit"}, {"align": 8}, {"order": "best_fit", "align": 8}], ids=str)
def test_the_config_packs_so_and_says_how_full(tmp_path, caplog, fields):
    caplog.set_level("INFO", logger="lightsparse.data")
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("x" * (3 * i + 1))
    samples = FilesData(path=str(tmp_path), context=64, val_fraction=0.3, **fields).samples(0, 100)
    plain = FilesData(path=str(tmp_path), context=64, val_fraction=0.3).samples(0, 100)
    assert "fill rate" in caplog.text and samples.manifest != plain.manifest
    labels = torch.cat([samples.train[i]["labels"] for i in range(len(samples.train))])
    assert (labels != IGNORED).sum() == samples.train_tokens
    assert samples.train[len(samples.train) + 1]["sample_ids"] == len(samples.train) + 1


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"order": "random"}, "data.order is 'random'"),
        ({"align": 0}, "data.align is 0"),
        ({"align": 3, "context": 64}, "data.align is 3; it counts tokens and must divide data.context=64"),
        ({"order": "best_fit", "pack": "concat"}, "data.pack is concat"),
        ({"align": 4, "context": 64, "pack": "concat"}, "data.pack is concat"),
        ({"min_tokens": -1}, "data.min_tokens is -1"),
        ({"min_tokens": 10, "max_tokens": 9}, "data.max_tokens is 9; .* at least 10"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path, fields, sentence):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=sentence):
        FilesData(path=str(tmp_path), **fields)


def test_length_filters_leave_out_and_count(tmp_path, caplog):
    caplog.set_level("INFO", logger="lightsparse.data")
    for i in range(1, 41):
        (tmp_path / f"{i}.txt").write_text("x" * i)
    samples = FilesData(path=str(tmp_path), context=8, val_fraction=0.3, min_tokens=11, max_tokens=30).samples(0, 100)
    lengths = [*samples.train.stream.lengths, *samples.val.stream.lengths]
    assert sorted(lengths) == [1 + n for n in range(11, 31)]
    assert "20 of other lengths left out" in caplog.text
