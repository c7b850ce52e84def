import pytest

from lightsparse.bench import __main__ as command
from lightsparse.bench.report import RESULTS, SETTINGS, Report, cell, load


@pytest.fixture
def report():
    rows = [
        {"seq": seq, "window": 64, "dtype": "fp32", "block": 16, "increase_mib": 1.5 * seq, "growth": growth}
        for seq, growth in ((1024, None), (4096, 4.0))
    ]
    return Report("memory", "python -m lightsparse.bench memory --window 64", rows, ["A note."])


def test_a_report_comes_back_from_its_file(report, tmp_path):
    report.save(tmp_path / "x.json")
    assert load(tmp_path / "x.json") == report


def test_markdown_has_command_machine_notes_and_rows(report, tmp_path, capsys):
    report.save(tmp_path / "x.json")
    assert command.main(["table", str(tmp_path / "x.json")]) == 0
    text = capsys.readouterr().out
    head, _, table = text.partition("| seq |")
    assert report.command in head and report.machine() in head and "A note." in head
    assert "window 64" in head  # the same in all rows, so it is no column
    assert [line.count("|") for line in ("| seq |" + table).strip().splitlines()] == [len(report.columns()) + 1] * 4
    assert "| 4096 | 6,144 |" in table


def test_settings_that_differ_are_columns(report):
    report.rows[1]["block"] = 32
    assert report.columns() == ("block", *RESULTS["memory"])
    assert set(SETTINGS) == set(RESULTS)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"kind": "weather"}'])
def test_another_file_is_refused_by_name(text, tmp_path, capsys):
    (tmp_path / "x.json").write_text(text)
    assert command.main(["table", str(tmp_path / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.05011, "0.0501"), (14.26, "14.3"), (123.4, "123"), (12345.6, "12,346"), (64, "64")],
)
def test_cells_are_short(value, shown):
    assert cell(value) == shown
