import pytest

from lightsparse.data.documents import column_text, hash_share, utf8_text
from lightsparse.data.source import DataError
from lightsparse.data.text import TextConfig

WRONG = [
    ("context", 0, "data.context is 0; a context counts tokens and must be at least 1"),
    ("batch_size", 0, "data.batch_size is 0"),
    ("pack", "glue", "data.pack is 'glue'; it must be isolate"),
    ("val_fraction", 0.0, "data.val_fraction is 0.0"),
    ("val_fraction", 1.0, "data.val_fraction is 1.0"),
    ("num_workers", -1, "data.num_workers is -1"),
]


@pytest.mark.parametrize("field, value, sentence", WRONG)
def test_a_wrong_field_is_refused_by_name_in_one_line(field, value, sentence):
    with pytest.raises(ValueError) as refusal:
        TextConfig(**{field: value})
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_hash_of_a_name_never_changes():
    assert hash_share("asyncio/tasks.py") == 0.06363565033984386


def test_hashes_spread_evenly():
    shares = [hash_share(f"document {i}") for i in range(4000)]
    assert min(shares) >= 0.0
    assert max(shares) < 1.0
    for fraction in (0.05, 0.5):
        assert sum(share < fraction for share in shares) / len(shares) == pytest.approx(fraction, abs=0.02)


def test_text_is_read_byte_for_byte(tmp_path):
    (tmp_path / "a").write_bytes("é\r\n\n".encode())
    assert utf8_text(tmp_path / "a") == "é\r\n\n"


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin is not UTF-8 text \(byte 3\)"):
        utf8_text(tmp_path / "latin")


def test_a_missing_column_is_answered_with_the_columns_there_are():
    with pytest.raises(DataError, match=r"data.column is 'text' but rows.jsonl has the columns body, id"):
        column_text({"body": "x", "id": 1}, "text", "rows.jsonl")


def test_a_column_of_numbers_is_refused_and_a_null_is_empty():
    with pytest.raises(DataError, match=r"column 'id' of rows.jsonl holds int, not text"):
        column_text({"id": 1}, "id", "rows.jsonl")
    assert column_text({"text": None}, "text", "rows.jsonl") == ""
