import errno
import glob
import json
import os
import tempfile
from pathlib import Path

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


TRAINED_ON = {  # a val_path beside path=texts, which it leads into by another way
    "a link": lambda root: (root / "other.txt").symlink_to(root / "texts" / "1.txt"),
    "a link to a link": lambda root: [
        (root / "once").symlink_to(root / "texts" / "1.txt"),
        (root / "other.txt").symlink_to("once"),
    ],
    "a linked folder": lambda root: (root / "other.txt").symlink_to(root / "texts" / "sub"),
    "a folder with a link": lambda root: [
        (root / "other.txt").mkdir(),
        (root / "other.txt" / "own").write_text("own"),
        (root / "other.txt" / "far").symlink_to(root / "texts"),
    ],
    "a way around": lambda root: (root / "other.txt").symlink_to(root / "texts" / "sub" / ".." / "1.txt"),
    "a second name": lambda root: (root / "other.txt").hardlink_to(root / "texts" / "1.txt"),
}


@pytest.fixture
def root(tmp_path):
    """texts with ten files, one of them in sub."""
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for i in range(9):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "texts" / "sub" / "9.txt").write_text("text 9")
    return tmp_path


@pytest.mark.parametrize("way", TRAINED_ON)
@pytest.mark.parametrize("path", ["texts", "texts/**", "texts/sub/../**", "./texts/../texts"])
def test_text_that_is_held_out_is_not_trained_on_by_another_way_to_it(root, way, path):
    TRAINED_ON[way](root)
    for one, other in ((f"{root}/{path}", f"{root}/other.txt"), (f"{root}/other.txt", f"{root}/{path}")):
        with pytest.raises(ValueError, match=r"data.path and data.val_path share \d+ files such as "):
            FilesData(path=one, val_path=other)


@pytest.mark.parametrize("pattern", ["texts", "texts/**", "texts/**/*.txt", "**/*.txt", "*/**", "texts/sub/../**"])
def test_every_file_is_one_document_however_folders_and_files_are_linked(root, pattern):
    texts_, plain = root / "texts", matching_files(f"{root}/{pattern}")
    assert len(plain) == 10
    for number in range(8):  # as many ways as 2 ** 8 and more, each of them endless
        (texts_ / "sub" / f"up{number}").symlink_to(texts_)
    (texts_ / "again").symlink_to(texts_ / "sub")
    (texts_ / "0 copy.txt").symlink_to("1.txt")
    (texts_ / "sub" / "1 again.txt").hardlink_to(texts_ / "1.txt")
    (texts_ / "itself").symlink_to("itself")
    (texts_ / "gone.txt").symlink_to("nowhere")
    assert matching_files(f"{root}/{pattern}") == plain
    documents = list(FilesData(path=f"{root}/{pattern}").documents())
    assert sorted(document.text for document in documents) == [f"text {i}" for i in range(10)]
    assert all(path == path.resolve() for path in plain.values())


def test_a_linked_folder_is_read_and_its_documents_are_named_by_the_link(root):
    (root / "more").mkdir()
    (root / "more" / "m.txt").write_text("more")
    (root / "texts" / "linked").symlink_to(root / "more")
    (root / "blob").write_text(json.dumps({"text": "row"}) + "\n")
    (root / "texts" / "rows.jsonl").symlink_to(root / "blob")  # what it is says its name, as in the cache of the hub
    found = texts(FilesData(path=str(root / "texts")))
    assert len(found) == 12 and found["linked/m.txt"] == "more" and found["rows.jsonl:0"] == "row"


@pytest.mark.parametrize(
    "pattern", ["*", "**", "**/*", "s*/**", "**/sub/*", "[0-3].txt", "*/9.txt", "**/?.txt", ".h*/*"]
)
def test_a_glob_means_what_it_means_to_python(root, pattern):
    for name in (".hidden", ".h/in", "texts/.h/in", "texts/sub/deep/er/x.txt", "texts/sub/[1].txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    for below in ("", "texts/"):
        found = glob.glob(below + pattern, root_dir=root, recursive=True)
        expected = sorted(name for name in found if (root / name).is_file())
        assert [str(path.relative_to(root)) for path in matching_files(f"{root}/{below}{pattern}").values()] == expected


def test_a_file_that_moves_is_another_text_to_the_cache(root):
    data = FilesData(path=f"{root}/texts")
    before = data.identity()
    (root / "texts" / "1.txt").rename(root / "texts" / "sub" / "1.txt")  # its name decides whether it is held out
    assert data.identity() != before


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
    "page.parquet": (None, "page.parquet cannot be read as parquet: [^\n]*GZip"),
    "rows.parquet": (b"PAR1" + b"\x00" * 40 + b"PAR1", "rows.parquet cannot be read as parquet"),
    "half.jsonl": (b'{"text": "a\\ud800b"}\n', "half.jsonl cannot be read as json"),
    "column.jsonl": (b'{"body": "a"}\n', "data.column is 'text' but .*column.jsonl has the columns body"),
}


def damaged_page(folder):
    """A parquet file whose compressed text is damaged and nothing else."""
    path = folder.parent / "whole.parquet"
    pq.write_table(pa.table({"text": [f"{i} of many words " * 40 for i in range(300)]}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    for place in range(100, 300):
        content[place] ^= 0x5A
    return bytes(content)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, name):
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content or damaged_page(tmp_path))
    with pytest.raises(DataError, match=sentence) as refusal:
        texts(FilesData(path=str(tmp_path)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "folder"])
def test_what_the_system_cannot_read_is_named_in_one_sentence(tmp_path, monkeypatch, number, name):
    """As a user without permission or with a failing disk has it; tests run as a user who may read all."""
    path = tmp_path / "texts" / name
    (path if name == "folder" else path.parent).mkdir(parents=True)
    if name != "folder":
        pq.write_table(pa.table({"text": ["x"]}), path) if name == "a.parquet" else path.write_text('{"text": "x"}\n')
    (tmp_path / "texts" / "b.txt").write_text("fine")
    data = FilesData(path=str(path.parent))
    real_open, real_scan = Path.open, os.scandir

    def refuse(real):
        def opened(given, *arguments, **options):
            if Path(given) == path:
                raise OSError(number, os.strerror(number), str(given))
            return real(given, *arguments, **options)

        return opened

    monkeypatch.setattr(Path, "open", refuse(real_open))
    monkeypatch.setattr(os, "scandir", refuse(real_scan))
    with pytest.raises(DataError, match=rf"{name} cannot be read \({os.strerror(number)}\)[^\n]*$"):
        list(document.text for document in data.documents())


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="users are numbered on POSIX systems")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "folder"])
def test_a_file_without_permissions_is_named_in_one_sentence(name):
    """Really without them, read by a user whom they bind: root reads everything."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for its user alone
        path = Path(folder, "texts", name)
        (path if name == "folder" else path.parent).mkdir(parents=True)
        if name != "folder":
            pq.write_table(pa.table({"text": ["x"]}), path) if name == "a.parquet" else path.write_text("{}\n")
        Path(folder, "texts", "b.txt").write_text("fine")
        os.chmod(folder, 0o755)
        data = FilesData(path=str(path.parent))
        path.chmod(0)
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)
        try:
            with pytest.raises(DataError, match=rf"{name} cannot be read \(Permission denied\)[^\n]*$"):
                texts(data)
        finally:
            os.seteuid(user)
            path.chmod(0o700)


@pytest.mark.parametrize("groups", [[[], ["a", "b"]], [["a"], [], ["b"]], [["a", "b"], []], [[], [], ["a", "b"], []]])
def test_empty_row_groups_hold_nothing_and_hide_nothing(tmp_path, groups):
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "t.parquet", schema) as writer:
        for group in groups:
            writer.write_table(pa.table({"text": group}, schema))
    assert list(texts(FilesData(path=str(tmp_path))).values()) == ["a", "b"]


def test_a_table_of_empty_row_groups_has_no_rows(tmp_path):
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "t.parquet", schema) as writer:
        writer.write_table(pa.table({"text": []}, schema))
    assert texts(FilesData(path=str(tmp_path))) == {}


@pytest.mark.parametrize("suffix", [b"txt", b"jsonl", b"parquet"])
def test_a_file_name_that_is_not_utf8_is_a_name_like_others(tmp_path, suffix):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9." + suffix)
    pq.write_table(pa.table({"text": ["tea"]}), tmp_path / "t")
    content = {b"txt": b"tea", b"jsonl": b'{"text": "tea"}\n', b"parquet": (tmp_path / "t").read_bytes()}[suffix]
    (tmp_path / "t").unlink()
    with open(name, "wb") as file:
        file.write(content)
    for number in range(20):
        (tmp_path / f"b{number}.txt").write_text("words " * 5)
    data = FilesData(path=str(tmp_path), context=4, val_fraction=0.4, cache=str(tmp_path.parent / "cache"))
    assert "tea" in texts(data).values()
    samples = data.samples(0, 100)
    assert len(samples.train) > 10 and samples.manifest == data.samples(0, 100).manifest
