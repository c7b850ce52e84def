import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightsparse.data.files import FilesData, matching_files
from lightsparse.data.source import DataError


def texts(config):
    return {document.name: document.text for document in config.documents()}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, awkward names included."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("één\r\n".encode())
    (tmp_path / "sub" / "b[1]*.md").write_text("two")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".hidden").write_text("never")
    write_jsonl(tmp_path / "rows[2].jsonl", [{"text": "j0", "n": 1}, {"text": None}, {"text": "日本"}])
    write_jsonl(tmp_path / "more.jsonl", [{"text": "other columns", "extra": [1]}])
    pq.write_table(pa.table({"id": [1, 2], "text": ["p0", "p1"]}), tmp_path / "sub" / "t.parquet")
    return tmp_path


def test_a_folder_gives_files_and_rows_as_documents(folder):
    assert texts(FilesData(path=str(folder))) == {
        "a.txt": "één\r\n",
        "more.jsonl:0": "other columns",
        "rows[2].jsonl:0": "j0",
        "rows[2].jsonl:1": "",
        "rows[2].jsonl:2": "日本",
        "sub/b[1]*.md": "two",
        "sub/t.parquet:0": "p0",
        "sub/t.parquet:1": "p1",
    }


def test_names_do_not_depend_on_where_the_folder_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert (
        texts(FilesData(path=folder.name))
        == texts(FilesData(path=f"{folder}/"))
        == texts(FilesData(path=f"{folder}/**"))
    )


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a.txt", ["a.txt"]),
        ("*.txt", ["a.txt"]),
        ("**/*.md", ["sub/b[1]*.md"]),
        ("sub/b[1]*.md", ["b[1]*.md"]),
        ("sub/*", ["b[1]*.md", "t.parquet"]),
        ("nothing", []),
        ("nowhere/*.txt", []),
    ],
)
def test_a_path_stands_for_the_files_a_shell_would_give(folder, pattern, names):
    assert list(matching_files(f"{folder}/{pattern}")) == names


def test_another_column_is_read_by_name(tmp_path):
    pq.write_table(pa.table({"TEXT": ["book"], "text": ["no"]}), tmp_path / "g.parquet")
    assert texts(FilesData(path=str(tmp_path), column="TEXT")) == {"g.parquet:0": "book"}


def test_a_validation_path_decides_the_split(folder):
    held_out = {
        document.name: document.validation
        for document in FilesData(path=f"{folder}/*.txt", val_path=f"{folder}/sub/*.md").documents()
    }
    assert held_out == {"a.txt": False, "b[1]*.md": True}
    assert all(document.validation is None for document in FilesData(path=f"{folder}/*.txt").documents())


def test_a_file_may_not_be_trained_on_and_held_out(folder):
    with pytest.raises(ValueError, match=r"data.path and data.val_path share 2 files such as .*sub"):
        FilesData(path=str(folder), val_path=f"{folder}/sub")


@pytest.mark.parametrize(
    "fields", [{}, {"path": "nowhere"}, {"path": "*.nothing"}, {"path": "a.txt", "val_path": "gone/"}]
)
def test_a_path_without_files_is_refused_before_anything_is_read(folder, monkeypatch, fields):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"^data\.(path|val_path) is [^\n]*$"):
        FilesData(**fields)


BROKEN = {
    "image.png": (b"\x89PNG\r\n", "image.png is not UTF-8 text"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl is not UTF-8 text"),
    "cut.jsonl": (b'{"text": "a"}\n{oops\n', "cut.jsonl cannot be read as json"),
    "fake.parquet": (b"not a table", "fake.parquet cannot be read as parquet"),
    "column.jsonl": (b'{"body": "a"}\n', "data.column is 'text' but .*column.jsonl has the columns body"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, name):
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as refusal:
        texts(FilesData(path=str(tmp_path)))
    assert "\n" not in str(refusal.value)
