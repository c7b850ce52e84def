import sysconfig
from pathlib import Path

import pytest

from lightsparse.data.source import DataError
from lightsparse.data.stdlib import MIN_BYTES, StdlibData


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library; every file is long enough unless its name says short."""
    long = "x = 1  # é\r\n" * (MIN_BYTES // 12 + 1)
    for name in [
        "os.py", "short.py", "pkg/__init__.py", "pkg/short.py", "pkg/inner/deep.py", "small/short_a.py",
        "site-packages/torch.py", "test/t.py", "pkg/tests/t.py", "idlelib/idle_test/t.py", "encodings/cp1.py",
        "lib2to3/p.py", "_sysconfigdata__linux.py", "notes.txt",
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"y = 2\n" if "short" in name else long.encode())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_long_files_of_the_library_itself_are_the_documents(library):
    documents = {document.name: document.text for document in StdlibData().documents()}
    assert list(documents) == ["os.py", "pkg/__init__.py", "pkg/inner/deep.py"]
    for name, text in documents.items():
        assert text.encode() == (library / name).read_bytes()


def test_a_package_is_one_document_of_all_its_files(library):
    documents = {document.name: document.text for document in StdlibData(unit="package").documents()}
    assert list(documents) == ["os.py", "pkg"]
    parts = ["pkg/__init__.py", "pkg/inner/deep.py", "pkg/short.py"]
    assert documents["pkg"].encode() == b"".join((library / part).read_bytes() for part in parts)


def test_a_python_without_sources_is_answered_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no source files below .* data=files"):
        list(StdlibData().documents())


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match=r"data.unit is 'line'; it must be file or package"):
        StdlibData(unit="line")


def test_the_real_library_is_megabytes_of_long_documents():
    documents = list(StdlibData().documents())
    sizes = [len(document.text.encode()) for document in documents]
    assert min(sizes) >= MIN_BYTES
    assert sum(sizes) > 5_000_000
    assert sum(size >= 4 * MIN_BYTES for size in sizes) > 50
    assert not any({"test", "tests", "site-packages"} & set(Path(document.name).parts) for document in documents)


def test_a_file_with_two_names_is_one_document(library):
    before = [document.name for document in StdlibData().documents()]
    (library / "os_again.py").symlink_to("os.py")
    (library / "pkg" / "os.py").hardlink_to(library / "os.py")
    assert [document.name for document in StdlibData().documents()] == before
