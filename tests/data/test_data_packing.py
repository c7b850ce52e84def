import numpy as np
import pytest
import torch

from lightsparse.data.packing import EvaluationSamples, PackedSamples
from lightsparse.data.source import IGNORED

BOS = 254


def stream_of(lengths):
    """bos + distinct bytes per document."""
    rng = np.random.default_rng(0)
    return np.concatenate([np.r_[BOS, rng.integers(0, 200, length)] for length in lengths]).astype(np.uint8)


def reference(stream, start, context, isolate):
    """One token at a time, as the definition reads."""
    tokens, labels, documents, positions = [], [], [], []
    document, position = 0, 0
    for offset in range(context):
        token = int(stream[start + offset])
        if isolate and token == BOS and offset > 0:
            document, position = document + 1, 0
        tokens.append(token)
        labels.append(int(stream[start + offset + 1]))
        documents.append(document)
        positions.append(position)
        position += 1
    return {"tokens": tokens, "labels": labels, "documents": documents, "positions": positions}


LENGTHS = {"many": [1, 2, 30, 3, 7, 1, 1, 64, 5], "one": [113], "aligned": [15, 15, 15, 15], "ones": [1] * 40}


@pytest.mark.parametrize("isolate", [True, False], ids=["isolate", "concat"])
@pytest.mark.parametrize("context", [1, 7, 16, 63])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_samples_equal_the_token_by_token_reference(lengths, context, isolate):
    stream = stream_of(LENGTHS[lengths])
    samples = PackedSamples(stream, context, BOS, isolate)
    for i in range(len(samples)):
        expected = reference(stream, i * context, context, isolate)
        assert {key: samples[i][key].tolist() for key in expected} == expected
        assert samples[i]["documents"].dtype == torch.int32
        assert all(samples[i][key].dtype == torch.int64 for key in ("tokens", "labels", "positions", "sample_ids"))


@pytest.mark.parametrize("context", [1, 7, 16, 63])
def test_every_token_but_a_short_rest_is_trained_on_once(context):
    stream = stream_of(LENGTHS["many"])
    samples = PackedSamples(stream, context, BOS, True)
    labels = np.concatenate([samples[i]["labels"] for i in range(len(samples))])
    assert len(stream) - 1 - context < len(labels) <= len(stream) - 1
    assert np.array_equal(labels, stream[1 : 1 + len(labels)])


def test_a_token_never_shares_its_document_id_with_another_document():
    stream = stream_of(LENGTHS["many"])
    true_document = np.cumsum(stream == BOS)
    samples = PackedSamples(stream, 31, BOS, True)
    for i in range(len(samples)):
        here = true_document[i * 31 : i * 31 + 31]
        ids = samples[i]["documents"].numpy()
        assert np.array_equal(ids[:, None] == ids, here[:, None] == here)


def test_the_last_token_of_a_document_is_asked_for_its_end():
    samples = PackedSamples(stream_of([3, 3, 9]), 8, BOS, True)
    assert samples[0]["labels"][3] == BOS


def test_editing_the_labels_in_place_leaves_the_tokens_alone():
    sample = PackedSamples(stream_of([50]), 16, BOS, True)[0]
    before = sample["tokens"].clone()
    sample["labels"].fill_(IGNORED)
    assert torch.equal(sample["tokens"], before)


def test_sample_ids_of_a_later_epoch_give_the_same_tokens():
    samples = PackedSamples(stream_of(LENGTHS["many"]), 16, BOS, True)
    later = 5 * len(samples) + 2
    assert torch.equal(samples[later]["tokens"], samples[2]["tokens"])
    assert samples[later]["sample_ids"] == later


@pytest.mark.parametrize("limit", [1, 5, 16, 17, 40, 119, 120, 10_000])
@pytest.mark.parametrize("context", [1, 7, 16, 63])
def test_evaluation_counts_each_of_the_first_tokens_once_whatever_the_context(context, limit):
    stream = stream_of(LENGTHS["many"])
    samples = EvaluationSamples(stream, context, BOS, True, limit=limit)
    counted = []
    for i in range(len(samples)):
        labels = samples[i]["labels"]
        assert labels.shape == (context,)
        counted += labels[labels != IGNORED].tolist()
    assert counted == stream[1 : 1 + min(limit, len(stream) - 1)].tolist()


def test_evaluation_samples_equal_the_reference_where_they_count():
    stream = stream_of(LENGTHS["many"])
    samples = EvaluationSamples(stream, 50, BOS, True, limit=110)
    starts = [0, 50, 60]  # the last one is moved back to end at the limit
    for i, start in enumerate(starts):
        expected = reference(stream, start, 50, isolate=True)
        counts = samples[i]["labels"] != IGNORED
        assert samples[i]["tokens"].tolist() == expected["tokens"]
        assert samples[i]["documents"].tolist() == expected["documents"]
        assert samples[i]["labels"][counts].tolist() == torch.tensor(expected["labels"])[counts].tolist()


def test_evaluation_past_the_end_counts_nothing():
    samples = EvaluationSamples(stream_of(LENGTHS["many"]), 16, BOS, False, limit=33)
    assert (samples[len(samples)]["labels"] == IGNORED).all()
    assert samples[len(samples)]["tokens"].shape == (16,)
