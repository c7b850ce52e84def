import time

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightsparse.data import hub
from lightsparse.data.hub import HubData
from lightsparse.data.source import DataError


@pytest.fixture
def snapshot(tmp_path):
    """A data set in the hub's layout: two splits of parquet files."""
    for split, count in (("train", 4), ("validation", 2)):
        table = pa.table({"text": [f"{split} {i}" for i in range(count)], "url": ["u"] * count})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    return str(tmp_path)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_a_split_are_documents(snapshot, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = list(HubData(name=snapshot, streaming=streaming).documents())
    assert [(d.name, d.text, d.validation) for d in documents] == [(f"train:{i}", f"train {i}", None) for i in range(4)]


def test_a_validation_split_decides_the_split(snapshot):
    documents = HubData(name=snapshot, val_split="validation").documents()
    assert [(d.name, d.validation) for d in documents] == [
        *((f"train:{i}", False) for i in range(4)),
        *((f"validation:{i}", True) for i in range(2)),
    ]


def test_reading_stops_at_the_bound_of_each_split(snapshot):
    documents = HubData(name=snapshot, val_split="validation", max_characters=len("train 0") + 1).documents()
    assert [d.name for d in documents] == ["train:0", "train:1", "validation:0"]


def test_a_streamed_set_is_read_no_further_than_the_bound(monkeypatch):
    seen = []

    def endless(*_, **__):
        while True:
            seen.append(len(seen))
            yield {"text": "word"}

    monkeypatch.setattr(hub, "check_reachable", lambda *_: None)
    monkeypatch.setattr(hub, "load_dataset", endless)
    assert len(list(HubData(name="some/set", max_characters=40).documents())) == len(seen) == 10


def test_the_hub_is_asked_for_exactly_what_the_config_names(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "check_reachable", lambda name, revision: asked.append((name, revision)))
    monkeypatch.setattr(hub, "load_dataset", lambda *args, **fields: asked.append((args, fields)) or [{"TEXT": "t"}])
    list(HubData(name="o/set", config="en", revision="r1", split="train", column="TEXT").documents())
    assert asked == [("o/set", "r1"), (("o/set", "en"), {"split": "train", "revision": "r1", "streaming": True})]


def test_an_unknown_split_or_column_is_answered_in_one_sentence(snapshot):
    with pytest.raises(DataError, match=r"split 'trian', cannot be loaded: [^\n]*$"):
        list(HubData(name=snapshot, split="trian").documents())
    with pytest.raises(DataError, match=r"data.column is 'TEXT' but .* has the columns text, url"):
        list(HubData(name=snapshot, column="TEXT").documents())


def test_offline_mode_says_at_once_what_works_without_the_hub(offline):
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"not reachable for data set 'emozilla/pg19' [^\n]*data=stdlib, data=files"):
        list(HubData(name="emozilla/pg19").documents())
    assert time.perf_counter() - start < 1.0


def test_offline_mode_leaves_the_cache_readable(offline, monkeypatch):
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: [{"text": "cached"}])
    assert [d.text for d in HubData(name="emozilla/pg19", streaming=False).documents()] == ["cached"]


def test_without_a_network_nothing_is_retried(monkeypatch):
    def no_route(*_, timeout, **__):
        assert timeout <= 5
        raise Exception("Name or service not known")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_route)
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: pytest.fail("asked an unreachable hub"))
    with pytest.raises(DataError, match=r"not reachable .*Name or service not known.*data=stdlib"):
        list(HubData(name="emozilla/pg19").documents())


def test_a_name_no_data_set_can_have_is_not_called_unreachable(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="'a/b/c', revision main, cannot be read"):
        list(HubData(name="a/b/c").documents())


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({}, "data.name is empty"),
        ({"name": "a/b", "max_characters": 0}, "data.max_characters is 0"),
        ({"name": "a/b", "val_split": "train"}, "data.split and data.val_split are both 'train'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        HubData(**fields)
