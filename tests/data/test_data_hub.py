import re
import time
import zlib

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightsparse.data import hub
from lightsparse.data.hub import HubData
from lightsparse.data.prepare import prepare
from lightsparse.data.shards import complete_shards
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


# ---- a mirror of a hub data set: card with two subsets, several parquet files and splits each ---------------------

CARD = """---
license: cc0-1.0
configs:
- config_name: books
  default: true
  data_files:
  - {split: train, path: books/train-*.parquet}
  - {split: validation, path: books/validation-*.parquet}
- config_name: papers
  data_files:
  - {split: train, path: papers/*.parquet}
---
# A mirror
"""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mirror"
    for subset, split, part, column in [
        ("books", "train", 0, "text"), ("books", "train", 1, "text"), ("books", "train", 2, "text"),
        ("books", "validation", 0, "text"), ("papers", "train", 0, "TEXT"),
    ]:  # fmt: skip
        texts = [f"{subset} {split} {part}.{row} " + "word " * (7 * row + part) for row in range(5)]
        table = pa.table({column: [*texts, None], "url": ["u"] * 6})
        (folder / subset).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / subset / f"{split}-{part:05}.parquet", row_group_size=2)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_a_mirror_is_read_as_its_card_says(mirror, streaming):
    documents = list(HubData(name=str(mirror), val_split="validation", streaming=streaming).documents())
    assert [document.name for document in documents] == [
        *(f"train:{row}" for row in range(18)), *(f"validation:{row}" for row in range(6)),
    ]  # fmt: skip
    assert [document.text.partition(" word")[0].strip() for document in documents if document.text] == [
        *(f"books train {part}.{row}" for part in range(3) for row in range(5)),
        *(f"books validation 0.{row}" for row in range(5)),
    ]
    papers = list(HubData(name=str(mirror), config="papers", column="TEXT", streaming=streaming).documents())
    assert len(papers) == 6 and papers[0].text.startswith("papers train 0.0")


def test_streamed_and_downloaded_give_the_same_samples(mirror):
    fields = {"name": str(mirror), "val_split": "validation", "context": 33}
    one, other = (HubData(**fields, streaming=streaming).samples(0, 10**6) for streaming in (True, False))
    assert one.manifest == other.manifest and len(one.train) > 20


@pytest.mark.parametrize("killed_after", [1, 8, 14, 17])
def test_an_interrupted_preparation_of_a_stream_continues_without_loss_or_repetition(mirror, tmp_path, killed_after):
    data = HubData(name=str(mirror), val_split="validation", max_characters=None)
    prepare(data, tmp_path / "one", shard_tokens=300)
    left, encoded = killed_after, 0

    def killing(text_bytes, _):
        nonlocal left, encoded
        encoded += text_bytes
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "killed", shard_tokens=300, report=killing)
    kept = sum(shard.text_bytes for shard in complete_shards(tmp_path / "killed"))
    encoded = 0
    manifest, _ = prepare(data, tmp_path / "killed", shard_tokens=300, report=killing)
    assert encoded == manifest.text_bytes - kept  # what is complete is not encoded again
    for path in (tmp_path / "one").glob("[sm]*"):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_another_state_of_the_mirror_is_not_continued(mirror, tmp_path):
    prepare(HubData(name=str(mirror)), tmp_path / "out")
    (mirror / "books" / "train-00003.parquet").write_bytes((mirror / "books" / "train-00000.parquet").read_bytes())
    with pytest.raises(DataError, match="begun with another source"):
        prepare(HubData(name=str(mirror)), tmp_path / "out")


def test_a_subset_the_card_does_not_have_is_answered_with_those_it_has(mirror):
    with pytest.raises(DataError, match=r"cannot be loaded: [^\n]*'books', 'papers'"):
        list(HubData(name=str(mirror), config="articles").documents())


def test_a_damaged_file_is_said_with_the_row_before_it(mirror):
    (mirror / "books" / "train-00001.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match=r"split 'train', cannot be read beyond row 6: [^\n]+$"):
        list(HubData(name=str(mirror)).documents())


def test_a_local_folder_has_no_revisions(mirror):
    with pytest.raises(ValueError, match=r"data.revision is 'v1', but .* is a local folder"):
        HubData(name=str(mirror), revision="v1")


@pytest.mark.parametrize(
    "split, val_split",
    [
        ("train+validation", "validation"),
        ("all", "train"),
        ("train", "all"),
        ("all", "all"),
        ("train", "validation + train"),
    ],
)
def test_splits_that_are_sums_of_one_another_are_refused_before_anything_is_read(split, val_split):
    with pytest.raises(ValueError, match=r"data.split and data.val_split are both '(train|validation|all)'[^\n]*$"):
        HubData(name="some/set", split=split, val_split=val_split)


@pytest.mark.parametrize(
    "split, val_split, apart",
    [
        ("train[:80%]", "train[80%:]", True),
        ("train[:13]", "train[13:]+validation", True),
        ("train", "train[:5%]", False),
        ("train[:13]", "train[12:]", False),
        ("train+validation[:1]", "validation[1:]", True),
        ("train+validation[:2]", "validation[-5:]", False),
    ],
)
def test_slices_may_not_share_a_row(mirror, split, val_split, apart):
    data = HubData(name=str(mirror), split=split, val_split=val_split, streaming=False)
    if not apart:
        with pytest.raises(DataError, match=rf"are both '\w+' \({re.escape(f'{split} and {val_split}')}\); validation"):
            list(data.documents())
        return
    documents = list(data.documents())
    rows = [[d.text for d in documents if d.text and d.validation is held_out] for held_out in (False, True)]
    assert rows[0] and rows[1] and not set(rows[0]) & set(rows[1])


@pytest.mark.parametrize("way", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_that_counts_twice_is_named(mirror, way, split):
    other = mirror / "books" / f"{split}-00009.parquet"
    getattr(other, way)(mirror / "books" / "validation-00000.parquet")
    data = HubData(name=str(mirror), val_split="validation")
    with pytest.raises(
        DataError, match=rf"has one file as [^\n]*{split}-0000[^\n]* validation text must not be trained"
    ):
        list(data.documents())


def test_a_folder_that_links_to_itself_is_read_once(mirror):
    before = [document.text for document in HubData(name=str(mirror)).documents()]
    (mirror / "books" / "self").symlink_to(mirror)
    data = HubData(name=str(mirror))
    assert [document.text for document in data.documents()] == before and data.identity() == data.identity()


@pytest.mark.parametrize("streaming", [True, False])
def test_an_empty_row_group_at_the_beginning_hides_nothing(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    schema = pa.schema([("text", pa.string())])
    (tmp_path / "set").mkdir()
    with pq.ParquetWriter(tmp_path / "set" / "train.parquet", schema) as writer:
        for group in ([], ["a", "b"], [], ["c"]):
            writer.write_table(pa.table({"text": group}, schema))
    documents = HubData(name=str(tmp_path / "set"), streaming=streaming).documents()
    assert [document.text for document in documents] == ["a", "b", "c"]


@pytest.mark.parametrize("error", [OSError("connection reset"), zlib.error("bad block"), RuntimeError("of a library")])
def test_whatever_a_reader_raises_is_said_with_the_row_before_it(snapshot, monkeypatch, error):
    def rows():
        yield {"text": "one"}
        raise error

    monkeypatch.setattr(HubData, "_rows", lambda self: {"train": rows()})
    with pytest.raises(DataError, match=rf"split 'train', cannot be read beyond row 1: {error}$"):
        list(HubData(name=snapshot).documents())


def test_a_folder_and_a_link_to_it_are_one_data_set(snapshot, tmp_path):
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    given, linked = HubData(name=snapshot), HubData(name=str(tmp_path / "link"))
    assert given.held_out_by() == linked.held_out_by()
